"""Mixing in the spectrum: by the Fourier transform itself, or by what is done to its coefficients.

On a grid the discrete Fourier transform is two matrix products, real throughout: below some 128 rows or columns that
is as fast as an FFT or faster, and it goes through any exporter. Complex numbers are pairs, (real, imaginary), on an
axis of their own.

Shapes: B batch, N tokens, D model width, H heads, R head width of the mixer, C = H * R channels of the mixer;
P prefix tokens, rows * columns cells of the grid, M = columns // 2 + 1 modes of a real row.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixerzoo import AttentionView, Caps, MixerSpec
from mixerzoo_mixers._grid import grid_readout, inherit_prefix, need_grid, read_grid
from mixerzoo_mixers._parts import (
    Constants,
    at_least_float,
    check_tokens,
    compact,
    expand,
    head_width,
    inherit_values,
    split_heads,
    zero_padding,
)

LONGEST = 128  # side of a grid up to which matrix products are used


def angles(size: int) -> Tensor:
    """Return 2 pi j k / size for all j, k < size, in float64, reduced to one turn before anything is rounded."""
    index = torch.arange(size)
    return 2 * math.pi / size * (torch.outer(index, index) % size).double()


def half(size: int) -> Tensor:
    """Return (2 M, size): from real numbers to their M modes, real parts before imaginary ones; orthonormal."""
    turns = angles(size)[: size // 2 + 1]
    return torch.cat((turns.cos(), -turns.sin())) / math.sqrt(size)


def grid_matrices(rows: int, columns: int) -> dict[str, Tensor]:
    """Return the matrices of `Spectrum` and its inverse."""
    turns = angles(rows)
    cos, sin = turns.cos(), turns.sin()
    # From (row, part) to (part, mode), part being real or imaginary.
    both = torch.stack((torch.stack((cos, sin), dim=-1), torch.stack((-sin, cos), dim=-1)))
    into = half(columns)
    # The modes that are left out are conjugates of others: those count twice.
    counts = torch.full((columns // 2 + 1,), 2.0, dtype=torch.double)
    counts[0] = 1
    if columns % 2 == 0:
        counts[-1] = 1
    return {
        "columns_in": into,
        "rows_in": both.reshape(2 * rows, 2 * rows) / math.sqrt(rows),
        "rows_out": both.reshape(2 * rows, 2 * rows).T.contiguous() / math.sqrt(rows),
        "columns_out": into.T * counts.repeat(2),
    }


class Spectrum(nn.Module):
    """Orthonormal 2D Fourier transform of a real grid: (B, rows * columns, C) -> (B, 2, rows, M, C), and back.

    `inverse` takes any coefficients; like torch.fft.irfft2 it drops what no real grid has.
    """

    def __init__(self, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        self.modes = grid[1] // 2 + 1
        self.dft = Constants(partial(grid_matrices, *grid)) if max(grid) <= LONGEST else None

    def forward(self, x: Tensor) -> Tensor:
        """Transform x, in float32 at least."""
        batch, _, channels = x.shape
        rows, columns = self.grid
        x = at_least_float(x).reshape(batch, rows, columns, channels)
        if self.dft is None:
            return torch.view_as_real(torch.fft.rfft2(x, dim=(1, 2), norm="ortho")).movedim(-1, 1)
        y = (self.dft["columns_in"] @ x).view(batch, 2 * rows, self.modes * channels)
        return (self.dft["rows_in"] @ y).view(batch, 2, rows, self.modes, channels)

    def inverse(self, y: Tensor) -> Tensor:
        """Undo `forward`."""
        batch, _, rows, modes, channels = y.shape
        if self.dft is None:
            pairs = torch.view_as_complex(y.movedim(1, -1).contiguous())
            x: Tensor = torch.fft.irfft2(pairs, s=self.grid, dim=(1, 2), norm="ortho")
        else:
            y = self.dft["rows_out"] @ y.reshape(batch, 2 * rows, modes * channels)
            x = self.dft["columns_out"] @ y.view(batch, rows, 2 * modes, channels)
        return x.flatten(1, 2)


class BlockMlp(nn.Module):
    """Complex MLP, a block a head: z -> relu(z W_1 + b_1) W_2 + b_2, the ReLU on both parts separately.

    (H, ..., 2 R) -> (H, ..., 2 R), real parts before imaginary ones. W is (2, H, R, R), b is (2, H, R), the parts
    along the first axis.
    """

    def __init__(self, heads: int, rank: int) -> None:
        super().__init__()
        self.weight1 = nn.Parameter(torch.randn(2, heads, rank, rank) * rank**-0.5)
        self.bias1 = nn.Parameter(torch.randn(2, heads, rank) * 0.02)
        self.weight2 = nn.Parameter(torch.randn(2, heads, rank, rank) * (2 * rank) ** -0.5)
        self.bias2 = nn.Parameter(torch.randn(2, heads, rank) * 0.02)

    def forward(self, z: Tensor) -> Tensor:
        """Map z, in float32 at least."""
        shape = z.shape
        z = z.reshape(shape[0], -1, shape[-1])
        hidden = F.relu(self._affine(z, self.weight1, self.bias1))
        return self._affine(hidden, self.weight2, self.bias2).view(shape)

    @staticmethod
    def _affine(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        # One real product for the four: [re, im] [[W_re, W_im], [-W_im, W_re]].
        real, imag = at_least_float(weight).unbind()
        matrix = torch.cat((torch.cat((real, imag), dim=-1), torch.cat((-imag, real), dim=-1)), dim=1)
        return torch.baddbmm(at_least_float(bias).transpose(0, 1).flatten(1).unsqueeze(1), z, matrix)


def inherit_beside(view: AttentionView, value: nn.Linear, heads: int, readout: nn.Linear) -> None:
    """Start as the teacher with every token seeing only itself, for mixing that no attention map looks like.

    The values span what the teacher's do; what is mixed of them comes in faintly, so that it can be learnt.
    """
    channels, dim = value.out_features, value.in_features
    fresh = readout.weight[:, :channels].clone()
    inherit_values(view, split_heads(value.weight, heads, 0), readout)
    readout.weight[:, :channels] = 0.1 * fresh
    readout.weight[:, channels : channels + dim] = view.out_weight @ view.v_weight


# -- fnet --


def fnet_matrices(channels: int) -> dict[str, Tensor]:
    """Return (C, 2 M), the transform of the channels up to mode M - 1: cosines before sines."""
    cos, minus_sin = half(channels).chunk(2)
    return {"channels": torch.cat((cos, -minus_sin)).T.contiguous()}


def fourier(v: Tensor, channels: Tensor) -> Tensor:
    """Return Re FFT_N(FFT_C(v)) for v (B, N, C) by matrix products, quadratic in N."""
    cos, sin = (v @ channels).chunk(2, dim=-1)
    index = torch.arange(v.shape[1], device=v.device)
    # A tensor, since torch.onnx cannot take the remainder by a size.
    tokens = torch.ones_like(index).sum()
    turns = (torch.outer(index, index) % tokens).to(v.dtype) / tokens * (2 * math.pi)
    scale = tokens.to(v.dtype).rsqrt()
    cos, sin = (turns.cos() * scale) @ cos, (turns.sin() * scale) @ sin
    # Cosines are even in the channel's mode and sines odd: the upper half is the lower one, reversed.
    upper = (cos + sin)[..., 1 : (v.shape[2] + 1) // 2].flip(-1)
    return torch.cat((cos - sin, upper), dim=-1)


def fourier_of_each(v: Tensor, lengths: Tensor) -> Tensor:
    """Return Re FFT_N(FFT_C(v)) with each sample's own N, lengths (B,), zeros behind; beyond it anything.

    By Bluestein's identity, n k = (n^2 + k^2 - (k - n)^2) / 2, as one convolution for lengths of any kind.
    """
    _, tokens, channels = v.shape
    size = 1 << (2 * tokens - 1).bit_length()
    lag = torch.arange(size, device=v.device)
    lag = torch.minimum(lag, size - lag)
    counts = lengths.clamp(min=1).unsqueeze(-1)
    turns = (lag * lag % (2 * counts)).to(v.dtype) / counts * math.pi  # (B, size)
    chirp = torch.polar(torch.ones_like(turns), turns).unsqueeze(-1)
    back = chirp[:, :tokens].conj()
    spectrum = torch.fft.fft(torch.fft.fft(v, dim=2) * back, n=size, dim=1) * torch.fft.fft(chirp, dim=1)
    y: Tensor = (torch.fft.ifft(spectrum, dim=1)[:, :tokens] * back).real
    return y * (counts * channels).to(v.dtype).rsqrt().unsqueeze(-1)


class FNet(nn.Module):
    """Fourier mixing: y_n = W [(Re FFT_N FFT_C (V x))_n; x_n] + b, both orthonormal. (B, N, D) -> (B, N, D).

    V is (C, D). FNet transforms x itself and has no V: here its rank is the width. The scale 1 / sqrt(N C) is what
    keeps the output's size, whatever the length. Padding is left out, as if the tokens stood next to each other.
    """

    def __init__(self, dim: int, heads: int, width: float) -> None:
        super().__init__()
        channels = heads * head_width(dim, heads, width)
        self.heads = heads
        self.value = nn.Linear(dim, channels, bias=False)
        self.dft = Constants(partial(fnet_matrices, channels))
        self.readout = nn.Linear(channels + dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mix x (B, N, D); where mask (B, N) is False, a token does not count."""
        x = zero_padding(x, mask)
        v = at_least_float(self.value(x))
        if mask is not None:
            v, kept, places = compact(v, mask)
            mixed = expand(fourier_of_each(v, kept.sum(dim=1)), places)
        elif (
            torch.compiler.is_exporting()
        ):  # ONNX Runtime takes ten times as long for an FFT as for the products
            mixed = fourier(v, self.dft["channels"])
        else:
            mixed = torch.fft.fft2(v, dim=(1, 2), norm="ortho").real
        y: Tensor = self.readout(torch.cat((mixed.to(x.dtype), x), dim=-1))
        return y


def inherit_fnet(mixer: FNet, view: AttentionView) -> None:
    """Start with the teacher's values; see `inherit_beside`."""
    inherit_beside(view, mixer.value, mixer.heads, mixer.readout)


# -- global_filter --


class GlobalFilter(nn.Module):
    """A filter a channel over the whole grid: y = W [F^-1(K * F(V x)); x] + b. (B, N, D) -> (B, N, D).

    F is the orthonormal 2D transform, K its learnt complex gains (2, rows, M, C), the parts along the first axis: a
    circular convolution with a kernel as large as the grid. V is (C, D). GFNet filters x itself and has no V.
    Prefix tokens: see `read_grid`.
    """

    def __init__(
        self, dim: int, heads: int, tokens: int, width: float, prefix: int, grid: tuple[int, int] | None
    ) -> None:
        super().__init__()
        self.grid = need_grid("global_filter", grid)
        self.heads, self.tokens, self.prefix = heads, tokens, prefix
        channels = heads * head_width(dim, heads, width)
        self.value = nn.Linear(dim, channels, bias=False)
        self.spectrum = Spectrum(self.grid)
        # A gain of 1 on average.
        self.filter = nn.Parameter(torch.randn(2, self.grid[0], self.spectrum.modes, channels) * 0.5**0.5)
        self.readout = grid_readout(channels, dim, prefix)

    def forward(self, x: Tensor) -> Tensor:
        """Mix x (B, N, D)."""
        check_tokens(x, self.tokens)
        real, imag = self.spectrum(self.value(x[:, self.prefix :])).unbind(1)
        gain_real, gain_imag = at_least_float(self.filter).unbind()
        y = torch.stack((real * gain_real - imag * gain_imag, real * gain_imag + imag * gain_real), dim=1)
        return read_grid(self.readout, self.spectrum.inverse(y).to(x.dtype), x)


def circulant(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the kernels (H, rows, columns) of the circular convolutions nearest to maps (H, cells, cells).

    kernel[i, j] is the mean over all pairs of cells that are (i, j) apart, around the edges.
    """
    rows, columns = grid
    cell = torch.arange(rows * columns, device=maps.device)
    row, column = cell // columns, cell % columns
    apart = (row[:, None] - row) % rows * columns + (column[:, None] - column) % columns
    sums = maps.new_zeros(maps.shape[0], rows * columns)
    sums.index_add_(1, apart.flatten(), maps.flatten(1))
    return (sums / (rows * columns)).view(-1, rows, columns)


def inherit_global_filter(mixer: GlobalFilter, view: AttentionView) -> None:
    """Start as attention with the mean map, made circulant; see `inherit_values` for widths below 1."""
    maps = view.mean_attention[:, mixer.prefix :, mixer.prefix :]
    kernels = circulant(at_least_float(maps), mixer.grid)
    gains = torch.view_as_real(torch.fft.rfft2(kernels)).permute(3, 1, 2, 0)  # (2, rows, M, H)
    mixer.filter.copy_(gains.repeat_interleave(mixer.value.out_features // mixer.heads, dim=-1))
    inherit_values(view, split_heads(mixer.value.weight, mixer.heads, 0), mixer.readout)
    inherit_prefix(view, mixer.readout, mixer.prefix)


# -- afno --


class Afno(nn.Module):
    """Adaptive Fourier mixing: y = W [F^-1(shrink(MLP(F(V x)))); x] + b. (B, N, D) -> (B, N, D).

    F is the orthonormal 2D transform; the MLP is the same for all frequencies, block-diagonal and complex (see
    `BlockMlp`), a block a head; shrink(z) moves real and imaginary parts towards 0 by 0.01, and stops there. V is
    (C, D). The paper adds the input to the result, which the readout's x makes superfluous, and can drop high
    frequencies, which it does not do by default (and its code along the columns only): none are dropped here.
    Prefix tokens: see `read_grid`.
    """

    def __init__(
        self, dim: int, heads: int, tokens: int, width: float, prefix: int, grid: tuple[int, int] | None
    ) -> None:
        super().__init__()
        self.heads, self.tokens, self.prefix = heads, tokens, prefix
        rank = head_width(dim, heads, width)
        self.value = nn.Linear(dim, heads * rank, bias=False)
        self.spectrum = Spectrum(need_grid("afno", grid))
        self.mlp = BlockMlp(heads, rank)
        self.readout = grid_readout(heads * rank, dim, prefix)

    def forward(self, x: Tensor) -> Tensor:
        """Mix x (B, N, D)."""
        check_tokens(x, self.tokens)
        z = split_heads(self.spectrum(self.value(x[:, self.prefix :])), self.heads)  # (B, 2, rows, M, H, R)
        z = z.permute(4, 0, 2, 3, 1, 5)
        y = F.softshrink(self.mlp(z.flatten(-2)), 0.01).view(z.shape)
        mixed = self.spectrum.inverse(y.permute(1, 4, 2, 3, 0, 5).flatten(-2))
        return read_grid(self.readout, mixed.to(x.dtype), x)


def inherit_afno(mixer: Afno, view: AttentionView) -> None:
    """Start with the teacher's values; see `inherit_beside`."""
    inherit_beside(view, mixer.value, mixer.heads, mixer.readout)


FNET = MixerSpec(
    name="fnet",
    build=FNet,
    summary="the Fourier transform over tokens and channels, and the token itself",
    widths=(0.25, 0.5, 1.0),
    caps=Caps(any_length=True, masks=True, exportable=True),
    inherit=inherit_fnet,
    readout="readout",
    cost="N D^2 + N D log N",
    paper="FNet, arXiv 2105.03824",
    letter="Fn",
)

GLOBAL_FILTER = MixerSpec(
    name="global_filter",
    build=GlobalFilter,
    summary="a learnt filter a channel over the whole grid, in the spectrum, and the token itself",
    widths=(0.25, 0.5, 1.0),
    caps=Caps(exportable=True),
    inherit=inherit_global_filter,
    readout="readout",
    cost="N D^2 + N D log N",
    paper="GFNet, arXiv 2107.00645",
    letter="Gf",
)

AFNO = MixerSpec(
    name="afno",
    build=Afno,
    summary="a small complex MLP for every frequency of the grid, and the token itself",
    widths=(0.25, 0.5, 1.0),
    caps=Caps(exportable=True),
    inherit=inherit_afno,
    readout="readout",
    cost="N D^2 + N D K + N D log N",
    paper="AFNO, arXiv 2111.13587",
    letter="Af",
)
