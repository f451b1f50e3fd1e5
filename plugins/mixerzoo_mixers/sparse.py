"""Attention to keys from all over the grid, but few of them: strided ones, or the most promising ones.

Shapes: B batch, N tokens, D model width, H heads, K the teacher's head width, R the mixer's head width, P prefix
tokens, G groups of tokens (windows, strided subsets, tiles), S tokens in a group, L keys of a group.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from mixerzoo import AttentionView, Caps, MixerSpec
from mixerzoo_mixers._grid import need_grid
from mixerzoo_mixers._parts import check_tokens, factor, inherit_qkv, split_heads
from mixerzoo_mixers.local import PartialAttention, inherit_attention


def window_side(side: int) -> tuple[int, int]:
    """Return a window's side and the number of windows along a side of the grid: about 2 sqrt(side), evenly."""
    count = math.ceil(side / round(2 * side**0.5))
    return math.ceil(side / count), count


class Factorized(PartialAttention):
    """Attention at two grains, each at the cost of a window: near ones and strided ones. (B, N, D) -> (B, N, D).

    A head's token attends to its group. The first half of the heads (rounded up) are far-sighted: a group is a
    strided subset of the whole grid, the tokens of equal row mod G_r and equal column mod G_c. The others are
    near-sighted: a group is a window of S_r x S_c neighbours. S is about 2 sqrt(side), G = ceil(side / S).
    y_n = W [sum_m a_hnm v_hm for all h; x_n] + b. The P prefix tokens see all and are seen by all.

    FaViT averages its strided keys over the groups and has a third, pooled grain. Here no key is averaged, so that
    on a grid of one window this is the teacher's attention.
    """

    seen: Tensor

    def __init__(self, dim: int, heads: int, tokens: int, width: float, grid: tuple[int, int] | None) -> None:
        rows, columns = need_grid("factorized", grid)
        super().__init__(dim, heads, width, tokens - rows * columns)
        self.grid, self.tokens = (rows, columns), tokens
        self.far = (heads + 1) // 2
        (self.high, self.down), (self.wide, self.across) = (window_side(side) for side in self.grid)
        self.even = (self.high * self.down, self.wide * self.across) == self.grid
        cells = torch.ones(1, *self.grid, dtype=torch.bool)
        seen = [self.group(cells, far).flatten(0, 2).flatten(1) for far in (False, True)]
        # Which keys are there, for the near-sighted and the far-sighted: (2, G, P + S).
        self.register_buffer("seen", F.pad(torch.stack(seen), (self.prefix, 0), value=True), persistent=False)

    def group(self, x: Tensor, far: bool) -> Tensor:
        """Cut cells x (B, rows, columns, ...), filled up with zeros, into (B, G_r, G_c, S_r, S_c, ...)."""
        if not self.even:
            rows, columns = self.high * self.down - x.shape[1], self.wide * self.across - x.shape[2]
            x = F.pad(x, (*(0, 0) * (x.dim() - 3), 0, columns, 0, rows))
        if far:
            x = x.unflatten(2, (self.wide, self.across)).unflatten(1, (self.high, self.down))
            return x.movedim((2, 4, 1, 3), (1, 2, 3, 4))
        x = x.unflatten(2, (self.across, self.wide)).unflatten(1, (self.down, self.high))
        return x.transpose(2, 3)

    def ungroup(self, x: Tensor, far: bool) -> Tensor:
        """Undo `group`: (B, G_r, G_c, S_r, S_c, ...) to (B, rows, columns, ...)."""
        x = x.movedim((1, 2, 3, 4), (2, 4, 1, 3)) if far else x.transpose(2, 3)
        return x.flatten(3, 4).flatten(1, 2)[:, : self.grid[0], : self.grid[1]]

    def forward(self, x: Tensor) -> Tensor:
        """Mix x (B, N, D)."""
        check_tokens(x, self.tokens)
        qkv = self.qkv(x)
        parts = qkv.unflatten(-1, (3, self.heads, -1))
        mixed = self._mix(parts[:, :, :, : self.far], far=True)
        if self.far < self.heads:
            mixed = torch.cat((mixed, self._mix(parts[:, :, :, self.far :], far=False)), dim=-1)
        if self.prefix:
            q, k, v = self.split(qkv)
            first = self.attend(q[:, :, : self.prefix], k, v).transpose(1, 2).flatten(2)
            mixed = torch.cat((first, mixed), dim=1)
        return self.read(mixed, x)

    def _mix(self, parts: Tensor, far: bool) -> Tensor:
        """Attention of the grid within the groups of one grain: (B, N, 3, h, R) to (B, N - P, h * R)."""
        cells = self.group(parts[:, self.prefix :].unflatten(1, self.grid), far)
        # (B, G_r, G_c, S_r, S_c, 3, h, R) to three of (B * G, h, S, R).
        q, k, v = cells.permute(5, 0, 1, 2, 6, 3, 4, 7).flatten(5, 6).flatten(1, 3)
        shape = cells.shape[:3]
        if self.prefix:
            first = parts[:, None, : self.prefix].expand(-1, shape[1] * shape[2], -1, -1, -1, -1)
            _, first_k, first_v = first.flatten(0, 1).permute(2, 0, 3, 1, 4)
            k, v = torch.cat((first_k, k), dim=2), torch.cat((first_v, v), dim=2)
        mask = None if self.even else self.seen[int(far)].repeat(shape[0], 1)[:, None, None]
        y = self.attend(q, k, v, mask).unflatten(2, (self.high, self.wide)).unflatten(0, shape)
        return self.ungroup(y.movedim(3, 5), far).flatten(3).flatten(1, 2)


def reorder_heads(view: AttentionView, order: Tensor) -> AttentionView:
    """Return the same attention with its heads in another order."""

    def rows(t: Tensor) -> Tensor:
        return split_heads(t, len(order), 0)[order].flatten(0, 1)

    return replace(
        view,
        q_weight=rows(view.q_weight),
        q_bias=rows(view.q_bias),
        k_weight=rows(view.k_weight),
        k_bias=rows(view.k_bias),
        v_weight=rows(view.v_weight),
        v_bias=rows(view.v_bias),
        out_weight=rows(view.out_weight.mT).mT,
        mean_attention=view.mean_attention[order],
    )


def inherit_factorized(mixer: Factorized, view: AttentionView) -> None:
    """Start with the teacher's q, k, v and output projections, its heads sorted.

    Those whose mean attention stays in windows most, compared with strided groups, become the near-sighted ones.
    """
    cells = mixer.grid[0] * mixer.grid[1]
    attention = view.mean_attention[:, -cells:, -cells:]
    number = torch.arange(mixer.down * mixer.across, device=attention.device)
    number = number.view(1, mixer.down, mixer.across, 1, 1).expand(-1, -1, -1, mixer.high, mixer.wide)
    near, far = (mixer.ungroup(number, far).flatten() for far in (False, True))
    mass = [(attention * (group[:, None] == group)).sum(dim=(1, 2)) for group in (near, far)]
    inherit_attention(mixer, reorder_heads(view, (mass[0] - mass[1]).argsort(stable=True)))


class TopkAttention(PartialAttention):
    """Attention to the L keys that promise most, predicted at low rank. (B, N, D) -> (B, N, D).

    The grid is cut into tiles T as into `Factorized`'s windows. A head's first c = ceil(R / 4) channels predict:
    p_Tm = sum_(n in T) sum_(i < c) q_ni k_mi. The L = ceil(4 sqrt(cells)) tokens of the grid with the greatest p_Tm
    are the keys of every query of the tile, beside the P prefix tokens; prefix tokens see all. Then softmax over
    q_n . k_m / sqrt K. y_n = W [sum_m a_hnm v_hm for all h; x_n] + b.

    Sparsifiner has a predictor with weights of its own, of low rank in the tokens too, and a mask for every query.
    Here the predicted score is a part of the logits, which gives it its gradients, and queries share keys by tiles:
    without that, predicting and gathering would cost more than attention does.
    """

    def __init__(self, dim: int, heads: int, tokens: int, width: float, grid: tuple[int, int] | None) -> None:
        rows, columns = need_grid("topk_attention", grid)
        super().__init__(dim, heads, width, tokens - rows * columns)
        self.grid, self.tokens = (rows, columns), tokens
        (self.high, self.down), (self.wide, self.across) = (window_side(side) for side in self.grid)
        self.kept = min(rows * columns, math.ceil(4 * math.sqrt(rows * columns)))
        self.low = math.ceil(self.qkv.out_features // (3 * heads) / 4)

    def forward(self, x: Tensor) -> Tensor:
        """Mix x (B, N, D)."""
        check_tokens(x, self.tokens)
        qkv = self.qkv(x)
        q, k, v = self.split(qkv)
        tiles = self._tile(q[:, :, self.prefix :])  # (B, H, G, S, R)
        groups = tiles.shape[2]
        pooled = tiles[..., : self.low].sum(dim=3)
        score = pooled @ k[:, :, self.prefix :, : self.low].mT  # (B, H, G, cells)
        best = score.topk(self.kept, dim=-1, sorted=False).indices + self.prefix
        first = torch.arange(self.prefix, device=best.device).expand(*best.shape[:3], -1)
        rows = self._rows(torch.cat((first, best), dim=-1))
        # Whole rows of R, straight from the projection: no copy of k and v by heads.
        table = qkv.reshape(-1, qkv.shape[-1] // (3 * self.heads))
        near = [table.index_select(0, rows + part * self.heads) for part in (1, 2)]
        near_k, near_v = (t.view(best.shape[0], self.heads * groups, -1, t.shape[-1]) for t in near)
        mixed = self._untile(self.attend(tiles.flatten(1, 2), near_k, near_v))
        if self.prefix:
            first = self.attend(q[:, :, : self.prefix], k, v).transpose(1, 2).flatten(2)
            mixed = torch.cat((first, mixed), dim=1)
        return self.read(mixed, x)

    def _rows(self, tokens: Tensor) -> Tensor:
        """Return where the q of tokens (B, H, G, L) are among the rows (B * N * 3 * H, R) of qkv, in one dimension."""
        sample = torch.arange(tokens.shape[0], device=tokens.device)[:, None, None, None]
        head = torch.arange(self.heads, device=tokens.device)[:, None, None]
        return ((sample * self.tokens + tokens) * (3 * self.heads) + head).flatten()

    def _tile(self, q: Tensor) -> Tensor:
        """Cut the grid's queries (B, H, cells, R), filled up with zeros, into tiles (B, H, G, S, R)."""
        rows, columns = self.grid
        q = q.unflatten(2, self.grid)
        q = F.pad(q, (0, 0, 0, self.wide * self.across - columns, 0, self.high * self.down - rows))
        q = q.unflatten(3, (self.across, self.wide)).unflatten(2, (self.down, self.high))
        return q.transpose(3, 4).flatten(4, 5).flatten(2, 3)

    def _untile(self, y: Tensor) -> Tensor:
        """Undo `_tile` for (B, H * G, S, R): (B, cells, H * R)."""
        y = y.unflatten(2, (self.high, self.wide)).unflatten(1, (self.heads, self.down, self.across))
        y = y.permute(0, 2, 4, 3, 5, 1, 6).flatten(5).flatten(3, 4).flatten(1, 2)
        return y[:, : self.grid[0], : self.grid[1]].flatten(1, 2)


def inherit_topk(mixer: TopkAttention, view: AttentionView) -> None:
    """Start with the teacher's q, k, v and output projections.

    q and k are turned, a head, so that their first channels hold the greatest singular values of the product: the
    predicted score is the best of its rank.
    """
    inherit_qkv(view, mixer.qkv, mixer.readout, mixer.heads)
    weights = [split_heads(w, mixer.heads, 0) for w in mixer.qkv.weight.chunk(3)]  # (H, R, D) each
    biases = [split_heads(b, mixer.heads, 0) for b in mixer.qkv.bias.chunk(3)]
    q, k = (torch.cat((weights[i], biases[i].unsqueeze(-1)), dim=-1) for i in (0, 1))
    # A further channel of zeros: `factor` leaves alone what it need not cut, and this makes it sort.
    left, right = factor(F.pad(q, (0, 0, 0, 1)).mT, F.pad(k, (0, 0, 0, 1)), q.shape[1])
    for weight, bias, t in zip(weights, biases, (left.mT, right), strict=False):
        weight.copy_(t[..., :-1])
        bias.copy_(t[..., -1])


FACTORIZED = MixerSpec(
    name="factorized",
    build=Factorized,
    summary="softmax attention, half the heads in windows of the grid, half in strided subsets of it",
    widths=(0.5, 1.0),
    caps=Caps(exportable=True),
    inherit=inherit_factorized,
    readout="readout",
    cost="N D^2 + N^1.5 D",
    paper="FaViT, arXiv 2312.08614, without averaging keys",
    letter="Fa",
)

TOPK_ATTENTION = MixerSpec(
    name="topk_attention",
    build=TopkAttention,
    summary="softmax attention of each tile of the grid to the keys of the greatest predicted scores",
    widths=(0.5, 1.0),
    caps=Caps(exportable=True),
    inherit=inherit_topk,
    readout="readout",
    cost="N D^2 + N^1.5 D",
    paper="after Sparsifiner, arXiv 2303.13755; keys shared by tiles as in BiFormer, arXiv 2303.08810",
    letter="Tp",
)
