"""References of mixing in the spectrum: the Fourier sums written out, term by term."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mixerzoo_mixers.naive._parts import affine, each, read_grid, reference

Pair = tuple[Tensor, Tensor]  # real and imaginary part


@reference
def fnet(mixer: Any, x: Tensor, real: Tensor) -> Tensor:
    """y_n = W [f_n; x_n] + b, f_nl = sum_mc (V x_m)_c cos(2 pi (n m / N + l c / C)) / sqrt(N C); real tokens only."""
    kept = [n for n in range(len(x)) if bool(real[n])]
    values = [affine(mixer.value, x[n]) for n in kept]
    tokens, channels = len(kept), len(values[0])

    def token(n: int) -> Tensor:
        place = kept.index(n)
        mixed = []
        for mode in range(channels):
            total = torch.zeros_like(x[0, 0])
            for m in range(tokens):
                for c in range(channels):
                    turn = place * m / tokens + mode * c / channels
                    total = total + values[m][c] * math.cos(2 * math.pi * turn)
            mixed.append(total / math.sqrt(tokens * channels))
        return affine(mixer.readout, torch.cat((torch.stack(mixed), x[n])))

    return each(x, real, token)


def turns(frequency: tuple[int, int], cell: tuple[int, int], grid: tuple[int, int]) -> float:
    """The angle between a wave's start and a cell."""
    return 2 * math.pi * sum(f * c / size for f, c, size in zip(frequency, cell, grid, strict=True))


def cells(grid: tuple[int, int]) -> list[tuple[int, int]]:
    """All cells of the grid, in the order of the tokens."""
    return [(row, column) for row in range(grid[0]) for column in range(grid[1])]


def modes(grid: tuple[int, int]) -> list[tuple[int, int]]:
    """The frequencies that are kept of a real grid."""
    return cells((grid[0], grid[1] // 2 + 1))


def times(frequency: tuple[int, int], grid: tuple[int, int]) -> int:
    """How often a kept frequency counts: twice where its conjugate is not kept."""
    return 1 if frequency[1] == 0 or 2 * frequency[1] == grid[1] else 2


@reference
def global_filter(mixer: Any, x: Tensor, real: Tensor) -> Tensor:
    """m_n = sum_m k(n - m, around the edges) V x_m, k the real field whose coefficients are the gains."""
    grid = mixer.grid
    kernel = {}
    for cell in cells(grid):
        total = torch.zeros_like(mixer.filter[0, 0, 0])
        for mode in modes(grid):
            angle = turns(mode, cell, grid)
            gain, gain_imag = mixer.filter[:, mode[0], mode[1]]
            total = total + times(mode, grid) * (gain * math.cos(angle) - gain_imag * math.sin(angle))
        kernel[cell] = total / (grid[0] * grid[1])
    values = [affine(mixer.value, v) for v in x[len(x) - grid[0] * grid[1] :]]
    mixed = []
    for row, column in cells(grid):
        total = torch.zeros_like(values[0])
        for (other_row, other_column), v in zip(cells(grid), values, strict=True):
            total = total + kernel[(row - other_row) % grid[0], (column - other_column) % grid[1]] * v
        mixed.append(total)
    return read_grid(mixer, mixed, x)


def multiply(weight: Tensor, z: Pair) -> Pair:
    """The complex product z W for one block: z (R), W (2, R, R)."""
    return z[0] @ weight[0] - z[1] @ weight[1], z[0] @ weight[1] + z[1] @ weight[0]


def block_mlp(mlp: Any, z: Pair) -> Pair:
    """relu(z W_1 + b_1) W_2 + b_2, a head; the ReLU on real and imaginary part."""
    heads = mlp.weight1.shape[1]
    out: list[Pair] = []
    for h, block in enumerate(zip(z[0].chunk(heads), z[1].chunk(heads), strict=True)):
        one, other = (p + b for p, b in zip(multiply(mlp.weight1[:, h], block), mlp.bias1[:, h], strict=True))
        one, other = multiply(mlp.weight2[:, h], (one * (one > 0), other * (other > 0)))
        out.append((one + mlp.bias2[0, h], other + mlp.bias2[1, h]))
    return torch.cat([p[0] for p in out]), torch.cat([p[1] for p in out])


def shrink(z: Tensor) -> Tensor:
    """Towards zero by 0.01, and no further."""
    return torch.sign(z) * torch.where(z.abs() > 0.01, z.abs() - 0.01, 0 * z)


@reference
def afno(mixer: Any, x: Tensor, real: Tensor) -> Tensor:
    """Spectrum of V x, frequency by frequency through the MLP and the shrinkage, and back."""
    grid = mixer.spectrum.grid
    scale = math.sqrt(grid[0] * grid[1])
    values = [affine(mixer.value, v) for v in x[len(x) - grid[0] * grid[1] :]]
    spectrum = {}
    for mode in modes(grid):
        z = (torch.zeros_like(values[0]), torch.zeros_like(values[0]))
        for cell, v in zip(cells(grid), values, strict=True):
            angle = turns(mode, cell, grid)
            z = (z[0] + v * math.cos(angle) / scale, z[1] - v * math.sin(angle) / scale)
        one, other = block_mlp(mixer.mlp, z)
        spectrum[mode] = (shrink(one), shrink(other))
    mixed = []
    for cell in cells(grid):
        total = torch.zeros_like(values[0])
        for mode, z in spectrum.items():
            angle = turns(mode, cell, grid)
            total = total + times(mode, grid) * (z[0] * math.cos(angle) - z[1] * math.sin(angle)) / scale
        mixed.append(total)
    return read_grid(mixer, mixed, x)
