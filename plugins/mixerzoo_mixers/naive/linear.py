"""References of attention without softmax: the formulae, token by token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mixerzoo_mixers.naive._parts import affine, each, reference, sources


def feature_attention(mixer: Any, x: Tensor, real: Tensor, feature: Callable[[Tensor], Tensor]) -> Tensor:
    """y_n = W [sum_m f(q_n).f(k_m) v_m / (sum_m f(q_n).f(k_m) + 1e-6) for all h; x_n] + b."""

    def qkv(n: int, h: int) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (part.chunk(mixer.heads)[h] for part in affine(mixer.qkv, x[n]).chunk(3))
        return feature(q), feature(k), v

    def token(n: int) -> Tensor:
        heads = []
        for h in range(mixer.heads):
            q = qkv(n, h)[0]
            seen = [qkv(m, h)[1:] for m in sources(n, real, mixer.causal)]
            weights = torch.stack([q @ k for k, _ in seen])
            heads.append(weights @ torch.stack([v for _, v in seen]) / (weights.sum() + 1e-6))
        return affine(mixer.readout, torch.cat((*heads, x[n])))

    return each(x, real, token)


@reference
def linear_attention(mixer: Any, x: Tensor, real: Tensor) -> Tensor:
    """That with f = elu + 1: u + 1 above zero, exp(u) below."""

    def feature(u: Tensor) -> Tensor:
        return torch.where(u > 0, u + 1, torch.exp(u.clamp(max=0)))

    return feature_attention(mixer, x, real, feature)


@reference
def relu_attention(mixer: Any, x: Tensor, real: Tensor) -> Tensor:
    """That with f = relu."""
    return feature_attention(mixer, x, real, lambda u: u * (u > 0))


@reference
def softmax_linear(mixer: Any, x: Tensor, real: Tensor) -> Tensor:
    """That with f(u) = [exp(u); exp(-u)] / sum_i (exp(u_i) + exp(-u_i))."""

    def feature(u: Tensor) -> Tensor:
        both = torch.cat((torch.exp(u), torch.exp(-u)))
        return both / both.sum()

    return feature_attention(mixer, x, real, feature)
