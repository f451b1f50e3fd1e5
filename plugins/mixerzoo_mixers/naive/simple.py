"""References of the cheapest mixers: the formulae, token by token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mixerzoo_mixers.naive._parts import affine, each, reference, sources


@reference
def linear(mixer: Any, x: Tensor, real: Tensor) -> Tensor:
    """y_n = W x_n + b."""
    return each(x, real, lambda n: affine(mixer.readout, x[n]))


@reference
def none(mixer: Any, x: Tensor, real: Tensor) -> Tensor:
    """y_n = 0."""
    return 0 * x


@reference
def pool(mixer: Any, x: Tensor, real: Tensor) -> Tensor:
    """y_n = W [x_n; x_first; mean of the tokens seen] + b; the mean comes before x_first if causal."""

    def token(n: int) -> Tensor:
        first = x[sources(n, real, False)[0]]
        mean = sum((x[m] for m in sources(n, real, mixer.causal)), torch.zeros_like(x[n]))
        mean = mean / len(sources(n, real, mixer.causal))
        if mixer.causal:
            return affine(mixer.readout, torch.cat((x[n], mean, first)))
        return affine(mixer.readout, torch.cat((x[n], first, mean) if mixer.first else (x[n], mean)))

    return each(x, real, token)
