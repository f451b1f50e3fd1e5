"""Slow, obvious references for the built-in mixers: one file a family, as the mixers have.

They are what the tests compare values and gradients with; nothing else uses them.
"""

from mixerzoo_mixers.naive import (
    channel,
    gated_mlp,
    kernel,
    linear,
    linear_grid,
    local,
    mamba2,
    matrix_state,
    polynomial,
    recurrent,
    reduced,
    sea,
    shallow_ffn,
    simple,
    sparse,
    spectral,
    ssm,
    token_mlp,
    wavelet,
)
from mixerzoo_mixers.naive._parts import REFERENCES, Reference

__all__ = [
    "REFERENCES",
    "Reference",
    "channel",
    "gated_mlp",
    "kernel",
    "linear",
    "linear_grid",
    "local",
    "mamba2",
    "matrix_state",
    "polynomial",
    "recurrent",
    "reduced",
    "sea",
    "shallow_ffn",
    "simple",
    "sparse",
    "spectral",
    "ssm",
    "token_mlp",
    "wavelet",
]
