"""References of mixers that look around: the formulae, token by token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mixerzoo_mixers.naive._parts import affine, each, read_grid, reference, sources


@reference
def window(mixer: Any, x: Tensor, real: Tensor) -> Tensor:
    """y_n = W [sum_m a_hnm v_hm for all h; x_n] + b, a = softmax(q_n.k_m / sqrt K) over the m within 32 of n."""
    head_width = x.shape[1] // mixer.heads
    order = sources(0, real, False)  # the real tokens; only their order counts

    qkv = {n: [part.chunk(mixer.heads) for part in affine(mixer.qkv, x[n]).chunk(3)] for n in order}

    def sees(n: int, m: int) -> bool:
        i, j = order.index(n), order.index(m)
        near = abs(i - j) <= 32 or min(i, j) < mixer.prefix
        return near and (j <= i or not mixer.causal)

    def token(n: int) -> Tensor:
        seen = [m for m in order if sees(n, m)]
        heads = []
        for h in range(mixer.heads):
            weights = torch.stack([qkv[n][0][h] @ qkv[m][1][h] for m in seen]) / head_width**0.5
            heads.append(torch.softmax(weights, 0) @ torch.stack([qkv[m][2][h] for m in seen]))
        return affine(mixer.readout, torch.cat((*heads, x[n])))

    return each(x, real, token)


@reference
def dwconv(mixer: Any, x: Tensor, real: Tensor) -> Tensor:
    """y_n = W [sum_d w_d * V x_(n+d) + g * mean_m V x_m; x_n; ...] + b, zeros outside the grid."""
    rows, columns = mixer.grid
    high, wide = mixer.conv.weight.shape[2:]
    values = [mixer.value.weight @ v for v in x[len(x) - rows * columns :]]
    mean = torch.stack(values).mean(0)

    def cell(i: int, j: int) -> Tensor:
        total: Tensor = mixer.mean * mean
        for a in range(high):
            for b in range(wide):
                k, m = i + a - high // 2, j + b - wide // 2
                if 0 <= k < rows and 0 <= m < columns:
                    total = total + mixer.conv.weight[:, 0, a, b] * values[k * columns + m]
        return total

    return read_grid(mixer, [cell(i, j) for i in range(rows) for j in range(columns)], x)
