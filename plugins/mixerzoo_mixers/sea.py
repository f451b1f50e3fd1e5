"""Sparse attention to where a cheap estimate of the attention map says that it goes.

Shapes: B batch, N tokens, D model width, H heads, K the teacher's head width, R that of the mixer, P prefix tokens,
T tiles of C places each, S chosen tiles.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixerzoo import AttentionView, Caps, MixerSpec
from mixerzoo_mixers._parts import at_least_float, check_tokens, head_width, inherit_qkv

EPS = 1e-6
SMALL = 144  # tokens below which tiles have four places
SHARE, MOST = 4, 4  # one tile in four is attended to, but no more than four


def tile_size(rows: int, columns: int) -> tuple[int, int]:
    """Return (rows, columns) of a tile: square where it can be, and so that little is left over at the edges."""
    small = rows * columns < SMALL
    if rows == 1:
        return (1, 4 if small else 16)
    if columns == 1:
        return (4 if small else 16, 1)
    if small:
        return (2, 2)
    down, across = (min((4, 5, 3), key=lambda side, n=size: -n % side) for size in (rows, columns))  # type: ignore[misc]
    return down, across


def tile(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Return which token of the grid is in each place of each tile (T, C), -1 for none; and its inverse (n,)."""
    down, across = tile_size(rows, columns)
    tall, wide = -(-rows // down), -(-columns // across)
    order = torch.full((tall * down, wide * across), -1)
    order[:rows, :columns] = torch.arange(rows * columns).view(rows, columns)
    order = order.view(tall, down, wide, across).transpose(1, 2).reshape(tall * wide, down * across)
    return order, order.flatten().argsort(stable=True)[-rows * columns :]


class Sea(nn.Module):
    """Sparse attention by an estimated mask. (B, N, D) -> (B, N, D).

    The tokens lie in tiles of about 4 x 4 (16 in a row where there is no grid), T of them. A head:

    1. linear attention with f(u) = exp([u; -u] / K^(1/4)) gives the share of each tile and prefix token in the
       attention of a token, sum_(m in tile) f(q).f(k_m) / sum_m f(q).f(k_m); its mean over the tokens of a tile is
       the map L, (T, T + P), found at linear cost from sums;
    2. E = softmax(tau log(L + 1e-6) + conv(relu(conv(T L)))) decodes it, with 3 x 3 convolutions over the (T, T)
       part, heads as channels;
    3. of each row the S greatest tiles are kept: for the tokens of that tile, s is softmax attention,
       q.k / sqrt(K), to the tokens of those and to the prefix;
    4. a = (1 - r) s + sum_u E_u (mean of v in tile u) over the tiles u left out, r the sum of their E_u.

    Prefix tokens attend to everything. y_n = W [a_hn for all h; x_n] + b. With all tiles kept it is attention itself.
    S is T / 4, and 4 at most: time grows as N, but for the map, which has (N / 16)^2 numbers a head.

    Differs from the paper: the map is compressed along the queries too, so that a tile of queries shares its tiles
    of keys and all that is sparse are matrix products; the tiles are fixed, not a resampled map; f is not random,
    and sharper than elu + 1; the decoder takes L alone, without an MLP over v; what is left out is weighed by E, for
    each tile of queries, in place of a learnt mix with one average, and this is where E's gradient comes from.
    """

    order: Tensor
    places: Tensor

    def __init__(
        self, dim: int, heads: int, tokens: int, width: float, prefix: int, grid: tuple[int, int] | None
    ) -> None:
        super().__init__()
        rank = head_width(dim, heads, width)
        self.heads, self.tokens = heads, tokens
        self.prefix = 0 if grid is None else int(prefix)
        self.shape = (1, tokens) if grid is None else grid
        order, places = tile(*self.shape)
        self.full = order.numel() == places.numel()
        self.tiles = len(order)
        self.chosen = min(max(1, self.tiles // SHARE), MOST)
        self.scale = (dim // heads) ** -0.5
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("places", places, persistent=False)
        self.qkv = nn.Linear(dim, 3 * heads * rank)
        self.sharpness = nn.Parameter(torch.ones(heads))
        self.decoder = nn.Sequential(
            nn.Conv2d(heads, 2 * heads, 3, padding=1), nn.ReLU(), nn.Conv2d(2 * heads, heads, 3, padding=1)
        )
        self.readout = nn.Linear(heads * rank + dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Mix x (B, N, D)."""
        check_tokens(x, self.tokens)
        qkv = self.qkv(x)
        tiled = qkv.index_select(1, (self.order.clamp(min=0) + self.prefix).flatten())
        # (B, H, T, C, 3, R) and (B, H, P, 3, R)
        tiled = (
            tiled.unflatten(2, (3, self.heads, -1)).unflatten(1, self.order.shape).permute(0, 4, 1, 2, 3, 5)
        )
        first = qkv[:, : self.prefix].unflatten(2, (3, self.heads, -1)).permute(0, 3, 1, 2, 4)
        weights = self._estimate(tiled, first)[..., : self.tiles]
        chosen = weights.topk(self.chosen).indices
        left = weights.scatter(-1, chosen, 0)
        near = self._attend(tiled, first, chosen)
        far = left @ self._sum(at_least_float(tiled[..., 2, :]), mean=True)
        y = (1 - left.sum(dim=-1))[..., None, None] * near + far.unsqueeze(3)
        mixed = y.permute(0, 2, 3, 1, 4).flatten(1, 2).index_select(1, self.places).flatten(2).to(x.dtype)
        if self.prefix:
            mixed = torch.cat((self._attend_to_all(qkv), mixed), dim=1)
        out: Tensor = self.readout(torch.cat((mixed, x), dim=-1))
        return out

    def _sum(self, values: Tensor, mean: bool = False) -> Tensor:
        """Sum (B, H, T, C, E) over the tokens of each tile."""
        if not self.full:
            values = values.masked_fill(self.order.unsqueeze(-1) < 0, 0)
        total = values.sum(dim=3)
        return total / (self.order >= 0).sum(dim=1).unsqueeze(-1).to(total.dtype) if mean else total

    def _estimate(self, tiled: Tensor, first: Tensor) -> Tensor:
        """Return E (B, H, T, T + P)."""
        root = self.scale**0.5
        q, k, kp = (at_least_float(t) * root for t in (tiled[..., 0, :], tiled[..., 1, :], first[..., 1, :]))
        # Both maxima cancel in the shares. The halves of f are kept apart: one copy of all tokens less.
        size = q.detach().abs().amax(dim=-1, keepdim=True)
        halves = (q - size).exp(), (-q - size).exp()
        size = torch.cat((k.detach().flatten(2, 3), kp.detach()), dim=2).abs().amax(dim=(2, 3), keepdim=True)
        columns = [
            torch.cat((self._sum((s * k - size.unsqueeze(2)).exp()), (s * kp - size).exp()), dim=2)
            for s in (1, -1)
        ]  # (B, H, T + P, R) each
        up, down = (f @ c.sum(dim=2)[:, :, None, :, None] for f, c in zip(halves, columns, strict=True))
        total = (up + down).clamp(min=EPS)
        up, down = (self._sum(f / total, mean=True) @ c.mT for f, c in zip(halves, columns, strict=True))
        shares = up + down
        dtype = self.sharpness.dtype
        decoded = self.decoder((shares[..., : self.tiles] * self.tiles).to(dtype)).to(shares.dtype)
        scores = self.sharpness.to(shares.dtype)[:, None, None] * (shares + EPS).log()
        return (scores + F.pad(decoded, (0, self.prefix))).softmax(dim=-1)

    def _attend(self, tiled: Tensor, first: Tensor, chosen: Tensor) -> Tensor:
        """Return the attention (B, H, T, C, R) of each tile to those of chosen (B, H, T, S) and to the prefix."""
        batch, heads, tiles, places, _, rank = tiled.shape
        size = tiles * places + self.prefix
        # Keys and values are copied once, as rows of one table.
        table = torch.cat((first[..., 1:, :], tiled[..., 1:, :].flatten(2, 3)), dim=2).reshape(-1, 2 * rank)
        within = torch.arange(self.prefix, self.prefix + places, device=chosen.device)
        rows = F.pad((chosen.unsqueeze(-1) * places + within).flatten(3), (self.prefix, 0))
        rows[..., : self.prefix] = torch.arange(self.prefix, device=chosen.device)
        start = torch.arange(batch * heads, device=chosen.device).view(batch, heads, 1, 1) * size
        picked = table.index_select(0, (rows + start).flatten()).view(batch * heads, tiles, -1, 2, rank)
        mask = None
        if not self.full:
            real = (self.order >= 0)[chosen].flatten(3).flatten(0, 1).unsqueeze(2)
            mask = F.pad(real, (self.prefix, 0), value=True).expand(-1, -1, places, -1)
        q = tiled[..., 0, :].flatten(0, 1)
        keys, values = picked.unbind(dim=3)
        y: Tensor = F.scaled_dot_product_attention(q, keys, values, mask, scale=self.scale)
        return y.view(batch, heads, tiles, places, rank)

    def _attend_to_all(self, qkv: Tensor) -> Tensor:
        """Return softmax attention of the prefix tokens, (B, P, H * R)."""
        q, k, v = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q[:, :, : self.prefix], k, v, scale=self.scale)
        return y.transpose(1, 2).flatten(2)


def inherit_sea(mixer: Sea, view: AttentionView) -> None:
    """Start with the teacher's q, k, v and output projections; see `inherit_qkv` for widths below 1."""
    inherit_qkv(view, mixer.qkv, mixer.readout, mixer.heads)


SEA = MixerSpec(
    name="sea",
    build=Sea,
    summary="attention to the tiles that a linear estimate of the map points at, and the token itself",
    widths=(0.5, 1.0),
    caps=Caps(exportable=True),
    inherit=inherit_sea,
    readout="readout",
    cost="N D^2 + N D K + N^2 D / 256",
    paper="SEA, arXiv 2310.01777",
    letter="Se",
)
