"""Mixers that look around: sliding-window attention, and a depthwise convolution over the grid.

Shapes: B batch, N tokens, D model width, H heads, K the teacher's head width, R the mixer's head width, P prefix
tokens, C tokens in a block, G blocks, L keys of a block.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixerzoo import AttentionView, Caps, MixerSpec
from mixerzoo_mixers._grid import from_grid, grid_readout, need_grid, read_grid, to_grid
from mixerzoo_mixers._parts import (
    check_tokens,
    compact,
    expand,
    head_width,
    inherit_qkv,
    inherit_values,
    split_heads,
    unchunk,
    zero_padding,
)

BAND = 32  # how far `window` sees to either side
SHORT = 320  # tokens up to which one masked product is faster than blocks, on a CPU
BLOCK = 2 * BAND  # queries that share a product, with their own keys and half as many on either side


class PartialAttention(nn.Module):
    """What attentions to some of the keys share: q, k and v in one layer, and the readout of [heads; x]."""

    def __init__(self, dim: int, heads: int, width: float, prefix: int) -> None:
        super().__init__()
        rank = head_width(dim, heads, width)
        self.heads, self.prefix = heads, int(prefix)
        self.scale = (dim // heads) ** -0.5  # the teacher's, whatever R is
        self.qkv = nn.Linear(dim, 3 * heads * rank)
        self.readout = nn.Linear(heads * rank + dim, dim)

    def split(self, qkv: Tensor) -> Tensor:
        """Split (..., N, 3 * H * R) into (3, ..., H, N, R), without a copy."""
        parts: Tensor = qkv.unflatten(-1, (3, self.heads, -1))
        return parts.movedim(-3, 0).transpose(-3, -2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Softmax attention of (B, H, N, R) to (B, H, L, R), at the teacher's scale."""
        return F.scaled_dot_product_attention(q, k, v, mask, scale=self.scale)

    def read(self, mixed: Tensor, x: Tensor) -> Tensor:
        """Read out the heads (B, N, H * R) beside x (B, N, D)."""
        y: Tensor = self.readout(torch.cat((mixed, x), dim=-1))
        return y


class Window(PartialAttention):
    """Sliding-window attention: softmax(q_n . k_m / sqrt K) over |n - m| <= 32, a head. (B, N, D) -> (B, N, D).

    y_n = W [sum_m a_hnm v_hm for all h; x_n] + b. The first P tokens see all and are seen by all; distances are
    those among the others, padding left out. If causal, m <= n as well. Exact; long sequences go in blocks of 64
    queries and 128 keys (96 if causal). It knows no grid: on one it sees whole rows, about 32 / columns of them up
    and down.
    """

    def __init__(self, dim: int, heads: int, width: float, prefix: int, causal: bool) -> None:
        super().__init__(dim, heads, width, prefix)
        self.causal = causal

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mix x (B, N, D); where mask (B, N) is False, a token is not attended to."""
        x = zero_padding(x, mask)
        if mask is None:
            return self.read(self._mix(self.qkv(x), None), x)
        moved, real, places = compact(x, mask)
        return self.read(expand(self._mix(self.qkv(moved), real), places), x)

    def _mix(self, qkv: Tensor, real: Tensor | None) -> Tensor:
        """Attention from qkv (B, N, 3 * H * R) to the heads (B, N, H * R); padding, if any, comes last."""
        if not torch.compiler.is_compiling() and qkv.shape[1] <= SHORT:
            return self._mix_short(qkv, real)
        mixed = self._mix_rest(qkv, real)
        if self.prefix:
            mixed = torch.cat((self._mix_prefix(qkv, real), mixed), dim=1)
        return unchunk(mixed.unsqueeze(2), qkv.shape[1])

    def _mix_short(self, qkv: Tensor, real: Tensor | None) -> Tensor:
        """Do the same as one product of all queries and keys, with the band as what is added to their scores."""
        band = dense_band(qkv.shape[1], self.prefix, self.causal, qkv.dtype, qkv.device)
        if real is not None:
            # What is not there sees itself: no row of the softmax is empty.
            gone = ~real[:, None, None] & ~torch.eye(len(band), dtype=torch.bool, device=qkv.device)
            band = band.masked_fill(gone, -math.inf)
        q, k, v = self.split(qkv)
        return self.attend(q, k, v, band).transpose(1, 2).flatten(2)

    def _mix_prefix(self, qkv: Tensor, real: Tensor | None) -> Tensor:
        allowed = None if real is None else real[:, None, None]
        if self.causal:
            # Padding comes last: what comes before a real token is real.
            qkv = qkv[:, : self.prefix]
            allowed = torch.ones(qkv.shape[1], qkv.shape[1], dtype=torch.bool, device=qkv.device).tril()
        q, k, v = self.split(qkv)
        return self.attend(q[:, :, : self.prefix], k, v, allowed).transpose(1, 2).flatten(2)

    def _mix_rest(self, qkv: Tensor, real: Tensor | None) -> Tensor:
        """Attention of the tokens after the prefix, filled up to whole blocks: (B, G * C, H * R)."""
        if real is None:
            real = torch.ones_like(qkv[:1, :, 0], dtype=torch.bool)
        blocks = self._blocks(qkv)
        batch, groups = blocks.shape[:2]
        inner = blocks.shape[3] // 3
        q = blocks[..., :inner].unflatten(-1, (self.heads, -1)).flatten(0, 1).transpose(1, 2)
        kv = self._around(qkv[..., inner:], blocks[..., inner:]).unflatten(-1, (2, self.heads, -1))
        k, v = kv.flatten(0, 1).permute(2, 0, 3, 1, 4)  # (B * G, H, L, R)
        real = real.unsqueeze(-1)
        allowed = self._allowed(self._around(real, self._blocks(real)).squeeze(-1))
        allowed = allowed.expand(batch, -1, -1, -1).flatten(0, 1).unsqueeze(1)
        y: Tensor = self.attend(q, k, v, allowed).transpose(1, 2).flatten(2).unflatten(0, (batch, groups))
        return y.flatten(1, 2)

    def _blocks(self, x: Tensor) -> Tensor:
        """Cut x (B, N, F) without its prefix into blocks, the last filled up with zeros: (B, G, C, F)."""
        filled = x.shape[1] + BLOCK - 1 - self.prefix
        if torch.compiler.is_compiling():
            # One block too many for torch.export, which then sees that there is not one only: that would be broadcast.
            filled = x.shape[1] + 2 * BLOCK - 1
        count = filled // BLOCK
        rest = F.pad(x, (0, 0, 0, count * BLOCK + self.prefix - x.shape[1]))[:, self.prefix :]
        return rest.view(x.shape[0], count, BLOCK, x.shape[2])

    def _around(self, x: Tensor, blocks: Tensor) -> Tensor:
        """Put the prefix of x (B, N, F) and the neighbours beside each of its blocks (B, G, C, F): (B, G, L, F)."""
        parts = [F.pad(blocks[:, :, -BAND:], (0, 0, 0, 0, 1, 0))[:, :-1], blocks]
        if self.prefix:
            parts.insert(0, x[:, None, : self.prefix].expand(-1, blocks.shape[1], -1, -1))
        if not self.causal:
            parts.append(F.pad(blocks[:, :, :BAND], (0, 0, 0, 0, 0, 1))[:, 1:])
        return torch.cat(parts, dim=2)

    def _allowed(self, there: Tensor) -> Tensor:
        """Return who sees whom, (B or 1, G, C, L), from which keys are there, (B or 1, G, L)."""
        keys = BAND + BLOCK + (0 if self.causal else BAND)
        place = torch.arange(keys, device=there.device) - BAND
        away = torch.arange(BLOCK, device=there.device)[:, None] - place
        near = (away >= (0 if self.causal else -BAND)) & (away <= BAND)
        prefix = there.shape[-1] - keys
        # What is not there sees itself: no row of the softmax is empty.
        own = F.pad(away == 0, (prefix, 0), value=False)
        return F.pad(near, (prefix, 0), value=True) & there.unsqueeze(2) | own


@lru_cache(maxsize=32)
@torch.inference_mode(mode=False)
def dense_band(tokens: int, prefix: int, causal: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return what is added to the scores (N, N) of `Window`: 0 where a token sees another, -inf elsewhere."""
    place = torch.arange(tokens, device=device)
    away = place[:, None] - place
    allowed = (away.abs() <= BAND) | (place < prefix) | (place < prefix)[:, None]
    if causal:
        allowed = allowed & (away >= 0)
    return torch.zeros(tokens, tokens, dtype=dtype, device=device).masked_fill(~allowed, -math.inf)


def inherit_attention(mixer: PartialAttention, view: AttentionView) -> None:
    """Start with the teacher's q, k, v and output projections; see `inherit_qkv` for widths below 1."""
    inherit_qkv(view, mixer.qkv, mixer.readout, mixer.heads)


def kernel_side(side: int) -> int:
    """Return the kernel's side on a grid's side: the odd number next to 2 sqrt(side), no more than it can reach."""
    return min(2 * round(math.sqrt(side) - 0.5) + 1, 2 * side - 1)


class DepthwiseConv(nn.Module):
    """Depthwise convolution of the values: y_n = W [sum_d w_d * V x_(n+d) + g * mean_m V x_m; x_n; ...] + b.

    (B, N, D) -> (B, N, D) on the grid, zeros outside it; V is (H * R, D), w_d and g are vectors of H * R, * goes by
    channel. The kernel's sides are odd, about 2 sqrt(side). The mean is for what attention does farther away. Prefix
    tokens as `read_grid` has it.
    """

    def __init__(
        self, dim: int, heads: int, tokens: int, width: float, prefix: int, grid: tuple[int, int] | None
    ) -> None:
        super().__init__()
        channels = heads * head_width(dim, heads, width)
        self.grid = need_grid("dwconv", grid)
        self.heads, self.tokens = heads, tokens
        sides = [kernel_side(side) for side in self.grid]
        self.value = nn.Linear(dim, channels, bias=False)
        self.conv = nn.Conv2d(
            channels, channels, (sides[0], sides[1]), padding="same", groups=channels, bias=False
        )
        self.mean = nn.Parameter(torch.ones(channels))
        self.readout = grid_readout(channels, dim, prefix)

    def forward(self, x: Tensor) -> Tensor:
        """Mix x (B, N, D)."""
        check_tokens(x, self.tokens)
        value = self.value(x[:, self.tokens - self.grid[0] * self.grid[1] :])
        mixed = from_grid(self.conv(to_grid(value, self.grid))) + self.mean * value.mean(dim=1, keepdim=True)
        return read_grid(self.readout, mixed, x)


def inherit_dwconv(mixer: DepthwiseConv, view: AttentionView) -> None:
    """Start with the teacher's values and the mean attention of each head by offset; what is farther away is spread.

    See `inherit_values` for widths below 1.
    """
    (rows, columns), (high, wide) = mixer.grid, mixer.conv.weight.shape[2:]
    up, left = high // 2, wide // 2
    attention = view.mean_attention[:, -rows * columns :, -rows * columns :].unflatten(1, (rows, columns))
    picture = F.pad(
        attention.unflatten(3, (rows, columns)), (left, left, up, up)
    )  # (H, r, c, r + .., c + ..)
    i, j = (torch.arange(n, device=picture.device) for n in (rows, columns))
    di, dj = (torch.arange(n, device=picture.device) for n in (high, wide))
    a, b = i[:, None, None, None], j[:, None, None]
    near = picture[:, a, b, a + di[:, None], b + dj]  # (H, rows, columns, high, wide)
    inside = F.pad(torch.ones_like(attention[0, 0, 0]).view(rows, columns), (left, left, up, up))
    count = inside[a + di[:, None], b + dj].sum(dim=(0, 1))
    kernel = near.sum(dim=(1, 2)) / count
    rest = attention.sum(dim=(1, 2, 3)) - near.sum(dim=(1, 2, 3, 4))
    each = mixer.value.out_features // mixer.heads
    mixer.conv.weight.copy_(kernel.repeat_interleave(each, dim=0).unsqueeze(1))
    mixer.mean.copy_((rest / (rows * columns)).repeat_interleave(each))
    inherit_values(view, split_heads(mixer.value.weight, mixer.heads, 0), mixer.readout)


WINDOW = MixerSpec(
    name="window",
    build=Window,
    summary="softmax attention to the 32 tokens on either side and to the prefix, and the token itself",
    widths=(0.5, 1.0),
    caps=Caps(any_length=True, causal=True, masks=True, exportable=True),
    inherit=inherit_attention,
    readout="readout",
    cost="N D^2 + N D",
    paper="sliding windows with global tokens as in Longformer, arXiv 2004.05150; in some layers: MASFormer, "
    "arXiv 2310.12442",
    letter="Wi",
)

DWCONV = MixerSpec(
    name="dwconv",
    build=DepthwiseConv,
    summary="depthwise convolution of the values over the grid, their mean, and the token itself",
    widths=(0.5, 1.0),
    caps=Caps(exportable=True),
    inherit=inherit_dwconv,
    readout="readout",
    cost="N D^2 + N^1.5 D",
    paper="depthwise convolution for local attention, arXiv 2106.04263; the mean is our own",
    letter="Dw",
)
