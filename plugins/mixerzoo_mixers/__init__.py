"""The built-in mixers: a plugin like any other. One file a family, one line here a mixer."""

from __future__ import annotations

from collections.abc import Callable

from mixerzoo import MixerSpec, hookimpl
from mixerzoo_mixers import (
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


@hookimpl
def register_mixers(register: Callable[[MixerSpec], None]) -> None:
    """Register the built-in mixers."""
    register(token_mlp.STATIC)
    register(token_mlp.TOKEN_MLP)
    register(gated_mlp.GLU_MLP)
    register(gated_mlp.GMLP)
    register(gated_mlp.ACTIVATOR)
    register(linear.LINEAR_ATTENTION)
    register(linear.RELU_ATTENTION)
    register(linear.SOFTMAX_LINEAR)
    register(linear_grid.FOCUSED_LINEAR)
    register(linear_grid.LITE_MLA)
    register(linear_grid.L2_LINEAR)
    register(kernel.SOFT)
    register(kernel.TOEPLITZ_KERNEL)
    register(ssm.MAMBA)
    register(mamba2.MAMBA2)
    register(matrix_state.RETENTION)
    register(matrix_state.GATED_DELTA)
    register(recurrent.MULTIHEAD_LSTM)
    register(recurrent.LSTM2D)
    register(shallow_ffn.SHALLOW_FFN)
    register(shallow_ffn.SHALLOW_FFN_HEADS)
    register(local.WINDOW)
    register(local.DWCONV)
    register(sparse.FACTORIZED)
    register(sparse.TOPK_ATTENTION)
    register(sea.SEA)
    register(reduced.STRIP)
    register(reduced.CASCADED_GROUP)
    register(reduced.FEWER_HEADS)
    register(polynomial.POLYNOMIAL)
    register(simple.POOL)
    register(simple.LINEAR)
    register(simple.NONE)
    register(channel.MLP_SLICE)
    register(spectral.FNET)
    register(spectral.GLOBAL_FILTER)
    register(spectral.AFNO)
    register(wavelet.SCATTERING)
