"""Attention without softmax, linear in the number of tokens.

Shapes: B batch, N tokens, D model width, H heads, R head width of the mixer, C tokens in a chunk, G chunks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixerzoo import AttentionView, Caps, MixerSpec
from mixerzoo_mixers._parts import (
    at_least_float,
    chunks,
    head_width,
    inherit_qkv,
    split_heads,
    unchunk,
    zero_padding,
)

EPS = 1e-6
CHUNK = 64


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return sum_m (q_n . k_m) v_m / (sum_m q_n . k_m + eps), all (B, H, N, R), q and k not negative."""
    state = k.mT @ v
    norm = q @ k.sum(dim=2).unsqueeze(-1)
    return (q @ state) / (norm + EPS)


def attend_causally(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return the same with both sums over m <= n only: exact within a chunk, through its state from those before."""
    batch, heads, tokens, _ = q.shape
    # A column of ones makes the denominator one more value.
    v = torch.cat((v, torch.ones_like(v[..., :1])), dim=-1)
    q, k, v = (chunks(at_least_float(t).flatten(0, 1), CHUNK) for t in (q, k, v))  # (B * H, G, C, R)
    sums = (k.mT @ v).cumsum(dim=1)  # (B * H, G, R, R + 1)
    before = F.pad(sums, (0, 0, 0, 0, 1, 0))[:, :-1]
    y = (q @ k.mT).tril() @ v + q @ before
    y = unchunk(y, tokens)
    y = y.view(batch, heads, tokens, -1)
    return y[..., :-1] / (y[..., -1:] + EPS)


class LinearAttention(nn.Module):
    """Linear attention: a_n = sum_m f(q_n).f(k_m) v_m / (sum_m f(q_n).f(k_m) + eps), f = elu + 1, a head.

    y_n = W [a_hn for all h; x_n] + b. (B, N, D) -> (B, N, D); q, k, v are (R, D) maps of x with a bias. If
    causal, m <= n. No scale is applied to q.
    """

    def __init__(self, dim: int, heads: int, width: float, causal: bool) -> None:
        super().__init__()
        rank = head_width(dim, heads, width)
        self.heads, self.causal = heads, causal
        self.split = 2 * heads * rank  # q and k come before v
        self.qkv = nn.Linear(dim, 3 * heads * rank)
        self.readout = nn.Linear(heads * rank + dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mix x (B, N, D); where mask (B, N) is False, a token is not attended to."""
        x = zero_padding(x, mask)
        qk, v = self.qkv(x).tensor_split((self.split,), dim=-1)
        q, k = (F.elu(qk) + 1).chunk(2, dim=-1)
        q, k, v = (split_heads(t, self.heads).transpose(1, 2) for t in (q, k, v))
        if mask is not None:
            k = k.masked_fill(~mask[:, None, :, None], 0)
        y = attend_causally(q, k, v) if self.causal else attend(q, k, v)
        mixed = y.transpose(1, 2).flatten(2).to(x.dtype)
        out: Tensor = self.readout(torch.cat((mixed, x), dim=-1))
        return out


def inherit_linear_attention(mixer: LinearAttention, view: AttentionView) -> None:
    """Start with the teacher's q, k, v and output projections; see `inherit_qkv` for widths below 1."""
    inherit_qkv(view, mixer.qkv, mixer.readout, mixer.heads)


LINEAR_ATTENTION = MixerSpec(
    name="linear_attention",
    build=LinearAttention,
    summary="linear attention (elu + 1) and the token itself",
    widths=(0.5, 1.0),
    caps=Caps(any_length=True, causal=True, masks=True, exportable=True),
    inherit=inherit_linear_attention,
    readout="readout",
    cost="N D^2 + N D K",
    paper="arXiv 2006.16236",
    letter="K",
)
