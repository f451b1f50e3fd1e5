"""The parts of `search.py`, and what samplers are compared on."""
