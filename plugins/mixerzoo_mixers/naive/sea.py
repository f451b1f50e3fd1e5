"""Reference of sparse attention by an estimated mask: the formulae, token by token."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mixerzoo_mixers.naive._parts import affine, each, reference


def tiles_of(rows: int, columns: int) -> list[list[int]]:
    """The cells of each tile, row by row."""
    small = rows * columns < 144

    def side(size: int, other: int) -> int:
        if size == 1:
            return 1
        if other == 1:
            return 4 if small else 16
        return 2 if small else min((-size % s, i, s) for i, s in enumerate((4, 5, 3)))[2]

    down, across = side(rows, columns), side(columns, rows)
    return [
        [r * columns + c for r in range(y, min(y + down, rows)) for c in range(x, min(x + across, columns))]
        for y in range(0, rows, down)
        for x in range(0, columns, across)
    ]


def convolve(layer: Any, picture: Tensor) -> Tensor:
    """A 3 x 3 convolution of (channels, rows, columns), zeros around it."""
    rows, columns = picture.shape[1:]
    out = []
    for y in range(rows):
        for x in range(columns):
            total = layer.bias
            for i in range(3):
                for j in range(3):
                    r, c = y + i - 1, x + j - 1
                    if 0 <= r < rows and 0 <= c < columns:
                        total = total + layer.weight[:, :, i, j] @ picture[:, r, c]
            out.append(total)
    return torch.stack(out, dim=1).reshape(-1, rows, columns)


@reference
def sea(mixer: Any, x: Tensor, real: Tensor) -> Tensor:
    """Softmax attention to the S tiles of greatest E and to the prefix; the rest as means of v weighed by E."""
    prefix = mixer.prefix
    tiles = [[prefix + cell for cell in cells] for cells in tiles_of(*mixer.shape)]
    kept = mixer.chosen
    width = x.shape[1] // mixer.heads
    rows = [[part.chunk(mixer.heads) for part in affine(mixer.qkv, v).chunk(3)] for v in x]

    def positive(u: Tensor) -> Tensor:
        return torch.exp(torch.cat((u, -u)) / width**0.25)

    def shares(h: int) -> Tensor:
        columns = tiles + [[p] for p in range(prefix)]
        keys = torch.stack([positive(k[h]) for _, k, _ in rows])
        maps = []
        for cells in tiles:
            each_token = []
            for n in cells:
                weights = keys @ positive(rows[n][0][h])
                each_token.append(torch.stack([weights[c].sum() for c in columns]) / weights.sum())
            maps.append(torch.stack(each_token).mean(0))
        return torch.stack(maps)

    low = torch.stack([shares(h) for h in range(mixer.heads)])
    first, _, second = mixer.decoder
    hidden = convolve(first, low[:, :, : len(tiles)] * len(tiles))
    decoded = convolve(second, hidden * (hidden > 0))

    def attend(h: int, n: int, seen: list[int]) -> Tensor:
        scores = torch.stack([rows[m][1][h] for m in seen]) @ rows[n][0][h] / math.sqrt(width)
        weights = torch.exp(scores - scores.max())
        return weights @ torch.stack([rows[m][2][h] for m in seen]) / weights.sum()

    mixed: dict[tuple[int, int], Tensor] = {}
    for h in range(mixer.heads):
        for t, cells in enumerate(tiles):
            scores = mixer.sharpness[h] * torch.log(low[h, t] + 1e-6)
            scores = scores + torch.cat((decoded[h, t], torch.zeros_like(scores[len(tiles) :])))
            weights = torch.exp(scores) / torch.exp(scores).sum()
            ranked = sorted(range(len(tiles)), key=lambda u, w=weights: -float(w[u].detach()))  # type: ignore[misc]
            seen = list(range(prefix)) + [m for u in ranked[:kept] for m in tiles[u]]
            for n in cells:
                share, total = torch.ones_like(weights[0]), torch.zeros_like(rows[n][2][h])
                for u in ranked[kept:]:
                    share = share - weights[u]
                    total = total + weights[u] * torch.stack([rows[m][2][h] for m in tiles[u]]).mean(0)
                mixed[h, n] = share * attend(h, n, seen) + total
        for n in range(prefix):
            mixed[h, n] = attend(h, n, list(range(len(x))))

    def token(n: int) -> Tensor:
        return affine(mixer.readout, torch.cat((*(mixed[h, n] for h in range(mixer.heads)), x[n])))

    return each(x, real, token)
