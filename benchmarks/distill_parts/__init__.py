"""The parts of `distill.py`."""
