"""A polynomial of the tokens in place of attention.

Shapes: B batch, N tokens, D model width, H heads, R head width of the mixer, E = H * R channels, P prefix tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixerzoo import AttentionView, Caps, MixerSpec
from mixerzoo_mixers._grid import from_grid, grid_readout, inherit_prefix, read_grid, to_grid
from mixerzoo_mixers._parts import check_tokens, head_width, inherit_values, split_heads

DEGREE = 3
REACH = 3  # cells each way on the grid
REACH_IN_ROW = 7  # tokens each way along a sequence; twice as many back if causal

# With this many channels or fewer, beside each other in memory, and filters of one row, oneDNN does not come back from
# a convolution in bfloat16 on a CPU.
FEW = 16


class Polynomial(nn.Module):
    """A polynomial of degree 3, by products of convolutions, linear in N. (B, N, D) -> (B, N, D).

    Y_i = A_i X B_i + c_i for i = 1, 2, 3; Z_1 = Y_1, Z_(i+1) = (C_i Z_i D_i) * Y_(i+1);
    y_n = W [Z_1; Z_2; Z_3; x]_n + b on the grid, with the rule for prefix tokens of `read_grid`.

    A_i and C_i are depthwise convolutions of the grid with zeros around it, 7 x 7 where it is large enough; of the
    sequence, 15 tokens, where there is no grid; of a token and the 14 before it if causal. B_i (D, E) and D_i (E, E)
    map channels. c_i (E,) starts at 0, 1, 1, so that the lower degrees are part of the higher ones.
    The paper leaves the structure of A, B, C and D open; its c is 0.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        tokens: int,
        width: float,
        prefix: int,
        grid: tuple[int, int] | None,
        causal: bool,
    ) -> None:
        super().__init__()
        row = causal or grid is None
        self.heads, self.tokens, self.causal = heads, tokens, causal
        self.grid = (1, tokens) if grid is None or row else grid
        self.prefix = 0 if row else prefix
        reach = REACH_IN_ROW if 1 in self.grid else REACH
        down, right = (min(reach * (2 if causal else 1), size - 1) for size in self.grid)
        size = (1, right + 1) if causal else (2 * down + 1, 2 * right + 1)
        self.past = right if causal else 0
        padding = (0, 0) if causal else (down, right)
        channels = heads * head_width(dim, heads, width)
        every = DEGREE * channels
        self.factors = nn.Linear(dim, every, bias=False)  # the B_i, one after the other
        self.spread = nn.Conv2d(every, every, size, padding=padding, groups=every)  # the A_i and c_i
        self.maps = nn.ModuleList(nn.Linear(channels, channels, bias=False) for _ in range(DEGREE - 1))
        self.filters = nn.ModuleList(
            nn.Conv2d(channels, channels, size, padding=padding, groups=channels, bias=False)
            for _ in range(DEGREE - 1)
        )
        self.readout = grid_readout(every, dim, self.prefix)
        assert self.spread.bias is not None
        with torch.no_grad():
            self.spread.bias.fill_(1)[:channels] = 0

    def forward(self, x: Tensor) -> Tensor:
        """Mix x (B, N, D)."""
        check_tokens(x, self.tokens)
        factors = self._convolve(self.spread, self.factors(x)).chunk(DEGREE, dim=-1)
        powers = [factors[0]]
        for channels, filters, factor in zip(self.maps, self.filters, factors[1:], strict=True):
            powers.append(self._convolve(filters, channels(powers[-1])) * factor)
        return read_grid(self.readout, torch.cat(powers, dim=-1), x)

    def _convolve(self, layer: nn.Module, x: Tensor) -> Tensor:
        picture = to_grid(x, self.grid)
        if x.shape[2] <= FEW:
            picture = picture.contiguous()
        if self.past:
            picture = F.pad(picture, (self.past, 0, 0, 0))
        return from_grid(layer(picture))


def near(attention: Tensor, grid: tuple[int, int], size: tuple[int, int], causal: bool) -> Tensor:
    """Return the mean of attention (H, n, n) over all pairs of cells at each offset of a filter, (H, *size)."""
    maps = attention.unflatten(2, grid).unflatten(1, grid)
    middle = (0, size[1] - 1) if causal else (size[0] // 2, size[1] // 2)
    means = torch.zeros(len(maps), *size, dtype=maps.dtype, device=maps.device)
    for i in range(size[0]):
        for j in range(size[1]):
            down, right = i - middle[0], j - middle[1]
            pairs = maps.diagonal(down, 1, 3).diagonal(right, 1, 2)
            means[:, i, j] = pairs.mean(dim=(1, 2))
    return means


def inherit_polynomial(mixer: Polynomial, view: AttentionView) -> None:
    """Start Z_1 as the teacher's attention with its mean map, as far as the filters reach, with values and output.

    Z_(i+1) starts as Z_i * Y_(i+1), and is read out a little and at random: were that zero, nothing before it would
    be learnt.
    """
    readout, spread = mixer.readout, mixer.spread.weight
    channels = mixer.factors.out_features // DEGREE
    higher = readout.weight[:, channels : DEGREE * channels] / 10
    inherit_values(view, split_heads(mixer.factors.weight[:channels], mixer.heads, 0), readout)
    inherit_prefix(view, readout, mixer.prefix)
    readout.weight[:, channels : DEGREE * channels] = higher
    size = (spread.shape[2], spread.shape[3])
    means = near(view.mean_attention[:, mixer.prefix :, mixer.prefix :], mixer.grid, size, mixer.causal)
    spread[:channels, 0] = means.repeat_interleave(channels // mixer.heads, dim=0)
    for layer, filters in zip(mixer.maps, mixer.filters, strict=True):
        assert isinstance(layer, nn.Linear)
        assert isinstance(filters, nn.Conv2d)
        nn.init.eye_(layer.weight)
        filters.weight.zero_()
        filters.weight[:, 0, size[0] // 2, size[1] - 1 if mixer.causal else size[1] // 2] = 1


POLYNOMIAL = MixerSpec(
    name="polynomial",
    build=Polynomial,
    summary="a polynomial of degree 3, by products of convolutions, and the token itself",
    widths=(0.25, 0.5, 1.0),
    caps=Caps(causal=True, exportable=True),
    inherit=inherit_polynomial,
    readout="readout",
    cost="N D^2",
    paper="PADRe, arXiv 2407.11306",
    letter="Po",
)
