"""References of networks over the whole sequence: the formulae, token by token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mixerzoo_mixers.naive._parts import affine, each, layer_norm, reference


def leaky(x: Tensor) -> Tensor:
    """Return x where it is positive, x / 100 elsewhere."""
    return torch.where(x > 0, x, 0.01 * x)


@reference
def shallow_ffn(mixer: Any, x: Tensor, real: Tensor) -> Tensor:
    """y_n = W [f(x)_n; x_n] + b, f: vec(x) -> LayerNorm -> Linear -> LeakyReLU -> LayerNorm -> Linear; padding is 0."""
    v = torch.cat([x[n] if bool(real[n]) else torch.zeros_like(x[n]) for n in range(len(x))])
    v = affine(mixer.up, layer_norm(mixer.norm1.weight, mixer.norm1.bias, v))
    v = affine(mixer.down, layer_norm(mixer.norm2.weight, mixer.norm2.bias, leaky(v)))
    mixed = v.reshape(x.shape)
    return each(x, real, lambda n: affine(mixer.readout, torch.cat((mixed[n], x[n]))))


@reference
def shallow_ffn_heads(mixer: Any, x: Tensor, real: Tensor) -> Tensor:
    """y_n = W [f_h(V_h x)_n for all h; x_n] + b, f_h as f of `shallow_ffn`; padding is 0."""
    mixed = []
    for h, rows in enumerate(mixer.value.weight.chunk(len(mixer.up.weight))):
        v = torch.cat(
            [rows @ x[n] if bool(real[n]) else torch.zeros_like(rows @ x[n]) for n in range(len(x))]
        )
        v = layer_norm(mixer.norm1.weight[h, 0], mixer.norm1.bias[h, 0], v)
        v = leaky(mixer.up.weight[h] @ v + mixer.up.bias[h, 0])
        v = layer_norm(mixer.norm2.weight[h, 0], mixer.norm2.bias[h, 0], v)
        v = mixer.down.weight[h] @ v + mixer.down.bias[h, 0]
        mixed.append(v.reshape(len(x), -1))
    return each(x, real, lambda n: affine(mixer.readout, torch.cat([*(m[n] for m in mixed), x[n]])))
