"""Reference of the polynomial mixer: the formulae, token by token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mixerzoo_mixers.naive._parts import affine, read_grid, reference


@reference
def polynomial(mixer: Any, x: Tensor, real: Tensor) -> Tensor:
    """Z_1 = Y_1, Z_(i+1) = (C_i Z_i D_i) * Y_(i+1), Y_i = A_i X B_i + c_i; all Z are read out."""
    rows, columns = mixer.grid

    def convolve(weight: Tensor, picture: list[Tensor]) -> list[Tensor]:
        tall, wide = weight.shape[2:]
        back = wide - 1 if mixer.causal else wide // 2
        out = []
        for n in range(rows * columns):
            total = torch.zeros_like(picture[n])
            for i in range(tall):
                for j in range(wide):
                    r, c = n // columns + i - tall // 2, n % columns + j - back
                    if 0 <= r < rows and 0 <= c < columns:
                        total = total + weight[:, 0, i, j] * picture[r * columns + c]
            out.append(total)
        return out

    cells = x[len(x) - rows * columns :]
    parts = zip(*(torch.stack(mixer.factors.weight.chunk(3)) @ v for v in cells), strict=True)
    ys = [
        [v + bias for v in convolve(weight, list(part))]
        for part, weight, bias in zip(
            parts, mixer.spread.weight.chunk(3), mixer.spread.bias.chunk(3), strict=True
        )
    ]
    powers = [ys[0]]
    for layer, filters, y in zip(mixer.maps, mixer.filters, ys[1:], strict=True):
        moved = convolve(filters.weight, [affine(layer, z) for z in powers[-1]])
        powers.append([a * b for a, b in zip(moved, y, strict=True)])
    return read_grid(mixer, [torch.cat(zs) for zs in zip(*powers, strict=True)], x)
