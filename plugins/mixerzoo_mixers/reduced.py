"""Softmax attention made smaller: fewer keys and narrower queries, a cascade of narrow heads, fewer heads.

Shapes: B batch, N tokens, D model width, H heads, K the teacher's head width, R the mixer's head width, P prefix
tokens, T tiles of the grid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixerzoo import AttentionView, Caps, MixerSpec
from mixerzoo.units import Units, places, sized
from mixerzoo_mixers._grid import from_grid, need_grid, to_grid
from mixerzoo_mixers._parts import (
    check_tokens,
    columns,
    factor,
    head_width,
    inherit_values,
    split_heads,
    zero_padding,
    zipped,
)

KERNEL = 5  # side of the convolution of `cascaded_group`


class Strip(nn.Module):
    """Attention with tiles of the grid for keys and values, and narrow queries and keys. (B, N, D) -> (B, N, D).

    A tile of r_r x r_c tokens becomes one, t = r_r r_c / c_t * sum_(d in tile) w_d * x_d, * by channel, c_t the tokens
    it really has; r is about sqrt(side) / 2. Prefix tokens stay as they are, with c = 1. q (of x) and k (of t) are of
    width ceil(R / 4), v (of t) of R. a_hnt = softmax_t(q_n . k_t / sqrt K + log c_t);
    y_n = W [sum_t a_hnt v_ht for all h; x_n] + b.

    Unlike S2AFormer's: log c_t, without which a tile would weigh no more than one of its tokens, and no convolution
    or normalisation around it.
    """

    counts: Tensor

    def __init__(self, dim: int, heads: int, tokens: int, width: float, grid: tuple[int, int] | None) -> None:
        super().__init__()
        rank = head_width(dim, heads, width)
        narrow = math.ceil(rank / 4)
        self.grid = need_grid("strip", grid)
        self.heads, self.tokens, self.prefix = heads, tokens, tokens - self.grid[0] * self.grid[1]
        self.scale = (dim // heads) ** -0.5  # the teacher's, whatever R is
        high, wide = (max(1, round(side**0.5 / 2)) for side in self.grid)
        self.query = nn.Linear(dim, heads * narrow)
        self.reduce = nn.Conv2d(dim, dim, (high, wide), stride=(high, wide), groups=dim, bias=False)
        nn.init.constant_(self.reduce.weight, 1 / (high * wide))
        self.key_value = nn.Linear(dim, heads * (narrow + rank))
        self.readout = nn.Linear(heads * rank + dim, dim)
        self.missing = (-self.grid[1] % wide, -self.grid[0] % high)  # columns and rows of the last tiles
        full = self._pad(torch.ones(1, 1, *self.grid))
        counts = F.avg_pool2d(full, (high, wide), divisor_override=1).flatten().long()
        self.register_buffer("counts", F.pad(counts, (self.prefix, 0), value=1), persistent=False)

    def _pad(self, picture: Tensor) -> Tensor:
        return F.pad(picture, (0, self.missing[0], 0, self.missing[1])) if any(self.missing) else picture

    def _reduce(self, x: Tensor) -> Tensor:
        """Return the prefix tokens and the tiles of x (B, N, D): (B, P + T, D)."""
        tiles = from_grid(self.reduce(self._pad(to_grid(x, self.grid))))
        if any(self.missing):
            size = self.reduce.weight[0].numel()
            tiles = tiles * (size / self.counts[self.prefix :, None]).to(x.dtype)
        return torch.cat((x[:, : self.prefix], tiles), dim=1) if self.prefix else tiles

    def forward(self, x: Tensor) -> Tensor:
        """Mix x (B, N, D)."""
        check_tokens(x, self.tokens)
        key_value = self.key_value(self._reduce(x))
        q = split_heads(self.query(x), self.heads).transpose(1, 2)
        k, v = key_value.tensor_split((self.query.out_features,), dim=-1)
        k, v = (split_heads(t, self.heads).transpose(1, 2) for t in (k, v))
        weight = self.counts.to(q.dtype).log().unsqueeze(0)
        y = F.scaled_dot_product_attention(q, k, v, weight, scale=self.scale)
        out: Tensor = self.readout(torch.cat((y.transpose(1, 2).flatten(2), x), dim=-1))
        return out


def queries_and_keys(view: AttentionView, heads: int, rank: int) -> tuple[Tensor, Tensor]:
    """Return q and k, (H, R, D + 1) each with the bias last, whose product is the teacher's as well as R allows."""
    q, k = (
        split_heads(torch.cat((w, b.unsqueeze(-1)), dim=-1), heads, 0)
        for w, b in ((view.q_weight, view.q_bias), (view.k_weight, view.k_bias))
    )
    left, right = factor(q.mT, k, rank)
    return left.mT, right


def inherit_strip(mixer: Strip, view: AttentionView) -> None:
    """Start with the teacher's q, k, v and output projections, cut to their widths, on the means of the tiles."""
    narrow = mixer.query.out_features
    weights = (mixer.query.weight, mixer.key_value.weight[:narrow])
    biases = (mixer.query.bias, mixer.key_value.bias[:narrow])
    parts = queries_and_keys(view, mixer.heads, narrow // mixer.heads)
    for weight, bias, t in zip(weights, biases, parts, strict=True):
        weight.copy_(t[..., :-1].flatten(0, 1))
        bias.copy_(t[..., -1].flatten())
    mixer.key_value.bias[narrow:].zero_()
    inherit_values(view, split_heads(mixer.key_value.weight[narrow:], mixer.heads, 0), mixer.readout)


class CascadedGroup(nn.Module):
    """Cascaded group attention: each head works on a narrow input and what the head before found.

    f_h = P_h x + p_h + g_h o_(h-1), R wide; q, k and v are (R, R) maps of f_h; q is then convolved over the grid by
    channel, 5 x 5; o_h = softmax(q . k / sqrt K + t_h[|di|, |dj|]) v, t_h a bias by distance on the grid.
    y_n = W [o_1n .. o_Hn; x_n] + b. (B, N, D) -> (B, N, D). Prefix tokens attend and are attended to, without
    convolution and bias.

    EfficientViT splits x into the heads' inputs: P is the identity there, and g_h is 1. A projection can hold what
    the teacher's head looks at. Its ReLU before the output projection, its windows and its narrower queries and keys
    are left out, its batch norms folded.
    """

    def __init__(self, dim: int, heads: int, tokens: int, width: float, grid: tuple[int, int] | None) -> None:
        super().__init__()
        rank = head_width(dim, heads, width)
        self.grid = need_grid("cascaded_group", grid)
        self.tokens, self.prefix = tokens, tokens - self.grid[0] * self.grid[1]
        self.scale = (dim // heads) ** -0.5  # the teacher's, whatever R is
        self.inner = nn.Linear(dim, heads * rank)
        self.qkv = nn.ModuleList([nn.Linear(rank, 3 * rank) for _ in range(heads)])
        self.conv = nn.ModuleList(
            [nn.Conv2d(rank, rank, KERNEL, padding="same", groups=rank) for _ in range(heads)]
        )
        self.cascade = nn.Parameter(torch.ones(heads - 1))
        self.bias = nn.Parameter(torch.zeros(heads, *self.grid))
        self.readout = nn.Linear(heads * rank + dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Mix x (B, N, D)."""
        check_tokens(x, self.tokens)
        bias = spread(self.bias, self.prefix).unbind()
        inputs = self.inner(x).chunk(len(self.qkv), dim=-1)
        found: list[Tensor] = []
        for h, (qkv, conv) in enumerate(zip(self.qkv, self.conv, strict=True)):
            f = inputs[h] + self.cascade[h - 1] * found[-1] if h else inputs[h]
            q, k, v = qkv(f).unsqueeze(1).chunk(3, dim=-1)  # (B, 1, N, R) each
            q = self._convolve(conv, q.squeeze(1)).unsqueeze(1)
            k, v = k.flip(2), v.flip(2)  # as the bias has them
            found.append(F.scaled_dot_product_attention(q, k, v, bias[h], scale=self.scale).squeeze(1))
        y: Tensor = self.readout(torch.cat((*found, x), dim=-1))
        return y

    def _convolve(self, conv: nn.Module, q: Tensor) -> Tensor:
        grid = from_grid(conv(to_grid(q, self.grid)))
        return torch.cat((q[:, : self.prefix], grid), dim=1) if self.prefix else grid


def spread(table: Tensor, prefix: int) -> Tensor:
    """Spread a table by distance (H, rows, columns) over all pairs of tokens, keys in reverse: (H, N, N).

    There are zeros for the prefix.
    """
    _, rows, columns = table.shape
    # Mirrored, so that every row of the map is a window of it, with the last key first: a view, and no gather.
    whole = torch.cat((table.flip(1)[:, :-1], table), dim=1)
    whole = torch.cat((whole.flip(2)[:, :, :-1], whole), dim=2)
    pairs = whole.unfold(1, rows, 1).unfold(2, columns, 1)
    pairs = pairs.reshape(-1, rows * columns, rows * columns)
    return F.pad(pairs, (0, prefix, prefix, 0)) if prefix else pairs


def inherit_cascaded_group(mixer: CascadedGroup, view: AttentionView) -> None:
    """Start as the teacher's attention, each head seeing x through the R directions that matter most to its q, k, v.

    The cascade and the bias start at zero, the convolution at the identity.
    """
    heads = len(mixer.qkv)
    rank = mixer.inner.out_features // heads
    values = mixer.inner.weight.new_zeros(heads, rank, mixer.inner.in_features)
    inherit_values(view, values, mixer.readout)
    maps = [*queries_and_keys(view, heads, rank), F.pad(values, (0, 1))]  # three of (H, R, D + 1)
    sizes = [t[..., :-1].norm(dim=(1, 2), keepdim=True).clamp(min=1e-12) for t in maps]
    stack = torch.cat([t[..., :-1] / s for t, s in zip(maps, sizes, strict=True)], dim=1)
    seen = torch.linalg.svd(stack.double(), full_matrices=False).Vh[:, :rank].to(stack.dtype)  # (H, R, D)
    mixer.inner.weight.copy_(seen.flatten(0, 1))
    mixer.inner.bias.zero_()
    whole = torch.cat(maps, dim=1)
    for h, (qkv, conv) in enumerate(zip(mixer.qkv, mixer.conv, strict=True)):
        assert isinstance(qkv, nn.Linear)
        assert isinstance(conv, nn.Conv2d)
        assert conv.bias is not None
        qkv.weight.copy_(whole[h, :, :-1] @ seen[h].mT)
        qkv.bias.copy_(whole[h, :, -1])
        nn.init.dirac_(conv.weight, groups=rank)
        conv.bias.zero_()
    mixer.cascade.zero_()
    mixer.bias.zero_()


class FewerHeads(nn.Module):
    """Softmax attention with H' = width * H heads of the teacher's width K (at least one). (B, N, D) -> (B, N, D).

    y_n = W [sum_m softmax(q_n . k_m / sqrt K) v_hm for all h; x_n] + b. If causal, m <= n.
    """

    def __init__(
        self, dim: int, heads: int, width: float, causal: bool, sizes: Mapping[str, int] | None = None
    ) -> None:
        super().__init__()
        self.heads, self.causal = sized(sizes, "heads", max(1, round(width * heads))), causal
        inner = self.heads * head_width(dim, heads, 1)
        self.qkv = nn.Linear(dim, 3 * inner)
        self.readout = nn.Linear(inner + dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mix x (B, N, D); where mask (B, N) is False, a token is not attended to."""
        x = zero_padding(x, mask)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if mask is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        else:
            y = F.scaled_dot_product_attention(q, k, v, self._allowed(mask))
        out: Tensor = self.readout(torch.cat((y.transpose(1, 2).flatten(2), x), dim=-1))
        return out

    def _allowed(self, mask: Tensor) -> Tensor:
        allowed = mask[:, None, None]
        if not self.causal:
            return allowed
        order = torch.ones(mask.shape[1], mask.shape[1], dtype=torch.bool, device=mask.device)
        # A token always sees itself: no row of the softmax is empty, not even that of padding on the left.
        return allowed & order.tril() | order.tril().triu()


def medoids(maps: Tensor, weights: Tensor, count: int) -> list[list[int]]:
    """Cluster H maps (H, N, N): `count` lists of heads, the one that stands for its cluster first.

    Heads are given up one by one, each time the one that costs least: the squared distance of each given-up map from
    the nearest that is kept, times its weight (H,).
    """
    flat = maps.flatten(1).double()
    distance = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist").square()
    kept = list(range(len(maps)))
    while len(kept) > count:
        trials = [[h for h in kept if h != given_up] for given_up in kept]
        costs = [float(weights @ distance[:, trial].min(dim=1).values) for trial in trials]
        kept = trials[costs.index(min(costs))]
    nearest = distance[:, kept].argmin(dim=1).tolist()
    return [
        [kept[c], *(h for h in range(len(maps)) if nearest[h] == c and h != kept[c])] for c in range(count)
    ]


def inherit_fewer_heads(mixer: FewerHeads, view: AttentionView) -> None:
    """Start with one of each cluster of heads: q and k of the one whose mean map is nearest to the others'.

    Its values are those of the whole cluster: the sum of their products with the output projection, as well as K
    allows. Heads count by the size of that product. At width 1 this is the teacher's attention.
    """
    heads = len(view.mean_attention)
    q, k, v = (split_heads(w, heads, 0) for w in (view.q_weight, view.k_weight, view.v_weight))
    out = split_heads(view.out_weight, heads).transpose(0, 1)
    clusters = medoids(view.mean_attention, (out @ v).double().square().sum(dim=(1, 2)), mixer.heads)
    first = [cluster[0] for cluster in clusters]
    merged = [
        factor(torch.cat([out[h] for h in c], dim=1)[None], torch.cat([v[h] for h in c])[None], q.shape[1])
        for c in clusters
    ]
    values = torch.cat([right[0] for _, right in merged])
    mixer.qkv.weight.copy_(torch.cat((q[first].flatten(0, 1), k[first].flatten(0, 1), values)))
    biases = [split_heads(b, heads, 0)[first].flatten() for b in (view.q_bias, view.k_bias)]
    mixer.qkv.bias.copy_(torch.cat((*biases, torch.zeros_like(biases[0]))))
    mixer.readout.weight.zero_()
    mixer.readout.weight[:, : len(values)] = torch.cat([left[0] for left, _ in merged], dim=1)
    # Each row of an attention map sums to 1: a bias of the values is one of the output.
    mixer.readout.bias.copy_(view.out_bias + view.out_weight @ view.v_bias)


def fewer_heads_units(mixer: FewerHeads) -> dict[str, Units]:
    """Return the heads: their q, k and v, and their columns of the readout."""
    heads, rank = mixer.heads, mixer.qkv.out_features // (3 * mixer.heads)
    return {
        "heads": zipped(
            columns("qkv.weight", places(3, heads, rank, units=1), dim=0),
            columns("qkv.bias", places(3, heads, rank, units=1), dim=0, counts=False),
            columns("readout.weight", places(heads, rank, units=0)),
        )
    }


STRIP = MixerSpec(
    name="strip",
    build=Strip,
    summary="softmax attention to tiles of the grid with narrow queries and keys, and the token itself",
    widths=(0.5, 1.0),
    caps=Caps(exportable=True),
    inherit=inherit_strip,
    readout="readout",
    cost="N D^2 + N^1.5 D",
    paper="S2AFormer, arXiv 2505.22195",
    letter="St",
)

CASCADED_GROUP = MixerSpec(
    name="cascaded_group",
    build=CascadedGroup,
    summary="narrow attention heads in a cascade, each sees what the one before found",
    widths=(0.5, 1.0),
    caps=Caps(exportable=True),
    inherit=inherit_cascaded_group,
    readout="readout",
    cost="N D^2 + N^2 D",
    paper="EfficientViT (MSRA), arXiv 2305.07027",
    letter="Cg",
)

FEWER_HEADS = MixerSpec(
    name="fewer_heads",
    build=FewerHeads,
    summary="softmax attention with fewer heads, like ones merged",
    widths=(0.25, 0.5, 1.0),
    caps=Caps(any_length=True, causal=True, masks=True, exportable=True),
    inherit=inherit_fewer_heads,
    readout="readout",
    units=fewer_heads_units,
    cost="N D^2 + N^2 D",
    paper="own design; merging heads after GQA, arXiv 2305.13245, and pruning them after arXiv 1905.10650",
    letter="Fw",
)
