"""Linear attention with convolutions beside it, which see what it is bad at: the neighbours on the grid.

Prefix tokens take part in the attention as all others do; the convolutions leave them out. The papers' batch
normalisations are left out: they tie the samples of a batch together in training, and are folded into the layers
beside them at inference anyway.

Shapes: B batch, N = P + rows * columns tokens, D model width, H heads, R head width of the mixer, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixerzoo import AttentionView, Caps, MixerSpec
from mixerzoo_mixers._grid import from_grid, need_grid, to_grid
from mixerzoo_mixers._parts import at_least_float, check_tokens, head_width, inherit_qkv, split_heads
from mixerzoo_mixers.linear import attend, sums

TINY = 1e-6
LEAST = 100.0
SMALL = 0.1


def depthwise(channels: int, size: int, bias: bool = True) -> nn.Conv2d:
    """Return a convolution of each channel alone, that keeps the size of the picture."""
    return nn.Conv2d(channels, channels, size, padding=size // 2, groups=channels, bias=bias)


def add_to_grid(x: Tensor, cells: Tensor) -> Tensor:
    """Add cells (B, rows * columns, C) to the tokens of x (B, N, C) that are not prefix."""
    prefix = x.shape[1] - cells.shape[1]
    return x + (F.pad(cells, (0, 0, prefix, 0)) if prefix else cells)


def local_excess(maps: Tensor, grid: tuple[int, int], size: int) -> Tensor:
    """By how much more than 1 / N maps (H, N, N) attend to the cell at each offset: (H, size, size).

    It is the mean over the cells that have such a neighbour, as a kernel for a convolution, and what a map that
    tells no tokens apart lacks.
    """
    rows, columns = grid
    cells = maps[:, -rows * columns :, -rows * columns :].unflatten(1, grid).unflatten(3, grid)
    kernel = maps.new_zeros(len(maps), size, size)
    for i in range(size):
        for j in range(size):
            down, right = i - size // 2, j - size // 2
            if abs(down) < rows and abs(right) < columns:
                pairs = cells.diagonal(down, 1, 3).diagonal(right, 1, 2)
                kernel[:, i, j] = pairs.mean(dim=(1, 2)) - 1 / maps.shape[1]
    return kernel


class QkvOnGrid(nn.Module):
    """The layers that the three have in common: q, k and v in one, and a readout of `scales` mixed vectors and x."""

    def __init__(
        self,
        mixer: str,
        dim: int,
        heads: int,
        tokens: int,
        width: float,
        grid: tuple[int, int] | None,
        scales: int = 1,
    ) -> None:
        super().__init__()
        self.heads, self.tokens, self.grid = heads, tokens, need_grid(mixer, grid)
        self.channels = heads * head_width(dim, heads, width)
        self.qkv = nn.Linear(dim, 3 * self.channels)
        self.readout = nn.Linear(scales * self.channels + dim, dim)

    def by_head(self, x: Tensor) -> Tensor:
        """View (B, N, H * R) as (B, H, N, R), in float32 at least."""
        return split_heads(at_least_float(x), self.heads).transpose(1, 2)


class FocusedLinear(QkvOnGrid):
    """Focused linear attention (FLatten): a_n = sum_m f(q_n).f(k_m) v_m / (sum_m f(q_n).f(k_m) + 1e-6) a head.

    f(u) = |u'| u'^3 / |u'^3|, u' = relu(u) + 1e-6, the norms over all heads; y_n = W [a_hn + (c * v)_hn for all h;
    x_n] + b, with a 5 x 5 convolution c of each channel. (B, N, D) -> (B, N, D).

    Differs from the paper: no positions are added to k, the teacher's tokens have theirs; q and k are not divided
    by a learnt scale a channel, which is one of rows of their projections; c is of H * R channels, not one for all
    heads.
    """

    def __init__(self, dim: int, heads: int, tokens: int, width: float, grid: tuple[int, int] | None) -> None:
        super().__init__("focused_linear", dim, heads, tokens, width, grid)
        self.local = depthwise(self.channels, 5)

    @staticmethod
    def features(u: Tensor) -> Tensor:
        """Return f of u (B, N, ..., H * R)."""
        u = at_least_float(u).relu() + TINY
        cube = u * u * u
        size, cubed = (torch.linalg.vector_norm(t, dim=-1, keepdim=True) for t in (u, cube))
        focused: Tensor = cube * (size / cubed)
        return focused

    def forward(self, x: Tensor) -> Tensor:
        """Mix x (B, N, D)."""
        check_tokens(x, self.tokens)
        qk, v = self.qkv(x).tensor_split((2 * self.channels,), dim=-1)
        q, k = self.features(split_heads(qk, 2)).unbind(dim=2)
        a = attend(self.by_head(q), self.by_head(k), self.by_head(v))
        local = from_grid(self.local(to_grid(v, self.grid)))
        mixed = add_to_grid(a.transpose(1, 2).flatten(2).to(x.dtype), local)
        y: Tensor = self.readout(torch.cat((mixed, x), dim=-1))
        return y


def inherit_focused(mixer: FocusedLinear, view: AttentionView) -> None:
    """Start with the teacher's projections, and the local part of its mean attention as the convolution."""
    inherit_qkv(view, mixer.qkv, mixer.readout, mixer.heads)
    kernel = local_excess(view.mean_attention, mixer.grid, 5)
    split_heads(mixer.local.weight, mixer.heads, 0).copy_(kernel[:, None, None])
    assert mixer.local.bias is not None
    mixer.local.bias.zero_()


class LiteMla(QkvOnGrid):
    """Multi-scale ReLU linear attention (EfficientViT): a_n = sum_m r(q_n).r(k_m) v_m / (sum_m r(q_n).r(k_m) + 1e-6).

    That is r = relu, a head and scale s: y_n = W [a_shn for all s, h; x_n] + b. The first scale has q, k, v as they
    are. The second has them through a 5 x 5 convolution of each channel and an (R, R) matrix for each of q, k and v
    of each head. (B, N, D) -> (B, N, D). Prefix tokens go through the matrices only.

    Differs from the paper: no batch normalisation after W; head width and number of heads are the teacher's, not
    8 and D / 8; eps is 1e-6, not 1e-5 or less.
    """

    def __init__(self, dim: int, heads: int, tokens: int, width: float, grid: tuple[int, int] | None) -> None:
        super().__init__("lite_mla", dim, heads, tokens, width, grid, scales=2)
        rank = self.channels // heads
        self.near = depthwise(3 * self.channels, 5, bias=False)
        self.blend = nn.Parameter(torch.empty(3 * heads, rank, rank).uniform_(-(rank**-0.5), rank**-0.5))

    def forward(self, x: Tensor) -> Tensor:
        """Mix x (B, N, D)."""
        check_tokens(x, self.tokens)
        qkv = self.qkv(x)
        near = from_grid(self.near(to_grid(qkv, self.grid)))
        prefix = self.tokens - near.shape[1]
        if prefix:
            near = torch.cat((qkv[:, :prefix], near), dim=1)
        fine, coarse = (split_heads(t, 3 * self.heads).transpose(1, 2) for t in (qkv, near))
        mixed = [
            attend(q.relu(), k.relu(), v).transpose(1, 2).flatten(2).to(x.dtype)
            for q, k, v in (at_least_float(t).chunk(3, dim=1) for t in (fine, coarse @ self.blend.mT))
        ]
        y: Tensor = self.readout(torch.cat((*mixed, x), dim=-1))
        return y


def inherit_lite(mixer: LiteMla, view: AttentionView) -> None:
    """Start with the teacher's projections on both scales, half of the output each; the second one is blurred."""
    inherit_qkv(view, mixer.qkv, mixer.readout, mixer.heads)
    fine, coarse = mixer.readout.weight[:, : 2 * mixer.channels].chunk(2, dim=1)
    fine *= 0.5
    coarse.copy_(fine)
    row = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    mixer.near.weight.copy_(row[:, None] * row)
    mixer.blend.copy_(torch.eye(mixer.blend.shape[-1]))


class L2Linear(QkvOnGrid):
    """Linear global attention and local concentration (L2ViT). (B, N, D) -> (B, N, D).

    a_n = t_h sum_m r(q_n).r(k_m) v_m / max(sum_m r(q_n).r(k_m), 100) a head, r = relu, with a learnt temperature t;
    y_n = W [a_hn + c_hn for all h; x_n] + b, c = K2 * gelu(K1 * (a + v)) with 7 x 7 convolutions of each channel.

    Differs from the paper: the local part is inside the mixer, where a + v stands for the stream that the paper's
    has after attention, so that there are no normalisations before it or (batch) between its convolutions.
    """

    def __init__(self, dim: int, heads: int, tokens: int, width: float, grid: tuple[int, int] | None) -> None:
        super().__init__("l2_linear", dim, heads, tokens, width, grid)
        self.temperature = nn.Parameter(torch.full((heads,), (self.channels // heads) ** -0.5))
        self.local = nn.Sequential(depthwise(self.channels, 7), nn.GELU(), depthwise(self.channels, 7))

    def forward(self, x: Tensor) -> Tensor:
        """Mix x (B, N, D)."""
        check_tokens(x, self.tokens)
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        mixed, norm = sums(self.by_head(q.relu()), self.by_head(k.relu()), self.by_head(v))
        a = mixed * (self.temperature[:, None, None] / norm.clamp(min=LEAST))
        a = a.transpose(1, 2).flatten(2).to(x.dtype)
        local = from_grid(self.local(to_grid(a + v, self.grid)))
        y: Tensor = self.readout(torch.cat((add_to_grid(a, local), x), dim=-1))
        return y


def inherit_l2(mixer: L2Linear, view: AttentionView) -> None:
    """Start with the teacher's projections, t = 1, and the local part of its mean attention as the second kernel.

    The first one makes its input small: gelu(e u) is e u / 2 for small e, and the second one makes up for that.
    """
    inherit_qkv(view, mixer.qkv, mixer.readout, mixer.heads)
    mixer.temperature.fill_(1)
    first, _, second = mixer.local
    assert isinstance(first, nn.Conv2d)
    assert isinstance(second, nn.Conv2d)
    assert first.bias is not None
    assert second.bias is not None
    first.weight.zero_()
    first.weight[:, :, 3, 3] = SMALL
    kernel = local_excess(view.mean_attention, mixer.grid, 7) * (2 / SMALL)
    split_heads(second.weight, mixer.heads, 0).copy_(kernel[:, None, None])
    first.bias.zero_()
    second.bias.zero_()


FOCUSED_LINEAR = MixerSpec(
    name="focused_linear",
    build=FocusedLinear,
    summary="linear attention with focused features, a convolution of the values, and the token itself",
    widths=(0.5, 1.0),
    caps=Caps(exportable=True),
    inherit=inherit_focused,
    readout="readout",
    cost="N D^2 + N D K",
    paper="FLatten, arXiv 2308.00442",
    letter="Kf",
)

LITE_MLA = MixerSpec(
    name="lite_mla",
    build=LiteMla,
    summary="linear attention (ReLU) on two scales, and the token itself",
    widths=(0.25, 0.5, 1.0),
    caps=Caps(exportable=True),
    inherit=inherit_lite,
    readout="readout",
    cost="N D^2 + N D K",
    paper="EfficientViT, arXiv 2205.14756",
    letter="Km",
)

L2_LINEAR = MixerSpec(
    name="l2_linear",
    build=L2Linear,
    summary="linear attention (ReLU) with a temperature, convolutions over it, and the token itself",
    widths=(0.5, 1.0),
    caps=Caps(exportable=True),
    inherit=inherit_l2,
    readout="readout",
    cost="N D^2 + N D K",
    paper="L2ViT, arXiv 2501.16182",
    letter="Kl",
)
