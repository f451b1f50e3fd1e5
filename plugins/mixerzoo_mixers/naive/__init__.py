"""Slow, obvious references for the built-in mixers: one file a family, as the mixers have.

They are what the tests compare values and gradients with; nothing else uses them.
"""

from mixerzoo_mixers.naive import channel, linear, recurrent, shallow_ffn, simple, ssm, token_mlp
from mixerzoo_mixers.naive._parts import REFERENCES, Reference

__all__ = [
    "REFERENCES",
    "Reference",
    "channel",
    "linear",
    "recurrent",
    "shallow_ffn",
    "simple",
    "ssm",
    "token_mlp",
]
