"""Mixers of a fixed length: what goes from token to token is a learnt matrix, the same for every input.

Shapes: B batch, N tokens, D model width, H heads, R head width of the mixer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mixerzoo import AttentionView, Caps, MixerSpec
from mixerzoo_mixers._parts import check_tokens, head_width, inherit_values, split_heads, zero_padding


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

    def __init__(self, dim: int, heads: int, tokens: int, width: float, causal: bool) -> None:
        super().__init__()
        rank = head_width(dim, heads, width)
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


class GluMlp(nn.Module):
    """Gated token mixing: y_n = W [g(x_n) * sum_m A_hnm (V_h x_m + c_h) for all h; x_n] + b. (B, N, D) -> (B, N, D).

    A is (H, N, N), lower triangular if causal; V_h is (R, D). g(x) = 2 sigmoid(G x + e) is 1 where its weights
    are 0: then this is `Static`.
    """

    def __init__(self, dim: int, heads: int, tokens: int, width: float, causal: bool) -> None:
        super().__init__()
        rank = head_width(dim, heads, width)
        self.tokens, self.causal = tokens, causal
        self.mixing = nn.Parameter(torch.randn(heads, tokens, tokens) * tokens**-0.5)
        self.value_gate = nn.Linear(dim, 2 * heads * rank)  # value and gate in one product
        self.readout = nn.Linear(heads * rank + dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mix x (B, N, D); where mask (B, N) is False, a token adds nothing to the others."""
        check_tokens(x, self.tokens)
        x = zero_padding(x, mask)
        value, gate = self.value_gate(x).chunk(2, dim=-1)
        mixed = mix(self.mixing, zero_padding(value, mask), self.causal)
        y: Tensor = self.readout(torch.cat((mixed * (2 * gate.sigmoid()), x), dim=-1))
        return y


def inherit_glu(mixer: GluMlp, view: AttentionView) -> None:
    """Start as the teacher's attention with its mean map and an open gate."""
    mixer.mixing.copy_(view.mean_attention)
    mixer.value_gate.weight.zero_()
    mixer.value_gate.bias.zero_()
    value = mixer.value_gate.weight.chunk(2)[0]
    nn.init.kaiming_uniform_(value, a=5**0.5)  # for units that the teacher has no counterpart for
    inherit_values(view, split_heads(value, len(mixer.mixing), 0), mixer.readout)


STATIC = MixerSpec(
    name="static",
    build=Static,
    summary="a fixed token-mixing matrix a head, and the token itself",
    widths=(0.25, 0.5, 1.0),
    caps=Caps(causal=True, masks=True, exportable=True),
    inherit=inherit_static,
    readout="readout",
    cost="N D^2 + N^2 D",
    paper="the random Synthesizer, arXiv 2005.00743, with the teacher's mean attention for the random map",
    letter="S",
)

GLU_MLP = MixerSpec(
    name="glu_mlp",
    build=GluMlp,
    summary="a gated fixed token-mixing matrix a head, and the token itself",
    widths=(0.5, 1.0),
    caps=Caps(causal=True, masks=True, exportable=True),
    inherit=inherit_glu,
    readout="readout",
    cost="N D^2 + N^2 D",
    paper="own design; gating after GLU, arXiv 1612.08083, and gMLP, arXiv 2105.08050; GLUs instead of "
    "attention: Activator, arXiv 2405.15953",
    letter="G",
)
