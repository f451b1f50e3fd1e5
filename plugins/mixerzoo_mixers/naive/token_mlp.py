"""References of mixers of a fixed length: the formulae, token by token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mixerzoo_mixers.naive._parts import affine, each, gelu, reference, sources


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
def token_mlp(mixer: Any, x: Tensor, real: Tensor) -> Tensor:
    """y_n = W [sum_t W2_hnt gelu(sum_m W1_htm V_h x_m + b1_ht) + b2_hn for all h; x_n] + b.

    If causal, hidden token t of either half of the T belongs to token p(t) = floor(t N / (T / 2)): m <= p(t) <= n.
    """
    heads, hidden, tokens = mixer.weight1.shape
    values = mixer.value.weight.chunk(heads)
    places = 2 * [t * tokens // (hidden // 2) for t in range(hidden // 2)]

    def unit(h: int, t: int) -> Tensor:
        seen = [m for m in range(tokens) if bool(real[m]) and (m <= places[t] or not mixer.causal)]
        total = mixer.bias1[h, t] + torch.zeros_like(values[h] @ x[0])
        for m in seen:
            total = total + mixer.weight1[h, t, m] * (values[h] @ x[m])
        return gelu(total)

    units = [[unit(h, t) for t in range(hidden)] for h in range(heads)]

    def token(n: int) -> Tensor:
        mixed = []
        for h in range(heads):
            total = mixer.bias2[h, n] + torch.zeros_like(units[h][0])
            for t in range(hidden):
                if places[t] <= n or not mixer.causal:
                    total = total + mixer.weight2[h, n, t] * units[h][t]
            mixed.append(total)
        return affine(mixer.readout, torch.cat((*mixed, x[n])))

    return each(x, real, token)
