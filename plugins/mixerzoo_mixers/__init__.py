"""The built-in mixers: a plugin like any other. One file a family, one line here a mixer."""

from __future__ import annotations

from collections.abc import Callable

from mixerzoo import MixerSpec, hookimpl
from mixerzoo_mixers import channel, linear, recurrent, shallow_ffn, simple, ssm, token_mlp


@hookimpl
def register_mixers(register: Callable[[MixerSpec], None]) -> None:
    """Register the built-in mixers."""
    register(token_mlp.STATIC)
    register(token_mlp.GLU_MLP)
    register(linear.LINEAR_ATTENTION)
    register(ssm.MAMBA)
    register(recurrent.MULTIHEAD_LSTM)
    register(shallow_ffn.SHALLOW_FFN)
    register(simple.POOL)
    register(simple.LINEAR)
    register(simple.NONE)
    register(channel.MLP_SLICE)
