"""Attention without softmax, linear in the number of tokens: features of q and k in place of exp(q . k).

Shapes: B batch, N tokens, D model width, H heads, R head width of the mixer, F features of a query or key, C tokens
in a chunk, G chunks.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixerzoo import AttentionView, Caps, MixerSpec
from mixerzoo.units import Units, places, sized
from mixerzoo_mixers._parts import (
    at_least_float,
    chunks,
    columns,
    head_width,
    inherit_qkv,
    split_heads,
    unchunk,
    zero_padding,
    zipped,
)

EPS = 1e-6
CHUNK = 64
SHARPNESS = 1.5


def sums(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return sum_m (q_n . k_m) v_m, (B, H, N, R), and sum_m q_n . k_m, (B, H, N, 1); q and k are (B, H, N, F)."""
    # The second sum is one more column of the first one's state: one product for both.
    state = torch.cat((k.mT @ v, k.sum(dim=2).unsqueeze(-1)), dim=-1)
    y = q @ state
    return y[..., :-1], y[..., -1:]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return sum_m (q_n . k_m) v_m / (sum_m q_n . k_m + eps), (B, H, N, R); q and k (B, H, N, F) not negative."""
    mixed, norm = sums(q, k, v)
    return mixed / (norm + EPS)


def attend_causally(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return the same with both sums over m <= n only: exact within a chunk, through its state from those before."""
    batch, heads, tokens, _ = q.shape
    # A column of ones makes the denominator one more value.
    v = torch.cat((v, torch.ones_like(v[..., :1])), dim=-1)
    q, k, v = (chunks(at_least_float(t).flatten(0, 1), CHUNK) for t in (q, k, v))  # (B * H, G, C, .)
    states = (k.mT @ v).cumsum(dim=1)  # (B * H, G, F, R + 1)
    before = F.pad(states, (0, 0, 0, 0, 1, 0))[:, :-1]
    y = (q @ k.mT).tril() @ v + q @ before
    y = unchunk(y, tokens)
    y = y.view(batch, heads, tokens, -1)
    return y[..., :-1] / (y[..., -1:] + EPS)


class FeatureAttention(nn.Module):
    """Attention with weights f(q_n).f(k_m), for a feature map f that is nowhere negative. (B, N, D) -> (B, N, D).

    a_n = sum_m f(q_n).f(k_m) v_m / (sum_m f(q_n).f(k_m) + 1e-6) a head; y_n = W [a_hn for all h; x_n] + b. q, k, v
    are (R, D) maps of x with a bias. If causal, m <= n. No scale is applied to q. A subclass says what f is.
    """

    def __init__(
        self, dim: int, heads: int, width: float, causal: bool, sizes: Mapping[str, int] | None = None
    ) -> None:
        super().__init__()
        rank = head_width(dim, heads, width)
        heads = sized(sizes, "heads", heads)
        self.heads, self.causal = heads, causal
        self.split = 2 * heads * rank  # q and k come before v
        self.qkv = nn.Linear(dim, 3 * heads * rank)
        self.readout = nn.Linear(heads * rank + dim, dim)

    def features(self, qk: Tensor) -> Tensor:
        """Return f of the queries and keys of all heads: (B, N, 2 * H, R) to (B, N, 2 * H, F)."""
        raise NotImplementedError

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mix x (B, N, D); where mask (B, N) is False, a token is not attended to."""
        x = zero_padding(x, mask)
        qk, v = at_least_float(self.qkv(x)).tensor_split((self.split,), dim=-1)
        # Heads are only ever seen through views: no copies for a batch of one.
        q, k = self.features(split_heads(qk, 2 * self.heads)).transpose(1, 2).chunk(2, dim=1)
        v = split_heads(v, self.heads).transpose(1, 2)
        if mask is not None:
            k = k.masked_fill(~mask[:, None, :, None], 0)
        y = attend_causally(q, k, v) if self.causal else attend(q, k, v)
        mixed = y.transpose(1, 2).flatten(2).to(x.dtype)
        out: Tensor = self.readout(torch.cat((mixed, x), dim=-1))
        return out


class LinearAttention(FeatureAttention):
    """Linear attention: f = elu + 1."""

    def features(self, qk: Tensor) -> Tensor:
        """Return elu + 1."""
        # The same as F.elu(qk) + 1 in a third of the time on a CPU, and exact far below zero.
        return qk.relu() + qk.clamp(max=0).exp()


class ReluAttention(FeatureAttention):
    """ReLU linear attention: f = relu, as in EfficientViT, without its several scales (those are `lite_mla`).

    A query without a positive entry attends to nothing: its a_n is 0.
    """

    def features(self, qk: Tensor) -> Tensor:
        """Return relu."""
        return qk.relu()


class SoftmaxLinear(FeatureAttention):
    """Linear attention with learnt features (Hedgehog): f(u) = softmax([u; -u]), F = 2 R.

    The paper has f(u) = softmax([M u; -M u]) with a learnt (R, R) matrix M for the queries and one for the keys of
    each head, after projections that are kept. Here q and k are learnt, and M is part of them: M (Q x) = (M Q) x.
    """

    def features(self, qk: Tensor) -> Tensor:
        """Return softmax([u; -u])."""
        return torch.cat((qk, -qk), dim=-1).softmax(dim=-1)


def inherit_features(mixer: FeatureAttention, view: AttentionView) -> None:
    """Start with the teacher's q, k, v and output projections; see `inherit_qkv` for widths below 1."""
    inherit_qkv(view, mixer.qkv, mixer.readout, mixer.heads)


def inherit_softmax_linear(mixer: SoftmaxLinear, view: AttentionView) -> None:
    """Start in the same way, with M = 1.5: of a few such M, maps are nearest to softmax attention's with this one."""
    inherit_features(mixer, view)
    mixer.qkv.weight[: mixer.split] *= SHARPNESS
    mixer.qkv.bias[: mixer.split] *= SHARPNESS


def attention_heads(mixer: FeatureAttention) -> dict[str, Units]:
    """Return the heads: their q, k and v, and their columns of the readout."""
    heads, rank = mixer.heads, mixer.split // (2 * mixer.heads)
    return {
        "heads": zipped(
            columns("qkv.weight", places(3, heads, rank, units=1), dim=0),
            columns("qkv.bias", places(3, heads, rank, units=1), dim=0, counts=False),
            columns("readout.weight", places(heads, rank, units=0)),
        )
    }


LINEAR_ATTENTION = MixerSpec(
    name="linear_attention",
    build=LinearAttention,
    summary="linear attention (elu + 1) and the token itself",
    widths=(0.5, 1.0),
    caps=Caps(any_length=True, causal=True, masks=True, exportable=True),
    inherit=inherit_features,
    readout="readout",
    units=attention_heads,
    cost="N D^2 + N D K",
    paper="arXiv 2006.16236",
    letter="K",
)

RELU_ATTENTION = MixerSpec(
    name="relu_attention",
    build=ReluAttention,
    summary="linear attention (ReLU) and the token itself",
    widths=(0.5, 1.0),
    caps=Caps(any_length=True, causal=True, masks=True, exportable=True),
    inherit=inherit_features,
    readout="readout",
    units=attention_heads,
    cost="N D^2 + N D K",
    paper="EfficientViT, arXiv 2205.14756, on one scale",
    letter="Kr",
)

SOFTMAX_LINEAR = MixerSpec(
    name="softmax_linear",
    build=SoftmaxLinear,
    summary="linear attention with learnt softmax features, and the token itself",
    widths=(0.5, 1.0),
    caps=Caps(any_length=True, causal=True, masks=True, exportable=True),
    inherit=inherit_softmax_linear,
    readout="readout",
    units=attention_heads,
    cost="N D^2 + N D K",
    paper="Hedgehog, arXiv 2402.04347",
    letter="Kh",
)
