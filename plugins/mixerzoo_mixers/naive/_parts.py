"""What the references share, and the table of them.

A reference takes a mixer (for its weights) and one sample x (N, D), and returns (N, D); `real` (N,) says which
tokens are real. Nothing here shares code with the mixers. Shapes: N tokens, D model width, H heads, R head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Reference = Callable[[Any, Tensor, Tensor], Tensor]

REFERENCES: dict[str, Reference] = {}


def reference(function: Reference) -> Reference:
    """Enter a function into REFERENCES: it bears the name of the mixer that it is the reference of."""
    REFERENCES[function.__name__] = function
    return function


def affine(layer: Any, x: Tensor) -> Tensor:
    """Return W x + b for a linear layer and one vector x."""
    y: Tensor = layer.weight @ x
    return y if layer.bias is None else y + layer.bias


def sigmoid(x: Tensor) -> Tensor:
    """Return 1 / (1 + exp(-x))."""
    return 1 / (1 + torch.exp(-x))


def gelu(x: Tensor) -> Tensor:
    """Return x times the probability that a standard normal variable is below x."""
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def silu(x: Tensor) -> Tensor:
    """Return x sigmoid(x)."""
    return x * sigmoid(x)


def layer_norm(weight: Tensor, bias: Tensor, x: Tensor, eps: float = 1e-5) -> Tensor:
    """Return one vector x with mean 0 and variance 1, times weight, plus bias."""
    centred = x - x.mean()
    return weight * centred / torch.sqrt((centred**2).mean() + eps) + bias


def sources(n: int, real: Tensor, causal: bool) -> list[int]:
    """The tokens that token n may see."""
    return [m for m in range(len(real)) if bool(real[m]) and (m <= n or not causal)]


def each(x: Tensor, real: Tensor, token: Callable[[int], Tensor]) -> Tensor:
    """Zeros for padding, token(n) for each real token n."""
    return torch.stack([token(n) if bool(real[n]) else torch.zeros_like(x[n]) for n in range(len(x))])


def read_grid(mixer: Any, mixed: list[Tensor], x: Tensor) -> Tensor:
    """y_n = W [m_n; x_n; mean of the prefix tokens, if any] + b; m_n is the grid's mean for a prefix token."""
    prefix = len(x) - len(mixed)
    mean = torch.stack(mixed).mean(0)
    shared = [x[:prefix].mean(0)] if prefix else []
    every = [mean] * prefix + mixed
    return torch.stack(
        [affine(mixer.readout, torch.cat((m, v, *shared))) for m, v in zip(every, x, strict=True)]
    )


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x))."""
    return torch.log1p(torch.exp(-torch.abs(x))) + x * (x > 0)


def in_turn(mixer: Any, tokens: int) -> list[list[int]]:
    """The order in which each direction of `mixer` goes through the tokens."""
    order = list(range(tokens))
    return [order, order[::-1]][: mixer.ways]
