"""Mixers of a fixed length in which a token's own content gates what it gets from the others.

Shapes: B batch, N tokens, D model width, H heads, K the teacher's head width, R the mixer's, E = H * R units.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixerzoo import AttentionView, Caps, MixerSpec
from mixerzoo.units import Units, places, sized
from mixerzoo_mixers._parts import (
    UnitNorm,
    check_tokens,
    columns,
    head_width,
    inherit_values,
    split_heads,
    zero_padding,
    zipped,
)
from mixerzoo_mixers.token_mlp import MULTIPLE, head_features, mix

OPEN = 1.1444507  # gelu(OPEN) = 1: with this bias, a gelu gate without input lets everything through


def fill_units(weight: Tensor, bias: Tensor, heads: int, *sources: tuple[Tensor, Tensor]) -> None:
    """Start units, weight (E, D) and bias (E,), with those of the sources, (H*K, D) and (H*K,) each, in place.

    Head by head, one source after the other, as far as both go; further units stay as they are.
    """
    rows = torch.cat([split_heads(torch.cat((w, b.unsqueeze(1)), 1), heads, 0) for w, b in sources], dim=1)
    kept = min(len(weight) // heads, rows.shape[1])
    split_heads(weight, heads, 0)[:, :kept] = rows[:, :kept, :-1]
    split_heads(bias, heads, 0)[:, :kept] = rows[:, :kept, -1]


def fill_value_gate(
    view: AttentionView, value: tuple[Tensor, Tensor], gate: tuple[Tensor, Tensor], heads: int
) -> None:
    """Start values and gates, a weight (E, D) and a bias (E,) each: v, then k; gated by q, then -q.

    What a token looks for says best how much it takes of what there is on average: with the readout in closed form,
    gates by the teacher's queries leave less error than open or random gates, or gates by keys or values. The value
    biases are zero: the teacher's go into the readout's.
    """
    zero = torch.zeros_like(view.v_bias)
    for bias in (value[1], gate[1]):
        bias.zero_()
    fill_units(*value, heads, (view.v_weight, zero), (view.k_weight, zero))
    fill_units(*gate, heads, (view.q_weight, view.q_bias), (-view.q_weight, -view.q_bias))


def fill_readout(view: AttentionView, readout: nn.Linear, heads: int, gain: Tensor | float) -> None:
    """Start a readout over [E units, rest] with the teacher's output projection times `gain`; the rest at zero."""
    readout.weight.zero_()
    out = split_heads(view.out_weight, heads)
    mixed = split_heads(readout.weight[:, : -view.out_weight.shape[0]], heads)
    kept = min(out.shape[2], mixed.shape[2])
    mixed[..., :kept] = gain * out[..., :kept]
    readout.bias.copy_(view.out_bias + view.out_weight @ view.v_bias)


def spread(view: AttentionView) -> Tensor:
    """Root mean square of the teacher's values, their bias aside, for inputs of unit variance."""
    return view.v_weight.square().sum(dim=1).mean().sqrt()


class GluMlp(nn.Module):
    """Gated token mixing: y_n = W [g(x_n) * sum_m A_hnm (V_h x_m + c_h) for all h; x_n] + b. (B, N, D) -> (B, N, D).

    A is (H, N, N), lower triangular if causal; V_h is (R, D). g(x) = 2 sigmoid(G x + e) is 1 where its weights
    are 0: then this is `Static`.
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
    """Start as the teacher's attention with its mean map, gated by its queries; beyond its width with its keys."""
    heads = len(mixer.mixing)
    mixer.mixing.copy_(view.mean_attention)
    value, gate = zip(mixer.value_gate.weight.chunk(2), mixer.value_gate.bias.chunk(2), strict=True)
    fill_value_gate(view, value, gate, heads)
    inherit_values(view, split_heads(value[0], heads, 0), mixer.readout)


def glu_units(mixer: GluMlp) -> dict[str, Units]:
    """Return the heads, and the features of each, with their gates."""
    heads = len(mixer.mixing)
    rank = mixer.value_gate.out_features // (2 * heads)
    return {
        "heads": zipped(
            columns("mixing", places(heads, units=0), dim=0),
            columns("value_gate.weight", places(2, heads, rank, units=1), dim=0),
            columns("value_gate.bias", places(2, heads, rank, units=1), dim=0, counts=False),
            columns("readout.weight", places(heads, rank, units=0)),
        ),
        "features": head_features(heads, rank, parts=2, bias=True),
    }


class Gmlp(nn.Module):
    """gMLP's spatial gating unit: y_n = W [u_n * (sum_m A_nm LN(v_m) + a_n); x_n] + b. (B, N, D) -> (B, N, D).

    [u_n; v_n] = gelu(U x_n + c), E units each; LN is over them; A is (N, N), the same for all units, lower
    triangular if causal. The paper's E is 2 D to 3 D (its d_ffn / 2); beside the gated units, the readout sees the
    token.
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
        natural = heads * head_width(dim, heads, width)
        units = sized(sizes, "units", natural)
        self.tokens, self.heads, self.causal = tokens, heads, causal
        self.gate_value = nn.Linear(dim, 2 * units)
        self.norm = UnitNorm(units, natural)
        self.mixing = nn.Parameter(
            torch.randn(tokens, tokens) * 1e-6
        )  # as the paper starts: every token alone
        self.shift = nn.Parameter(torch.ones(tokens))
        self.readout = nn.Linear(units + dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mix x (B, N, D); where mask (B, N) is False, a token adds nothing to the others."""
        check_tokens(x, self.tokens)
        x = zero_padding(x, mask)
        gate, value = F.gelu(self.gate_value(x)).chunk(2, dim=-1)
        value = zero_padding(self.norm(value), mask)
        mixing = self.mixing.tril() if self.causal else self.mixing
        mixed = mixing @ value + self.shift.unsqueeze(1)
        y: Tensor = self.readout(torch.cat((gate * mixed, x), dim=-1))
        return y


def inherit_gmlp(mixer: Gmlp, view: AttentionView) -> None:
    """Start with the teacher's mean map, heads weighted by what they add, its values and gates by its queries.

    gelu(v) is v / 2 and an even function of v; the readout undoes the factor and the norm's scale.
    """
    heads = mixer.heads
    value = split_heads(view.v_weight, heads, 0)
    out = split_heads(view.out_weight, heads).transpose(0, 1)
    energy = (out @ value).square().sum(dim=(1, 2)).to(view.mean_attention.dtype)
    mixer.mixing.copy_(torch.tensordot(energy / energy.sum(), view.mean_attention, dims=1))
    mixer.shift.zero_()
    gates, values = zip(mixer.gate_value.weight.chunk(2), mixer.gate_value.bias.chunk(2), strict=True)
    fill_value_gate(view, values, gates, heads)
    gates[1].add_(OPEN)
    fill_readout(view, mixer.readout, heads, spread(view))


def gmlp_units(mixer: Gmlp) -> dict[str, Units]:
    """Return the units, with their gates."""
    units = mixer.readout.in_features - mixer.readout.out_features
    return {"units": gated_units(places(2, units, units=1), places(units, units=0), ("norm",))}


def gated_units(pairs: list[Tensor], own: list[Tensor], norms: tuple[str, ...]) -> Units:
    """Return the units of a layer `gate_value` with some norms behind it; the norms are over all rows."""
    behind = [columns(f"{n}.{part}", own, dim=0, counts=False) for n in norms for part in ("weight", "bias")]
    return zipped(
        columns("gate_value.weight", pairs, dim=0),
        columns("gate_value.bias", pairs, dim=0, counts=False),
        *behind,
        columns("readout.weight", own),
        multiple=MULTIPLE,
    )


class Activator(nn.Module):
    """A gated linear unit whose values meet: y_n = W [LN_1(gelu(G x_n + e)) * sum_m A_hnm LN_2(V x_m + c)_h; x_n] + b.

    (B, N, D) -> (B, N, D); E units, of which a part belongs to each head; the norms are over all of them; A is
    (H, N, N), lower triangular if causal. In the paper (where E is 2 D) this unit stands for attention and MLP at
    once, and works on every token alone: A is the identity, and no token sees another. That cannot stand for
    attention in a pretrained model, so here the values are mixed by a fixed matrix a head. The paper's code shares
    one norm between gates and values.
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
        natural = head_width(dim, heads, width)
        units = heads * sized(sizes, "features", natural)
        self.tokens, self.causal = tokens, causal
        self.gate_value = nn.Linear(dim, 2 * units)
        self.gate_norm, self.value_norm = (UnitNorm(units, heads * natural) for _ in range(2))
        self.mixing = nn.Parameter(torch.randn(heads, tokens, tokens) * tokens**-0.5)
        self.readout = nn.Linear(units + dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mix x (B, N, D); where mask (B, N) is False, a token adds nothing to the others."""
        check_tokens(x, self.tokens)
        x = zero_padding(x, mask)
        gate, value = self.gate_value(x).chunk(2, dim=-1)
        gate, value = self.gate_norm(F.gelu(gate)), zero_padding(self.value_norm(value), mask)
        y: Tensor = self.readout(torch.cat((gate * mix(self.mixing, value, self.causal), x), dim=-1))
        return y


def inherit_activator(mixer: Activator, view: AttentionView) -> None:
    """Start with the teacher's mean maps and values; gates by its queries, of mean 1 and standard deviation 1/2."""
    heads = len(mixer.mixing)
    mixer.mixing.copy_(view.mean_attention)
    gates, values = zip(mixer.gate_value.weight.chunk(2), mixer.gate_value.bias.chunk(2), strict=True)
    fill_value_gate(view, values, gates, heads)
    mixer.gate_norm.weight.fill_(0.5)
    mixer.gate_norm.bias.fill_(1.0)
    fill_readout(view, mixer.readout, heads, spread(view))


def activator_units(mixer: Activator) -> dict[str, Units]:
    """Return the features of each head, with their gates."""
    heads, units = len(mixer.mixing), mixer.readout.in_features - mixer.readout.out_features
    shape = (heads, units // heads)
    pairs, own = places(2, *shape, units=2, rows=1), places(*shape, units=1, rows=0)
    return {"features": gated_units(pairs, own, ("gate_norm", "value_norm"))}


GLU_MLP = MixerSpec(
    name="glu_mlp",
    build=GluMlp,
    summary="a gated fixed token-mixing matrix a head, and the token itself",
    widths=(0.5, 1.0, 2.0),
    caps=Caps(causal=True, masks=True, exportable=True),
    inherit=inherit_glu,
    readout="readout",
    units=glu_units,
    cost="N D^2 + N^2 D",
    paper="own design; gating after GLU, arXiv 1612.08083, and gMLP, arXiv 2105.08050",
    letter="G",
)

GMLP = MixerSpec(
    name="gmlp",
    build=Gmlp,
    summary="gMLP's spatial gating unit, and the token itself",
    widths=(0.5, 1.0, 2.0),
    caps=Caps(causal=True, masks=True, exportable=True),
    inherit=inherit_gmlp,
    readout="readout",
    units=gmlp_units,
    cost="N D^2 + N^2 D",
    paper="gMLP, arXiv 2105.08050",
    letter="Gm",
)

ACTIVATOR = MixerSpec(
    name="activator",
    build=Activator,
    summary="a normalised gated linear unit, its values mixed by a matrix a head, and the token itself",
    widths=(0.5, 1.0, 2.0),
    caps=Caps(causal=True, masks=True, exportable=True),
    inherit=inherit_activator,
    readout="readout",
    units=activator_units,
    cost="N D^2 + N^2 D",
    paper="Activator, arXiv 2405.15953, with token mixing added",
    letter="Ac",
)
