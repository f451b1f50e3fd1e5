"""References of attention without softmax: the formulae, token by token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mixerzoo_mixers.naive._parts import affine, each, reference, sources


@reference
def linear_attention(mixer: Any, x: Tensor, real: Tensor) -> Tensor:
    """y_n = W [sum_m f(q_n).f(k_m) v_m / (sum_m f(q_n).f(k_m) + 1e-6) for all h; x_n] + b, f = elu + 1."""

    def positive(v: Tensor) -> Tensor:
        return torch.where(v > 0, v + 1, torch.exp(v.clamp(max=0)))

    def qkv(n: int, h: int) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (part.chunk(mixer.heads)[h] for part in affine(mixer.qkv, x[n]).chunk(3))
        return positive(q), positive(k), v

    def token(n: int) -> Tensor:
        heads = []
        for h in range(mixer.heads):
            q = qkv(n, h)[0]
            seen = [qkv(m, h)[1:] for m in sources(n, real, mixer.causal)]
            weights = torch.stack([q @ k for k, _ in seen])
            heads.append(weights @ torch.stack([v for _, v in seen]) / (weights.sum() + 1e-6))
        return affine(mixer.readout, torch.cat((*heads, x[n])))

    return each(x, real, token)
