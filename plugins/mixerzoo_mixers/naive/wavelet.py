"""References of mixing in a wavelet transform: filters tap by tap, a row or a column at a time."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from mixerzoo_mixers.naive._parts import affine, read_grid, reference
from mixerzoo_mixers.naive.spectral import Pair, block_mlp

Line = list[Tensor]  # vectors, one a cell
Plane = list[Line]

# Kingsbury's near_sym_b, all taps: 13 and 19.
H0 = [
    *(Fraction(n, 5120) for n in (-9, 0, 114, -240, -247, 1520)),
    Fraction(2844, 5120),
    *(Fraction(n, 5120) for n in (1520, -247, -240, 114, 0, -9)),
]
G0 = [
    *(Fraction(n, 1146880) for n in (81, 0, -1539, -2160, 8208, 27360, -63816, -59280, 343786)),
    Fraction(641600, 1146880),
    *(Fraction(n, 1146880) for n in (343786, -59280, -63816, 27360, 8208, -2160, -1539, 0, 81)),
]


def alternate(taps: list[Fraction]) -> list[Fraction]:
    """Turn a low-pass into a high-pass: the sign of every other tap, the middle one kept."""
    middle = len(taps) // 2
    return [-t if (n - middle) % 2 else t for n, t in enumerate(taps)]


H1, G1 = alternate(G0), alternate(H0)


def filtered(line: Line, taps: list[Fraction]) -> Line:
    """Filter a line that goes on mirrored, the last cell first, beyond both of its ends."""
    middle = len(taps) // 2
    out = []
    for n in range(len(line)):
        total = torch.zeros_like(line[0])
        for k, tap in enumerate(taps):
            m = n + k - middle
            while not 0 <= m < len(line):
                m = -1 - m if m < 0 else 2 * len(line) - 1 - m
            total = total + float(tap) * line[m]
        out.append(total)
    return out


def turned(plane: Plane) -> Plane:
    """Swap rows and columns."""
    return [list(line) for line in zip(*plane, strict=True)]


def along(plane: Plane, row_taps: list[Fraction], column_taps: list[Fraction]) -> Plane:
    """Filter every row, then every column."""
    return turned([filtered(line, column_taps) for line in turned([filtered(r, row_taps) for r in plane])])


def plus(*planes: Plane) -> Plane:
    """The sum, cell by cell."""
    return [
        [torch.stack(vectors).sum(0) for vectors in zip(*lines, strict=True)]
        for lines in zip(*planes, strict=True)
    ]


def through(mlp: Any, plane: Plane) -> Plane:
    """Two complex numbers out of each square of four cells, each through the MLP, and back."""
    out = [list(line) for line in plane]
    root = math.sqrt(2)
    for i in range(0, len(plane), 2):
        for j in range(0, len(plane[0]), 2):
            a, b, c, d = plane[i][j], plane[i][j + 1], plane[i + 1][j], plane[i + 1][j + 1]
            one: Pair = block_mlp(mlp, ((a - d) / root, (b + c) / root))
            two: Pair = block_mlp(mlp, ((a + d) / root, (b - c) / root))
            out[i][j], out[i][j + 1] = (one[0] + two[0]) / root, (one[1] + two[1]) / root
            out[i + 1][j], out[i + 1][j + 1] = (one[1] - two[1]) / root, (two[0] - one[0]) / root
    return out


@reference
def scattering(mixer: Any, x: Tensor, real: Tensor) -> Tensor:
    """Four bands of V x: the low one times its weights, the others through the MLP; then their synthesis."""
    rows, columns = mixer.wavelets.grid
    values = iter(affine(mixer.value, v) for v in x[len(x) - rows * columns :])
    plane = [[next(values) for _ in range(columns)] for _ in range(rows)]
    if columns % 2:
        plane = [[*line, line[-1]] for line in plane]
    if rows % 2:
        plane = [*plane, plane[-1]]
    low = along(plane, H0, H0)
    low = [[w * v for w, v in zip(*both, strict=True)] for both in zip(mixer.low, low, strict=True)]
    whole = plus(
        along(low, G0, G0),
        *(
            along(through(mixer.mlp, along(plane, *analysis)), *synthesis)
            for analysis, synthesis in (((H0, H1), (G0, G1)), ((H1, H0), (G1, G0)), ((H1, H1), (G1, G1)))
        ),
    )
    mixed = [vector for line in whole[:rows] for vector in line[:columns]]
    return read_grid(mixer, mixed, x)
