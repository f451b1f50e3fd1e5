"""Mamba-2: a matrix state that forgets by one number a head and token, in both directions.

Shapes: B batch, N tokens, D model width, H heads, K head width of the teacher, P head width of the mixer, S
states, W directions (2, or 1 if causal), G chunks of C tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixerzoo import AttentionView, Caps, MixerSpec
from mixerzoo_mixers._chunked import (
    carry,
    chunk_size,
    cut,
    kept,
    mean_rates,
    softplus_inverse,
    spread_steps,
    triangle,
)
from mixerzoo_mixers._parts import (
    at_least_float,
    compact,
    depthwise,
    expand,
    factor,
    head_width,
    split_heads,
    unchunk,
    zero_padding,
)

REACH = 3  # tokens before and behind that the convolution sees
NORM_EPS = 1e-5


def ssd(q: Tensor, k: Tensor, v: Tensor, step: Tensor, decay: Tensor) -> Tensor:
    """Return y_n = sum_(m <= n) exp(decay_(m+1) + ... + decay_n) (q_n . k_m) step_m v_m, Mamba-2's scan.

    q, k (B, H, N, S) are its C and B, v (B, H, N, P) its X, step and decay, never above 0, (B, H, W, N); the second
    direction goes from the last token to the first. Returns (B, H, G, W, C, P), the chunks of (B, H, W, N, P).
    """
    size, ways = chunk_size(q.shape[2]), step.shape[2]
    q, k, v = (cut(t, size) for t in (q, k, v))
    step, decay = (cut(t.mT, size).mT for t in (step, decay))  # (B, H, G, W, C)
    left = torch.stack([kept(d, bool(way)) for way, d in enumerate(decay.unbind(dim=3))], dim=3)
    hidden = torch.stack([triangle(size, left, bool(way)) for way in range(ways)])
    seen = (left.unsqueeze(-1) - left.unsqueeze(-2) + hidden).exp() * step.unsqueeze(-2)
    # Both directions at once: their weights are rows of one matrix.
    rows = ((q @ k.mT).unsqueeze(3) * seen).flatten(3, 4)
    y: Tensor = (rows @ v).unflatten(3, (ways, size))
    if q.shape[2] == 1:
        return y
    total = decay.sum(dim=-1)
    leave = ((total.unsqueeze(-1) - left).exp() * step).mT.unsqueeze(-1)  # (B, H, G, C, W, 1)
    ends = ((leave * k.unsqueeze(4)).flatten(4).mT @ v).unflatten(3, (ways, -1))  # (B, H, G, W, S, P)
    each = zip(ends.flatten(4).unbind(dim=3), total.unbind(dim=3), (False, True), strict=False)
    before = torch.stack([carry(*ending) for ending in each], dim=3).view_as(ends)
    return y + (left.exp().unsqueeze(-1) * q.unsqueeze(3)) @ before


class GatedNorm(nn.Module):
    """RMS norm of y silu(z), a head and direction alone, with a weight for each channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        """Gate y (B, N, H, W, P) by z (B, N, H * P); returns (B, N, H * W * P)."""
        y = y * split_heads(F.silu(z), y.shape[2]).unsqueeze(3)
        y = y * torch.rsqrt(y.square().mean(dim=-1, keepdim=True) + NORM_EPS)
        return y.flatten(2) * self.weight


class Mamba2(nn.Module):
    """Mamba-2 in both directions. (B, N, D) -> (B, N, D).

    [z; u; dt] = W_in x; u = silu(conv(u)), depthwise over three tokens on each side, is [x; B; C], all of them a
    head; dt = softplus(dt + dt_bias); h_n = exp(-exp(A_log) dt_n) h_(n-1) + dt_n B_n x_n^T, y_n = C_n^T h_n + D x_n
    a head and direction; features = norm(y silu(z)), RMS a head and direction; out = W [features; x] + b. The
    features are [head 0 forward, head 0 back, head 1 forward, ...], and so are dt, A_log, D and the norm's weight:
    in groups of one a head, a grouped projection of them sees both directions of one head and nothing else.

    If causal, the block is mamba_ssm's Mamba2 with as many groups as heads, without its W_out: values and state dict
    are the same (its convolution sees three tokens before each). Otherwise the directions share all projections but
    dt's, which takes two thirds of the time of two blocks. P is 2 K * width, the states are as wide as the teacher's K.
    """

    def __init__(self, dim: int, heads: int, width: float, causal: bool) -> None:
        super().__init__()
        states = head_width(dim, heads, 1)
        self.heads, self.ways = heads, 1 if causal else 2
        self.inner = heads * head_width(2 * dim, heads, width)
        channels = self.inner + 2 * heads * states
        self.sizes = (self.inner, channels, heads * self.ways)
        self.parts = (self.inner, heads * states, heads * states)
        self.in_proj = nn.Linear(dim, sum(self.sizes), bias=False)
        taps = REACH + 1 if causal else 2 * REACH + 1
        self.conv1d = nn.Conv1d(channels, channels, taps, groups=channels, padding=REACH)
        self.dt_bias = nn.Parameter(softplus_inverse(spread_steps(heads * self.ways)))
        self.A_log = nn.Parameter(torch.empty(heads * self.ways).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(heads * self.ways))
        self.norm = GatedNorm(self.ways * self.inner)
        self.readout = nn.Linear(self.ways * self.inner + dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mix x (B, N, D); tokens where mask (B, N) is False are passed over."""
        if mask is not None:
            x, mask, places = compact(zero_padding(x, mask), mask)
        y: Tensor = self.readout(torch.cat((self._features(x, mask), x), dim=-1))
        return y if mask is None else expand(y, places)

    def _features(self, x: Tensor, mask: Tensor | None) -> Tensor:
        z, u, step = self.in_proj(x).split(self.sizes, dim=-1)
        u = at_least_float(F.silu(depthwise(u, self.conv1d)))
        v, k, q = (split_heads(t, self.heads).transpose(1, 2) for t in u.split(self.parts, dim=-1))
        step = F.softplus(at_least_float(step) + self.dt_bias)
        step = zero_padding(step, mask)  # 0: the state passes by
        decay = -at_least_float(self.A_log).exp() * step
        step, decay = (t.mT.unflatten(1, (self.heads, self.ways)) for t in (step, decay))
        y = ssd(q, k, v, step, decay).permute(0, 2, 4, 1, 3, 5)
        y = unchunk(y.flatten(3), x.shape[1]).unflatten(2, (self.heads, self.ways, -1))
        skip = self.D.view(self.heads, self.ways, 1)
        y = torch.addcmul(y, skip.to(y.dtype), v.transpose(1, 2).unsqueeze(3))
        features: Tensor = self.norm(y, at_least_float(z)).to(x.dtype)
        return features


def inherit_mamba2(mixer: Mamba2, view: AttentionView) -> None:
    """Start x, B and C as the teacher's v, k and q, and as far-sighted as its mean maps are.

    The duality of the paper, as in The Mamba in the Llama (arXiv 2408.15237); the convolution passes every token
    through. What the gate and the norm make of it is another thing than the teacher's: the readout starts at random.
    """
    heads, inner = mixer.heads, mixer.inner
    q, k, v = (
        split_heads(torch.cat((w, b.unsqueeze(-1)), dim=-1), heads, 0)
        for w, b in (
            (view.q_weight, view.q_bias),
            (view.k_weight, view.k_bias),
            (view.v_weight, view.v_bias),
        )
    )
    _, v = factor(split_heads(view.out_weight, heads).transpose(0, 1), v, inner // heads)
    scale = k.shape[1] ** -0.25
    conv = mixer.conv1d
    assert conv.bias is not None
    conv.weight.zero_()
    conv.weight[..., REACH] = 1
    conv.bias.zero_()
    weights = mixer.in_proj.weight[inner : inner + len(conv.bias)].split(mixer.parts)
    for weight, bias, t in zip(weights, conv.bias.split(mixer.parts), (v, scale * k, scale * q), strict=True):
        kept_rows = t.shape[1]
        split_heads(weight, heads, 0)[:, :kept_rows] = t[..., :-1]
        split_heads(bias, heads)[:, :kept_rows] = t[..., -1]
    rates = mean_rates(view.mean_attention, mixer.ways == 1).repeat_interleave(mixer.ways)
    mixer.A_log.copy_((rates / F.softplus(mixer.dt_bias)).log())


MAMBA2 = MixerSpec(
    name="mamba2",
    build=Mamba2,
    summary="Mamba-2 in both directions, and the token itself",
    widths=(0.5, 1.0),
    caps=Caps(any_length=True, causal=True, masks=True, exportable=True),
    inherit=inherit_mamba2,
    readout="readout",
    cost="N D^2 + N D K",
    paper="Mamba-2, arXiv 2405.21060; both directions with one set of projections as in Hydra, arXiv 2407.09941",
    letter="Mb",
)
