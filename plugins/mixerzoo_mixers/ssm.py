"""State-space mixers: Mamba's selective scan, in both directions.

Shapes: B batch, N tokens, D model width, E inner width, S states of an inner unit, C tokens in a chunk, G chunks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixerzoo import Caps, MixerSpec
from mixerzoo_mixers._parts import at_least_float, chunks, compact, depthwise, expand, unchunk, zero_padding
from mixerzoo_mixers.kernels import usable
from mixerzoo_mixers.kernels.scan import scan as kernel_scan

STATES = 16
KERNEL = 4
CHUNK = 16  # about the square root of the usual N: 2 C steps of Python, each over all chunks at once


def selective_scan(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Return y_n = c_n . h_n, where h_n = exp(delta_n a) h_(n-1) + delta_n u_n b_n and h_0 = 0.

    u and delta are (B, N, E), a is (E, S) and negative, b and c are (B, N, S); y is (B, N, E). The scan goes over
    the chunks twice: from zero, for the state at each chunk's end; then, these carried on, from each chunk's true
    first state. Decays are only ever multiplied, never divided by, so nothing can overflow.
    """
    tokens = u.shape[1]
    # A token with delta 0 leaves the state as it is.
    split = [chunks(t, CHUNK) for t in (delta, delta * u, b, c)]  # (B, G, C, E) or (B, G, C, S)
    total = split[0].sum(dim=2)  # (B, G, E)
    deltas, inputs, bs, cs = (t.unbind(dim=2) for t in split)
    decays = [(d.unsqueeze(-1) * a).exp() for d in deltas]  # C of (B, G, E, S)
    drives = [d.unsqueeze(-1) * b_.unsqueeze(-2) for d, b_ in zip(inputs, bs, strict=True)]

    state = drives[0]
    for decay, drive in zip(decays[1:], drives[1:], strict=True):
        state = torch.addcmul(drive, decay, state)
    state = carry(state, total, a)

    ys = []
    for decay, drive, c_ in zip(decays, drives, cs, strict=True):
        state = torch.addcmul(drive, decay, state)
        ys.append((state * c_.unsqueeze(-2)).sum(dim=-1))
    return unchunk(torch.stack(ys, dim=2), tokens)


def carry(ends: Tensor, total: Tensor, a: Tensor) -> Tensor:
    """Return the state before each chunk, given those at their ends as if each had started from zero.

    ends (B, G, E, S), total (B, G, E): the sum of delta over each chunk, a (E, S); returns (B, G, E, S). A scan by
    doubling: after step i, a state knows of the 2^i chunks up to its own.
    """
    count = ends.shape[1]
    # torch.export must not see a loop over a dynamic number of chunks: enough steps for 2^20 tokens.
    steps = 16 if torch.compiler.is_compiling() else (count - 1).bit_length()
    decay = (total.unsqueeze(-1) * a).exp()
    for step in range(steps):
        ends = torch.addcmul(ends, decay, _later(ends, 1 << step))
        decay = decay * _later(decay, 1 << step)  # zeros where the state already knows everything
    return _later(ends, 1)


def _later(x: Tensor, count: int) -> Tensor:
    """Shift x (B, G, E, S) by `count` chunks, zeros coming in."""
    return F.pad(x, (0, 0, 0, 0, count, 0))[:, : x.shape[1]]


@cache
def fused_scan() -> Callable[..., Any] | None:
    """Return mamba_ssm's kernel, or None where it is not to be had."""
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except Exception:  # besides ImportError: whatever triton and a mismatched CUDA build raise
        return None
    return selective_scan_fn  # type: ignore[no-any-return]


def scan(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Do `selective_scan` by the fused kernel where there is one for these tensors, else in PyTorch."""
    if usable("scan", u, delta, a, b, c):
        return kernel_scan(u, delta, a, b, c)
    if u.is_cuda and u.dtype != torch.float64 and not torch.compiler.is_compiling():
        kernel = fused_scan()
        if kernel is not None:
            return scan_with(kernel, u, delta, a, b, c)
    return selective_scan(u, delta, a, b, c)


def scan_with(
    kernel: Callable[..., Any], u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor
) -> Tensor:
    """Call a scan with mamba_ssm's signature and layout, which has the tokens last."""
    tokens_last = (t.mT.contiguous() for t in (u, delta))
    states_last = (t.mT.contiguous() for t in (b, c))
    y: Tensor = kernel(*tokens_last, a.contiguous(), *states_last)
    return y.mT


class SelectiveSsm(nn.Module):
    """Mamba's block in one direction, (B, N, D) -> (B, N, D): state dict and values are those of mamba_ssm.Mamba.

    [u; z] = W_in x; u = silu(conv(u)), depthwise over the last 4 tokens; [dt; b; c] = W_x u;
    delta = softplus(W_dt dt + bias); y = scan(u, delta, -exp(A_log), b, c) + D u; out = W_out (y silu(z)).
    """

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.rank = math.ceil(dim / 16)
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, KERNEL, groups=inner, padding=KERNEL - 1)
        self.x_proj = nn.Linear(inner, self.rank + 2 * STATES, bias=False)
        self.dt_proj = nn.Linear(self.rank, inner)
        self.A_log = nn.Parameter(torch.arange(1, STATES + 1, dtype=torch.float).log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, dim, bias=False)
        # As mamba_ssm starts: time steps spread evenly, on a logarithmic scale, over 0.001 to 0.1.
        nn.init.uniform_(self.dt_proj.weight, -(self.rank**-0.5), self.rank**-0.5)
        step = torch.empty(inner).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        with torch.no_grad():
            self.dt_proj.bias.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mix x (B, N, D) causally; mask (B, N) is True for a first run of real tokens, then False."""
        u, z = self.in_proj(x).chunk(2, dim=-1)
        u = F.silu(depthwise(u, self.conv1d))
        step, b, c = self.x_proj(u).split((self.rank, STATES, STATES), dim=-1)
        delta = zero_padding(F.softplus(self.dt_proj(step)), mask)  # 0: the state passes by
        a = -at_least_float(self.A_log).exp()
        # Sums over many tokens: at least in single precision.
        wide, delta, b, c = (at_least_float(t) for t in (u, delta, b, c))
        y = (scan(wide, delta, a, b, c) + self.D * wide).to(u.dtype)
        out: Tensor = self.out_proj(y * F.silu(z))
        return out


class Mamba(nn.Module):
    """Selective state spaces in both directions: y = W [M_1(x); flip(M_2(flip(x))); x] + b. (B, N, D) -> (B, N, D).

    Each M is a `SelectiveSsm` of inner width 2 D * width. If causal, there is no second one. It inherits nothing:
    with the teacher's values in W_in and its output projection in W_out, the solved readout was no better.
    """

    def __init__(self, dim: int, width: float, causal: bool) -> None:
        super().__init__()
        inner = max(1, round(2 * dim * width))
        self.ahead = SelectiveSsm(dim, inner)
        self.back = None if causal else SelectiveSsm(dim, inner)
        self.readout = nn.Linear((2 if causal else 3) * dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mix x (B, N, D); tokens where mask (B, N) is False are passed over."""
        if mask is not None:
            x, mask, places = compact(zero_padding(x, mask), mask)
        features = [self.ahead(x, mask)]
        if self.back is not None:
            features.append(self.back(x.flip(1), None if mask is None else mask.flip(1)).flip(1))
        y: Tensor = self.readout(torch.cat((*features, x), dim=-1))
        return y if mask is None else expand(y, places)


MAMBA = MixerSpec(
    name="mamba",
    build=Mamba,
    summary="Mamba's selective scan in both directions, and the token itself",
    widths=(0.5, 1.0),
    caps=Caps(any_length=True, causal=True, masks=True, exportable=True),
    readout="readout",
    cost="N D^2 + N D states",
    paper="Mamba, arXiv 2312.00752; both directions as in Vision Mamba, arXiv 2401.09417",
    letter="M",
)
