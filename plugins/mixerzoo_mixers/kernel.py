"""Attention with a kernel in place of the softmax, through landmarks or through a Fourier transform.

Shapes: B batch, N tokens, D model width, H heads, K the teacher's head width, R that of the mixer, M landmarks,
F features, P prefix tokens, n = rows * columns the other tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixerzoo import AttentionView, Caps, MixerSpec
from mixerzoo_mixers._grid import from_grid, need_grid, to_grid
from mixerzoo_mixers._parts import (
    check_tokens,
    head_width,
    inherit_qkv,
    qkv_heads,
    zero_padding,
)

LANDMARKS = 7  # a side, at width 1
STEPS = 10
LEAST = 1e-2  # tokens that a landmark stands for
EPS = 1e-6
FEATURES = 16
# Above this many tokens for each feature, the sums are made by Fourier transform: the maps would take more memory, and
# there it is no slower (at fewer tokens it is, on a CPU).
CROSSOVER = 200


# -- soft --


def newton_inverse(a: Tensor, steps: int) -> Tensor:
    """Approach the inverse of a, (..., M, M) symmetric and positive: X <- X (2 - a X) from X = 1 / |a|_1.

    What is left of an eigenvalue's error after t steps is (1 - e / |a|_1)^(2^t): the small ones are damped, and
    no entry grows beyond 2^t / |a|_1, however near to singular a is.
    """
    x = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device) / a.sum(dim=-1).amax(dim=-1)[..., None, None]
    for _ in range(steps):
        x = 2 * x - x @ a @ x
    return x


class Soft(nn.Module):
    """Gaussian-kernel attention through landmarks, linear in N. (B, N, D) -> (B, N, D).

    With g(a, b) = exp(-|a - b|^2 / (2 sqrt(K))), a head,
    S = g(q, z) g(z, z)^-1 g(z, k), a_n = sum_m S_nm v_m / sum_m S_nm, y_n = W [a_hn for all h; x_n] + b.

    The landmarks z are means of k over an even division of the grid, up to 7 * width a side, and the prefix tokens' k.
    The inverse is by Newton's iteration, 10 steps. g(z, z)^-1 g(z, k) 1, how many tokens each landmark stands for,
    is kept at 0.01 or more, so that no sum is near zero.

    Differs from the paper: q and k are two (there K = Q), to start from the teacher's; z is made of k alone, which
    keeps what is inverted symmetric and S exact where every token is a landmark; k is taken relative to its mean
    over the tokens, which no softmax would notice, and which brings g nearer to it; rows are normalised; plain
    means instead of a convolution make the landmarks; no convolution of v beside it.
    """

    def __init__(
        self, dim: int, heads: int, tokens: int, width: float, prefix: int, grid: tuple[int, int] | None
    ) -> None:
        super().__init__()
        rank = head_width(dim, heads, width)
        self.heads, self.tokens, self.prefix, self.grid = heads, tokens, prefix, need_grid("soft", grid)
        side = max(1, round(LANDMARKS * width))
        self.landmarks = (min(self.grid[0], side), min(self.grid[1], side))
        self.scale = (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * heads * rank)
        self.readout = nn.Linear(heads * rank + dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Mix x (B, N, D)."""
        check_tokens(x, self.tokens)
        q, k, v = qkv_heads(self.qkv(x), self.heads)
        k = k - k.mean(dim=2, keepdim=True)
        y = self._attend(q * self.scale, k, v, self._landmarks(k))
        mixed = y.transpose(1, 2).flatten(2).to(x.dtype)
        out: Tensor = self.readout(torch.cat((mixed, x), dim=-1))
        return out

    def _landmarks(self, k: Tensor) -> Tensor:
        cells = to_grid(k.flatten(0, 1), self.grid)
        pooled = from_grid(F.adaptive_avg_pool2d(cells, self.landmarks)).unflatten(0, k.shape[:2])
        return torch.cat((k[:, :, : self.prefix], pooled), dim=2) if self.prefix else pooled

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, z: Tensor) -> Tensor:
        scaled = z * self.scale
        half = (scaled * z).sum(dim=-1, keepdim=True) / 2  # (B, H, M, 1)
        size = (k * k).sum(dim=-1).unsqueeze(2) * (self.scale / 2)  # (B, H, 1, N)
        # |a - b|^2 by its three terms; rounding may make it negative.
        to_tokens = (scaled @ k.mT - half - size).clamp(max=0).exp()
        between = (scaled @ z.mT - half - half.mT).clamp(max=0).exp()
        # What g(q, z) has in common in a row cancels: as a softmax it cannot vanish, however far q is.
        from_queries = (q @ z.mT - half.mT).softmax(dim=-1)
        # A column of ones makes the denominator one more value.
        v = torch.cat((v, torch.ones_like(v[..., :1])), dim=-1)
        state = newton_inverse(between, STEPS) @ (to_tokens @ v)
        norm = from_queries @ state[..., -1:].clamp(min=LEAST)
        y: Tensor = (from_queries @ state[..., :-1]) / norm
        return y


# -- toeplitz_kernel --


def correlate_directly(q: Tensor, k: Tensor, v: Tensor, near: Tensor) -> Tensor:
    """Return sum_m near[m - n] (q_n . k_m) v_m in O(n^2).

    q and k are (B, H, n, F), v (B, H, n, C), near (H, 2 rows - 1, 2 columns - 1) with offset (0, 0) in the middle.
    """
    rows, columns = (size // 2 + 1 for size in near.shape[1:])
    # Windows of near, in the order of the queries: their cells are the keys in reverse. No (n, n) matrix is made.
    windows = near.flip(1, 2).unfold(1, rows, 1).unfold(2, columns, 1)
    k, v = k.flip(2), v.flip(2)
    scores = (q @ k.mT).unflatten(3, (rows, columns)).unflatten(2, (rows, columns)) * windows
    y: Tensor = scores.flatten(4).flatten(2, 3) @ v
    return y


def correlate_by_fft(q: Tensor, k: Tensor, v: Tensor, near: Tensor) -> Tensor:
    """Return the same in O(n log n), one feature after the other for the memory's sake."""
    rows, columns = (size // 2 + 1 for size in near.shape[1:])
    # Of a circular convolution over 2 r - 1 places or more, the r that are wanted are free from what comes round.
    size = [1 if rows == 1 else 2 * rows, 1 if columns == 1 else 2 * columns]
    spectrum = torch.fft.rfft2(near.flip(1, 2), s=size).unsqueeze(1)
    v = v.mT
    total = torch.zeros_like(v)
    for one_q, one_k in zip(q.unsqueeze(2).unbind(-1), k.unsqueeze(2).unbind(-1), strict=True):
        picture = (v * one_k).unflatten(3, (rows, columns))
        passed = torch.fft.irfft2(torch.fft.rfft2(picture, s=size) * spectrum, s=size)
        passed = passed[..., rows - 1 : 2 * rows - 1, columns - 1 : 2 * columns - 1]
        total = total + passed.flatten(3) * one_q
    return total.mT


class ToeplitzKernel(nn.Module):
    """Kernel attention with relative positions, O(N log N). (B, N, D) -> (B, N, D).

    A head,
    a_n = sum_m e^b[m - n] f(q_n).f(k_m) v_m / sum_m e^b[m - n] f(q_n).f(k_m), y_n = W [a_hn for all h; x_n] + b'.

    f(u) = exp(w_i . u / |u|), i up to F = min(16, R): the paper's positive random features,
    from orthogonal w of length sqrt(R), learnt from there on. m - n is (down, right) on the grid, or along the
    sequence where there is none or if causal (m <= n). The prefix is no part of that: b is one number for each of
    its keys, and 0 between its queries and the grid. Denominators are at least 1e-6, the largest e^b is 1.

    The sum over m is a Toeplitz product for each feature and value, done by FFT. Where N is small the O(N^2) sum is
    the faster way to the same.
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
        rank = head_width(dim, heads, width)
        self.heads, self.tokens, self.causal = heads, tokens, causal
        self.prefix = 0 if causal or grid is None else prefix
        self.grid = (1, tokens) if causal or grid is None else grid
        features = min(FEATURES, rank)
        self.by_fft = tokens > CROSSOVER * features
        self.qkv = nn.Linear(dim, 3 * heads * rank)
        directions = [nn.init.orthogonal_(torch.empty(features, rank), gain=rank**0.5) for _ in range(heads)]
        self.directions = nn.Parameter(torch.stack(directions))
        self.bias = nn.Parameter(torch.zeros(heads, 2 * self.grid[0] - 1, 2 * self.grid[1] - 1))
        self.prefix_bias = nn.Parameter(torch.zeros(heads, self.prefix)) if self.prefix else None
        self.readout = nn.Linear(heads * rank + dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mix x (B, N, D); where mask (B, N) is False, a token is not attended to."""
        check_tokens(x, self.tokens)
        x = zero_padding(x, mask)
        q, k, v = qkv_heads(self.qkv(x), self.heads)
        q, k = (self._features(t) for t in (q, k))
        if mask is not None:
            k = k.masked_fill(~mask[:, None, :, None], 0)
        # A column of ones makes the denominator one more value.
        y = self._sums(q, k, torch.cat((v, torch.ones_like(v[..., :1])), dim=-1))
        y = y[..., :-1] / y[..., -1:].clamp(min=EPS)
        mixed = y.transpose(1, 2).flatten(2).to(x.dtype)
        out: Tensor = self.readout(torch.cat((mixed, x), dim=-1))
        return out

    def _features(self, u: Tensor) -> Tensor:
        return (F.normalize(u, dim=-1) @ self.directions.to(u.dtype).mT).exp()

    def _weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Return e^b, that of the prefix keys (H, P, 1), and that of the grid for the prefix (H, 1, 1)."""
        bias = self.bias.to(dtype)
        if self.causal:
            bias = bias[..., : self.tokens]  # m <= n
        top = bias.amax(dim=(1, 2), keepdim=True)
        if self.prefix_bias is None:
            near = (bias - top).exp()
            return F.pad(near, (0, self.tokens - 1)) if self.causal else near, top, top
        first = self.prefix_bias.to(dtype).unsqueeze(-1)
        top = torch.maximum(top, first.amax(dim=1, keepdim=True)).clamp(min=0)
        return (bias - top).exp(), (first - top).exp(), (-top).exp()

    def _sums(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        near, first, flat = self._weights(q.dtype)
        correlate = correlate_by_fft if self.by_fft else correlate_directly
        if not self.prefix:
            return correlate(q, k, v, near)
        qp, kp, vp = (t[:, :, : self.prefix] for t in (q, k, v))
        qg, kg, vg = (t[:, :, self.prefix :] for t in (q, k, v))
        seen = (kp * first).mT @ vp
        grid = correlate(qg, kg, vg, near) + qg @ seen
        return torch.cat((qp @ (seen + flat * (kg.mT @ vg)), grid), dim=2)


def fit_relative(
    attention: Tensor, prefix: int, grid: tuple[int, int], steps: int = 10
) -> tuple[Tensor, Tensor]:
    """Fit e^b[m - n] / (their sum over m) to the rows of the grid in attention (H, N, N), by iterative scaling.

    Each step makes the sums along the diagonals agree. Returns b (H, offsets) and that of the prefix keys (H, P),
    so shifted that e^b is 1 on the average over the pairs of the grid that are ever attended to.
    """
    rows, columns = grid
    y, x = (t.flatten() for t in torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"))
    down, right = y[None] - y[:, None] + rows - 1, x[None] - x[:, None] + columns - 1
    offsets = (2 * rows - 1) * (2 * columns - 1)
    keys = torch.arange(offsets, offsets + prefix).expand(rows * columns, prefix)
    places = torch.cat((keys, down * (2 * columns - 1) + right), dim=1).flatten().to(attention.device)
    target = attention[:, prefix:].flatten(1)

    def sums(maps: Tensor) -> Tensor:
        total = torch.zeros(len(maps), offsets + prefix, dtype=maps.dtype, device=maps.device)
        return total.index_add_(1, places, maps.flatten(1))

    count, wanted = sums(torch.ones_like(target[:1])), sums(target)
    seen = wanted > 0
    wanted = wanted.clamp(min=1e-6 * float(attention.shape[-1]))
    b = torch.where(seen, (wanted / count).log(), -torch.inf)
    for _ in range(steps):
        maps = b[:, places].view_as(attention[:, prefix:]).softmax(dim=-1)
        b = b + torch.where(seen, (wanted / sums(maps)).log(), 0)
    used = torch.where(seen, count, 0)[:, :offsets]
    b = b - ((b[:, :offsets].exp() * used).sum(dim=1, keepdim=True) / used.sum(dim=1, keepdim=True)).log()
    b = torch.where(seen, b, 0)
    return b[:, :offsets], b[:, offsets:]


def inherit_soft(mixer: Soft, view: AttentionView) -> None:
    """Start with the teacher's q, k, v and output projections; see `inherit_qkv` for widths below 1."""
    inherit_qkv(view, mixer.qkv, mixer.readout, mixer.heads)


def inherit_toeplitz_kernel(mixer: ToeplitzKernel, view: AttentionView) -> None:
    """Start with the teacher's projections, and with b as its mean attention has it for f(q).f(k) all the same."""
    inherit_qkv(view, mixer.qkv, mixer.readout, mixer.heads)
    near, first = fit_relative(view.mean_attention, mixer.prefix, mixer.grid)
    mixer.bias.copy_(near.view_as(mixer.bias))
    if mixer.prefix_bias is not None:
        mixer.prefix_bias.copy_(first)


SOFT = MixerSpec(
    name="soft",
    build=Soft,
    summary="Gaussian-kernel attention through landmarks of the grid, and the token itself",
    widths=(0.5, 1.0),
    caps=Caps(exportable=True),
    inherit=inherit_soft,
    readout="readout",
    cost="N D^2 + N M D + H M^3",
    paper="SOFT, arXiv 2110.11945",
    letter="Sf",
)

TOEPLITZ_KERNEL = MixerSpec(
    name="toeplitz_kernel",
    build=ToeplitzKernel,
    summary="kernel attention with relative positions, by FFT, and the token itself",
    widths=(0.5, 1.0),
    caps=Caps(causal=True, masks=True, exportable=True),
    inherit=inherit_toeplitz_kernel,
    readout="readout",
    cost="N D^2 + min(N^2 D, N log N D F)",
    paper="arXiv 2106.12566",
    letter="Tk",
)
