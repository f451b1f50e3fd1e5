"""Mixers of a fixed length: what goes from token to token is a learnt map, the same for every input.

Shapes: B batch, N tokens, D model width, H heads, K the teacher's head width, R the mixer's, T hidden tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixerzoo import AttentionView, Caps, MixerSpec
from mixerzoo.units import Share, Units, places, sized
from mixerzoo_mixers._parts import (
    check_tokens,
    columns,
    head_width,
    inherit_values,
    split_heads,
    zero_padding,
    zipped,
)

MULTIPLE = 4  # features of a pruned head


def mix(mixing: Tensor, value: Tensor, causal: bool) -> Tensor:
    """Apply each head's matrix (H, N, N) to its part of value (B, N, H*R); returns (B, N, H*R)."""
    if causal:
        mixing = mixing.tril()
    # einsum makes it one matrix product a head, (N, N) by (N, B*R): the matrices are not repeated over the batch.
    heads = split_heads(value, mixing.shape[0])
    return torch.einsum("hnm,bmhr->bnhr", mixing, heads).flatten(2)


class Static(nn.Module):
    """A fixed matrix a head: y_n = W [sum_m A_hnm V_h x_m for all h; x_n] + b. (B, N, D) -> (B, N, D).

    A is (H, N, N), lower triangular if causal; V_h is (R, D). The token itself beside the mixed part lets the
    readout make up for much of what an average map misses.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        tokens: int,
        width: float,
        causal: bool,
        sizes: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__()
        rank = sized(sizes, "features", head_width(dim, heads, width))
        heads = sized(sizes, "heads", heads)
        self.tokens, self.causal = tokens, causal
        self.mixing = nn.Parameter(torch.randn(heads, tokens, tokens) * tokens**-0.5)
        self.value = nn.Linear(dim, heads * rank, bias=False)
        self.readout = nn.Linear(heads * rank + dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mix x (B, N, D); where mask (B, N) is False, a token adds nothing to the others."""
        check_tokens(x, self.tokens)
        x = zero_padding(x, mask)
        mixed = mix(self.mixing, self.value(x), self.causal)
        y: Tensor = self.readout(torch.cat((mixed, x), dim=-1))
        return y


def inherit_static(mixer: Static, view: AttentionView) -> None:
    """Start as the teacher's attention with its mean map; see `inherit_values` for widths below 1."""
    mixer.mixing.copy_(view.mean_attention)
    inherit_values(view, split_heads(mixer.value.weight, len(mixer.mixing), 0), mixer.readout)


def head_features(heads: int, rank: int, *, parts: int, bias: bool) -> Units:
    """Return the features of each head of `mix`: their rows of the layer that makes them, and of the readout.

    Args:
        heads: H.
        rank: R.
        parts: 1 for a layer `value`; 2 for `value_gate`, which makes gates too.
        bias: whether that layer has one.
    """
    layer = "value" if parts == 1 else "value_gate"
    rows = places(parts, heads, rank, units=2, rows=1)
    biases = [columns(f"{layer}.bias", rows, dim=0, counts=False)] if bias else []
    readout = columns("readout.weight", places(heads, rank, units=1, rows=0))
    return zipped(columns(f"{layer}.weight", rows, dim=0), *biases, readout, multiple=MULTIPLE)


def static_units(mixer: Static) -> dict[str, Units]:
    """Return the heads, and the features of each."""
    heads = len(mixer.mixing)
    rank = mixer.value.out_features // heads
    return {
        "heads": zipped(
            columns("mixing", places(heads, units=0), dim=0),
            columns("value.weight", places(heads, rank, units=0), dim=0),
            columns("readout.weight", places(heads, rank, units=0)),
        ),
        "features": head_features(heads, rank, parts=1, bias=False),
    }


class TokenMlp(nn.Module):
    """MLP-Mixer's token-mixing MLP: y_n = W [(W2_h gelu(W1_h V_h x + b1_h) + b2_h)_n for all h; x_n] + b.

    (B, N, D) -> (B, N, D). It works along the tokens, the same for every channel of a head: V_h is (K, D), W1_h
    (T, N), W2_h (N, T), with T about N * width hidden tokens, an even number. Unlike in the paper, each head has an
    MLP of its own, and works on values: so the teacher's heads can be inherited. If causal, hidden token t belongs
    to the token `position[t]`: it sees none that come later, and is seen by none that come earlier.
    """

    position: Tensor

    def __init__(
        self,
        dim: int,
        heads: int,
        tokens: int,
        width: float,
        causal: bool,
        sizes: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__()
        rank = head_width(dim, heads, 1.0)
        heads = sized(sizes, "heads", heads)
        pairs = max(1, round(tokens * width / 2))
        hidden = sized(sizes, "hidden", 2 * pairs)
        self.tokens, self.causal = tokens, causal
        self.value = nn.Linear(dim, heads * rank, bias=False)
        self.weight1 = nn.Parameter(torch.randn(heads, hidden, tokens) * tokens**-0.5)
        self.bias1 = nn.Parameter(torch.zeros(heads, hidden))
        self.weight2 = nn.Parameter(torch.randn(heads, tokens, hidden) * hidden**-0.5)
        self.bias2 = nn.Parameter(torch.zeros(heads, tokens))
        self.readout = nn.Linear(heads * rank + dim, dim)
        position = torch.arange(pairs) * tokens // pairs
        self.register_buffer("position", position.repeat(2), persistent=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mix x (B, N, D); where mask (B, N) is False, a token adds nothing to the others."""
        check_tokens(x, self.tokens)
        x = zero_padding(x, mask)
        weight1, weight2 = self._causal_weights() if self.causal else (self.weight1, self.weight2)
        value = split_heads(self.value(x), len(weight1))
        # In this order both are one matrix product a head, and nothing is copied between them.
        hidden = torch.einsum("htn,bnhk->htbk", weight1, value) + self.bias1[:, :, None, None]
        mixed = torch.einsum("hnt,htbk->bnhk", weight2, F.gelu(hidden)) + self.bias2.mT.unsqueeze(-1)
        y: Tensor = self.readout(torch.cat((mixed.flatten(2), x), dim=-1))
        return y

    def _causal_weights(self) -> tuple[Tensor, Tensor]:
        token = torch.arange(self.tokens, device=self.position.device)
        later = token > self.position.unsqueeze(1)  # (T, N)
        earlier = token.unsqueeze(1) < self.position  # (N, T)
        return self.weight1.masked_fill(later, 0), self.weight2.masked_fill(earlier, 0)


def inherit_token_mlp(mixer: TokenMlp, view: AttentionView) -> None:
    """Start as the teacher's attention with its mean map, as far as T / 2 components give it.

    gelu(a) - gelu(-a) = a: two hidden tokens make a linear one. The components are the leading singular ones of each
    head's map; if causal, its rows at evenly spaced tokens, each of which stands for those up to the next.
    """
    maps = view.mean_attention
    pairs, tokens = len(mixer.position) // 2, maps.shape[-1]
    kept = min(pairs, tokens)
    into, out = torch.zeros_like(mixer.weight1[:, :pairs]), torch.zeros_like(mixer.weight2[..., :pairs])
    if mixer.causal:
        first = mixer.position[:pairs]
        latest = (first <= torch.arange(tokens, device=first.device).unsqueeze(1)).sum(dim=1) - 1
        into.copy_(maps[:, first])
        out.copy_(F.one_hot(latest, pairs))
    else:
        u, s, vh = torch.linalg.svd(maps.double())
        root = s.sqrt()[:, :kept]
        into[:, :kept] = (root.unsqueeze(-1) * vh[:, :kept]).to(into.dtype)
        out[..., :kept] = (root.unsqueeze(1) * u[..., :kept]).to(out.dtype)
    mixer.weight1.copy_(torch.cat((into, -into), dim=1))
    mixer.weight2.copy_(torch.cat((out, -out), dim=2))
    mixer.bias1.zero_()
    mixer.bias2.zero_()
    inherit_values(view, split_heads(mixer.value.weight, len(maps), 0), mixer.readout)


def token_mlp_units(mixer: TokenMlp) -> dict[str, Units]:
    """Return the heads and, unless causal (each is then a certain token's), the hidden tokens of each."""
    heads, hidden, _ = mixer.weight1.shape
    rank = mixer.value.out_features // heads
    own = places(heads, units=0)
    found = {
        "heads": zipped(
            columns("value.weight", places(heads, rank, units=0), dim=0),
            columns("weight1", own, dim=0),
            columns("bias1", own, dim=0, counts=False),
            columns("weight2", own, dim=0),
            columns("bias2", own, dim=0, counts=False),
            columns("readout.weight", places(heads, rank, units=0)),
        )
    }
    if not mixer.causal:
        (all_hidden,) = places(hidden, units=0)
        parts = (("weight1", 1, True), ("bias1", 1, False), ("weight2", 2, True))
        rows = tuple(
            tuple(
                Share(parameter=name, dim=dim, places=all_hidden, only=(0, head), counts=counts)
                for name, dim, counts in parts
            )
            for head in range(heads)
        )
        found["hidden"] = Units(rows=rows, multiple=MULTIPLE)
    return found


STATIC = MixerSpec(
    name="static",
    build=Static,
    summary="a fixed token-mixing matrix a head, and the token itself",
    widths=(0.25, 0.5, 1.0),
    caps=Caps(causal=True, masks=True, exportable=True),
    inherit=inherit_static,
    readout="readout",
    units=static_units,
    cost="N D^2 + N^2 D",
    paper="the random Synthesizer, arXiv 2005.00743, with the teacher's mean attention for the random map",
    letter="S",
)

TOKEN_MLP = MixerSpec(
    name="token_mlp",
    build=TokenMlp,
    summary="an MLP along the tokens a head, and the token itself",
    widths=(0.125, 0.25, 0.5),
    caps=Caps(causal=True, masks=True, exportable=True),
    inherit=inherit_token_mlp,
    readout="readout",
    units=token_mlp_units,
    cost="N D^2 + N^2 D",
    paper="MLP-Mixer, arXiv 2105.01601, with an MLP a head",
    letter="T",
)
