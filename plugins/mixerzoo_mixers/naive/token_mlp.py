"""References of mixers of a fixed length: the formulae, token by token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mixerzoo_mixers.naive._parts import affine, each, reference, sigmoid, sources


@reference
def static(mixer: Any, x: Tensor, real: Tensor) -> Tensor:
    """y_n = W [sum_m A_hnm V_h x_m for all h; x_n] + b."""
    values = mixer.value.weight.chunk(len(mixer.mixing))

    def token(n: int) -> Tensor:
        seen = sources(n, real, mixer.causal)
        heads = [
            torch.stack([a[n, m] * (v @ x[m]) for m in seen]).sum(0)
            for a, v in zip(mixer.mixing, values, strict=True)
        ]
        return affine(mixer.readout, torch.cat((*heads, x[n])))

    return each(x, real, token)


@reference
def glu_mlp(mixer: Any, x: Tensor, real: Tensor) -> Tensor:
    """y_n = W [2 sigmoid(G x_n + e) * sum_m A_hnm (V_h x_m + c_h) for all h; x_n] + b."""
    heads = len(mixer.mixing)

    def value_gate(n: int) -> tuple[Tensor, Tensor]:
        value, gate = affine(mixer.value_gate, x[n]).chunk(2)
        return value, gate

    def token(n: int) -> Tensor:
        seen = sources(n, real, mixer.causal)
        mixed = [
            torch.stack([mixer.mixing[h, n, m] * value_gate(m)[0].chunk(heads)[h] for m in seen]).sum(0)
            for h in range(heads)
        ]
        gate = 2 * sigmoid(value_gate(n)[1])
        return affine(mixer.readout, torch.cat((gate * torch.cat(mixed), x[n])))

    return each(x, real, token)
