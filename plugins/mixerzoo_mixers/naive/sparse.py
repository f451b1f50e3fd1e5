"""References of attention to few keys from all over the grid: the formulae, token by token."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mixerzoo_mixers.naive._parts import affine, reference

Sees = Callable[[int, int, int], bool]


def head(mixer: Any, x: Tensor, n: int, h: int) -> list[Tensor]:
    """q, k and v of token n in head h."""
    return [part.chunk(mixer.heads)[h] for part in affine(mixer.qkv, x[n]).chunk(3)]


def attention(mixer: Any, x: Tensor, sees: Sees) -> Tensor:
    """y_n = W [sum_m a_hnm v_hm for all h; x_n] + b, a = softmax(q_n.k_m / sqrt K) over the m that n sees.

    `sees` takes a head and two tokens of the grid; a prefix token sees all and is seen by all.
    """
    prefix, head_width = len(x) - mixer.grid[0] * mixer.grid[1], x.shape[1] // mixer.heads

    def token(n: int) -> Tensor:
        heads = []
        for h in range(mixer.heads):
            seen = [m for m in range(len(x)) if min(n, m) < prefix or sees(h, n - prefix, m - prefix)]
            keys, values = (torch.stack([head(mixer, x, m, h)[i] for m in seen]) for i in (1, 2))
            weights = torch.softmax(keys @ head(mixer, x, n, h)[0] / head_width**0.5, 0)
            heads.append(weights @ values)
        return affine(mixer.readout, torch.cat((*heads, x[n])))

    return torch.stack([token(n) for n in range(len(x))])


def windows(grid: tuple[int, int]) -> list[tuple[int, int]]:
    """How many windows there are along each side of the grid, and how long their sides are."""
    counts = [math.ceil(side / round(2 * math.sqrt(side))) for side in grid]
    return [(count, math.ceil(side / count)) for side, count in zip(grid, counts, strict=True)]


@reference
def factorized(mixer: Any, x: Tensor, real: Tensor) -> Tensor:
    """Heads of the first half see strided subsets of the grid, the others windows."""

    def sees(h: int, n: int, m: int) -> bool:
        places = zip(divmod(n, mixer.grid[1]), divmod(m, mixer.grid[1]), windows(mixer.grid), strict=True)
        if h < math.ceil(mixer.heads / 2):
            return all(i % count == j % count for i, j, (count, _) in places)
        return all(i // size == j // size for i, j, (_, size) in places)

    return attention(mixer, x, sees)


@reference
def topk_attention(mixer: Any, x: Tensor, real: Tensor) -> Tensor:
    """Tokens of a tile (a window as above) see the ceil(4 sqrt(cells)) tokens of the grid with the greatest scores.

    Those are predicted: the product of the first quarter of the channels, summed over the queries of the tile.
    """
    rows, columns = mixer.grid
    prefix = len(x) - rows * columns
    high, wide = (size for _, size in windows(mixer.grid))
    low = math.ceil(mixer.qkv.out_features // (3 * mixer.heads) / 4)

    def tile(n: int) -> tuple[int, int]:
        return n // columns // high, n % columns // wide

    def best(h: int, wanted: tuple[int, int]) -> list[int]:
        q, k = (
            [head(mixer, x, prefix + n, h)[i][:low].detach() for n in range(rows * columns)] for i in (0, 1)
        )
        members = [n for n in range(rows * columns) if tile(n) == wanted]
        scores = [float(torch.stack([q[n] @ key for n in members]).sum()) for key in k]
        kept = math.ceil(4 * math.sqrt(rows * columns))
        return sorted(range(rows * columns), key=lambda m: -scores[m])[:kept]

    tiles = {tile(n) for n in range(rows * columns)}
    chosen = {(h, wanted): best(h, wanted) for h in range(mixer.heads) for wanted in tiles}
    return attention(mixer, x, lambda h, n, m: m in chosen[h, tile(n)])
