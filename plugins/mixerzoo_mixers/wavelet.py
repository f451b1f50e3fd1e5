"""Mixing in a wavelet transform: the first level of the dual-tree complex one, both ways as matrix products.

At this level nothing is thrown away: each axis is filtered once low and once high at full resolution, and the bands
that are high along some axis become complex numbers, two for every square of 2 x 2 cells.

Shapes: B batch, N tokens, D model width, H heads, R head width of the mixer, C = H * R channels of the mixer;
a grid of rows * columns cells, both rounded up to even numbers in the transform, E and F.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from mixerzoo import AttentionView, Caps, MixerSpec, MixerzooError
from mixerzoo_mixers._grid import grid_readout, inherit_prefix, need_grid, read_grid
from mixerzoo_mixers._parts import (
    Constants,
    at_least_float,
    check_tokens,
    head_width,
    inherit_values,
    split_heads,
)
from mixerzoo_mixers.spectral import BlockMlp

# Kingsbury's near-symmetric filters of 13 and 19 taps ("near_sym_b"), exactly: low-pass for analysis and for
# synthesis, from the middle tap outwards.
ANALYSIS = [t / 5120 for t in (2844, 1520, -247, -240, 114, 0, -9)]
SYNTHESIS = [t / 1146880 for t in (641600, 343786, -59280, -63816, 27360, 8208, -2160, -1539, 0, 81)]

LONGEST = 1024  # side of a grid


def band(taps: list[float], high: bool, size: int) -> Tensor:
    """Return the filter over `size` (even) cells, mirrored at the edges, as a matrix (size, size) in float64.

    High-pass taps are those of the other filter's low-pass with every other sign changed.
    """
    matrix = torch.zeros(size, size, dtype=torch.double)
    place = torch.arange(size)
    for lag in range(1 - len(taps), len(taps)):
        tap = taps[abs(lag)] * ((-1) ** lag if high else 1)
        seen = (place + lag) % (2 * size)
        seen = torch.minimum(seen, 2 * size - 1 - seen)  # ... c b a | a b c ... x y z | z y x ...
        matrix.index_put_((place, seen), torch.tensor(tap, dtype=torch.double), accumulate=True)
    return matrix


def axis_matrices(size: int) -> tuple[Tensor, Tensor]:
    """Return analysis (2 E, size) and synthesis (size, 2 E) along one axis, the low band before the high one.

    The second undoes the first. An odd axis is lengthened by repeating its last cell, and cut again.
    """
    even = size + size % 2
    analysis = torch.cat((band(ANALYSIS, False, even), band(SYNTHESIS, True, even)))
    synthesis = torch.cat((band(SYNTHESIS, False, even), band(ANALYSIS, True, even)), dim=1)
    repeat = torch.eye(even, dtype=torch.double)[:, :size]
    repeat[-1, -1] = 1
    return analysis @ repeat, synthesis[:size]


def grid_matrices(rows: int, columns: int) -> dict[str, Tensor]:
    """Return the matrices of `Wavelets`."""
    (rows_in, rows_out), (columns_in, columns_out) = axis_matrices(rows), axis_matrices(columns)
    return {
        "rows_in": rows_in,
        "rows_out": rows_out,
        "columns_in": columns_in,
        "columns_out": columns_out,
    }


class Wavelets(nn.Module):
    """First level of the dual-tree complex wavelet transform, and its inverse.

    (B, rows * columns, C) -> low band (B, E, F, C), and 6 orientations of high ones, complex, a head
    (H, 3, B, E / 2, F / 2, 2, 2 R): 3 pairs of orientations, then the two of a pair, real parts before imaginary.
    """

    def __init__(self, grid: tuple[int, int], heads: int) -> None:
        super().__init__()
        self.grid, self.heads = grid, heads
        self.size = tuple(side + side % 2 for side in grid)
        self.filters = Constants(partial(grid_matrices, *grid))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Analyse x, in float32 at least."""
        batch, _, channels = x.shape
        rows, columns = self.size
        y = self.filters["rows_in"] @ at_least_float(x).reshape(batch, self.grid[0], -1)
        y = self.filters["columns_in"] @ y.view(batch, 2 * rows, self.grid[1], channels)
        y = y.view(batch, 2, rows, 2, columns, channels)
        high = torch.stack((y[:, 1, :, 0], y[:, 0, :, 1], y[:, 1, :, 1]))
        high = high.view(3, batch, rows // 2, 2, columns // 2, 2, self.heads, -1).permute(
            6, 0, 1, 2, 4, 3, 5, 7
        )
        a, b, c, d = high.flatten(-3, -2).unbind(-2)  # the squares: a b above c d
        pairs = torch.stack((a - d, b + c, a + d, b - c), dim=-2) * 0.5**0.5
        return y[:, 0, :, 0], pairs.view(*pairs.shape[:-2], 2, -1)

    def inverse(self, low: Tensor, pairs: Tensor) -> Tensor:
        """Undo `forward`."""
        batch, rows, columns, channels = low.shape
        first, second, third, fourth = pairs.unflatten(-1, (2, -1)).flatten(-3, -2).unbind(-2)
        squares = (
            torch.stack((first + third, second + fourth, second - fourth, third - first), dim=-2) * 0.5**0.5
        )
        high = squares.unflatten(-2, (2, 2)).permute(1, 2, 3, 5, 4, 6, 0, 7).reshape(3, *low.shape)
        bands = torch.stack((low, high[1], high[0], high[2])).view(2, 2, *low.shape)
        y = bands.permute(2, 0, 3, 1, 4, 5).reshape(batch, 2 * rows, 2 * columns, channels)
        y = (self.filters["columns_out"] @ y).view(batch, 2 * rows, -1)
        y = self.filters["rows_out"] @ y
        return y.view(batch, -1, channels)


class Scattering(nn.Module):
    """Scattering: y = W [T^-1(L * low, MLP(high)); x] + b, (low, high) = T(V x). (B, N, D) -> (B, N, D).

    T is the first level of the dual-tree complex wavelet transform (see `Wavelets`), L learnt weights (E, F, C), the
    MLP block-diagonal and complex (see `BlockMlp`) and the same for all places and orientations. V is (C, D). SVT
    transforms x itself, without V, and has 4 blocks: here there is one a head. Odd grids are made even by repeating
    the last row or column. Prefix tokens: see `read_grid`.
    """

    def __init__(
        self, dim: int, heads: int, tokens: int, width: float, prefix: int, grid: tuple[int, int] | None
    ) -> None:
        super().__init__()
        self.heads, self.tokens, self.prefix = heads, tokens, prefix
        rank = head_width(dim, heads, width)
        self.value = nn.Linear(dim, heads * rank, bias=False)
        self.wavelets = Wavelets(_need_sides(need_grid("scattering", grid)), heads)
        self.low = nn.Parameter(torch.ones(*self.wavelets.size, heads * rank))
        self.mlp = BlockMlp(heads, rank)
        self.readout = grid_readout(heads * rank, dim, prefix)

    def forward(self, x: Tensor) -> Tensor:
        """Mix x (B, N, D)."""
        check_tokens(x, self.tokens)
        low, high = self.wavelets(self.value(x[:, self.prefix :]))
        mixed = self.wavelets.inverse(low * at_least_float(self.low), self.mlp(high))
        return read_grid(self.readout, mixed.to(x.dtype), x)


def _need_sides(grid: tuple[int, int]) -> tuple[int, int]:
    """Return the grid, unless the matrices of its longer side would be larger than what they filter."""
    if max(grid) > LONGEST:
        raise MixerzooError(
            f"mixer 'scattering' takes grids of up to {LONGEST} cells a side, this one has {grid[0]} x {grid[1]}"
        )
    return grid


def weights_for(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the L (E, F, H) whose low bands alone are nearest to maps (H, cells, cells), by least squares.

    With G and A the synthesis and analysis of the low band, G diag(L) A is linear in L, and the matrix of its
    normal equations, (G^T G) * (A A^T) entry by entry, falls apart into one for the rows and one for the columns.
    """
    sides = []
    for size in grid:
        analysis, synthesis = axis_matrices(size)
        even = len(analysis) // 2
        sides.append((synthesis[:, :even], analysis[:even]))
    (g, a), (u, c) = sides
    rows, columns = ((left.T @ left * (right @ right.T)) for left, right in sides)
    target = maps.double().cpu().unflatten(2, grid).unflatten(1, grid)
    # The diagonal of G^T maps A^T, one axis after the other.
    target = torch.einsum("hrsxy,ri->hisxy", target, g)
    target = torch.einsum("hisxy,ix->hisy", target, a)
    target = torch.einsum("hisy,sj->hijy", target, u)
    target = torch.einsum("hijy,jy->hij", target, c)
    # A side of one cell has two equal unknowns: the pseudo-inverse shares evenly.
    inverses = [torch.linalg.pinv(gram, hermitian=True) for gram in (rows, columns)]
    weights: Tensor = inverses[0] @ target @ inverses[1]
    return weights.permute(1, 2, 0).to(maps)


def inherit_scattering(mixer: Scattering, view: AttentionView) -> None:
    """Start with the low band's part of the mean map, the teacher's values, and the high bands faintly."""
    maps = view.mean_attention[:, mixer.prefix :, mixer.prefix :]
    rank = mixer.value.out_features // mixer.heads
    mixer.low.copy_(weights_for(maps, mixer.wavelets.grid).repeat_interleave(rank, dim=-1))
    mixer.mlp.weight2.mul_(0.1)
    inherit_values(view, split_heads(mixer.value.weight, mixer.heads, 0), mixer.readout)
    inherit_prefix(view, mixer.readout, mixer.prefix)


SCATTERING = MixerSpec(
    name="scattering",
    build=Scattering,
    summary="wavelet bands of the grid, the low one weighted and the high ones through a complex MLP, "
    "and the token itself",
    widths=(0.25, 0.5, 1.0),
    caps=Caps(exportable=True),
    inherit=inherit_scattering,
    readout="readout",
    cost="N D^2 + N D K",
    paper="SVT, arXiv 2311.01310",
    letter="Sc",
)
