"""References of networks over the whole sequence: the formulae, token by token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mixerzoo_mixers.naive._parts import affine, each, reference


@reference
def shallow_ffn(mixer: Any, x: Tensor, real: Tensor) -> Tensor:
    """vec(x) -> LayerNorm -> Linear -> LeakyReLU -> LayerNorm -> Linear, padding zero before and after."""

    def norm(layer: Any, v: Tensor) -> Tensor:
        centred = v - v.mean()
        y: Tensor = layer.weight * centred / torch.sqrt((centred**2).mean() + layer.eps) + layer.bias
        return y

    first, up, _, second = mixer.body
    v = torch.cat([x[n] if bool(real[n]) else torch.zeros_like(x[n]) for n in range(len(x))])
    v = affine(up, norm(first, v))
    v = torch.where(v > 0, v, 0.01 * v)
    y = affine(mixer.readout, norm(second, v)).reshape(x.shape)
    return each(x, real, lambda n: y[n])
