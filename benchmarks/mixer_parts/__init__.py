"""The parts of `mixers.py`: shapes and limits, growth, the picture, and other implementations."""
