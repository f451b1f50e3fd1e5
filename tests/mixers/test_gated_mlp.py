"""What is special about gated mixers of a fixed length: their limits, their start, gMLP as timm has it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mixerzoo import AttentionView
from mixerzoo.compat import guard_torchvision
from mixerzoo_mixers.gated_mlp import OPEN, Activator, Gmlp

from . import attention_view
from .test_inherit import DIM, HEADS, TOKENS, heads, inherited, with_maps


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, TOKENS, DIM, dtype=torch.double)


@pytest.fixture
def view() -> AttentionView:
    return attention_view(DIM, HEADS, TOKENS)


def test_gmlp_agrees_with_timm(x: Tensor) -> None:
    """With nothing read out but the gated units; a tril is all that causality adds."""
    guard_torchvision()
    from timm.layers import GatedMlp
    from timm.models.mlp_mixer import SpatialGatingUnit

    theirs = GatedMlp(DIM, 4 * DIM, gate_layer=partial(SpatialGatingUnit, seq_len=TOKENS)).double()
    for causal in (False, True):
        mixer = Gmlp(DIM, HEADS, TOKENS, width=2.0, causal=causal).double()
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter.normal_(std=0.3)
            mixer.gate_value.load_state_dict(theirs.fc1.state_dict())
            mixer.norm.load_state_dict(theirs.gate.norm.state_dict())
            mixer.mixing.copy_(theirs.gate.proj.weight)
            mixer.shift.copy_(theirs.gate.proj.bias)
            mixer.readout.weight.zero_()
            mixer.readout.weight[:, : 2 * DIM] = theirs.fc2.weight
            mixer.readout.bias.copy_(theirs.fc2.bias)
            if causal:
                theirs.gate.proj.weight.tril_()
        torch.testing.assert_close(mixer(x), theirs(x))


def test_gmlp_starts_at_random_as_the_paper_does(x: Tensor) -> None:
    """With a gate of ones, almost: every token alone."""
    mixer = Gmlp(DIM, HEADS, TOKENS, width=1.0, causal=False).double()
    units = F.gelu(mixer.gate_value(x)).chunk(2, dim=-1)[0]
    torch.testing.assert_close(mixer(x), mixer.readout(torch.cat((units, x), dim=-1)), rtol=1e-3, atol=1e-3)


def test_gmlp_takes_the_mean_map_of_the_heads_that_matter(x: Tensor, view: AttentionView) -> None:
    out = view.out_weight.clone()
    out[:, DIM // HEADS :] = 0  # only the first head adds anything
    mixer = inherited("gmlp", replace(view, out_weight=out))
    torch.testing.assert_close(mixer.mixing.data, view.mean_attention[0])
    torch.testing.assert_close(inherited("gmlp", view).mixing.sum(dim=1), torch.ones(TOKENS).double())
    mixed = view.mean_attention[0] @ F.layer_norm(F.gelu(x @ view.v_weight.T), (DIM,))
    gates = F.gelu(F.linear(x, view.q_weight, view.q_bias) + OPEN)
    spread = view.v_weight.square().sum(dim=1).mean().sqrt()
    expected = F.linear(gates * mixed * spread, out, view.out_bias + out @ view.v_bias)
    torch.testing.assert_close(mixer(x), expected)


def test_gate_without_input_is_open() -> None:
    torch.testing.assert_close(F.gelu(torch.tensor(OPEN)), torch.tensor(1.0))


def test_glu_starts_as_the_mean_attention_gated_by_the_queries(x: Tensor, view: AttentionView) -> None:
    gates = 2 * F.linear(x, view.q_weight, view.q_bias).sigmoid()
    mixed = view.mean_attention @ heads(x, view.v_weight, 0 * view.v_bias)
    mixed = mixed.transpose(1, 2).flatten(2)
    expected = F.linear(gates * mixed, view.out_weight, view.out_bias + view.out_weight @ view.v_bias)
    torch.testing.assert_close(inherited("glu_mlp", view)(x), expected)


@pytest.mark.parametrize("name", ["glu_mlp", "gmlp", "activator"])
def test_half_width_takes_half_of_every_head_and_double_width_the_keys_too(
    name: str, x: Tensor, view: AttentionView
) -> None:
    k = DIM // HEADS

    def units(width: float) -> tuple[Tensor, Tensor]:
        """Weights of gates and values, (H, R, D) each."""
        mixer = inherited(name, view, width)
        layer = mixer.value_gate if name == "glu_mlp" else mixer.gate_value
        first, second = (w.unflatten(0, (HEADS, -1)) for w in layer.weight.data.chunk(2))
        return (second, first) if name == "glu_mlp" else (first, second)

    q, key, v = (w.unflatten(0, (HEADS, -1)) for w in (view.q_weight, view.k_weight, view.v_weight))
    half, full, double = units(0.5), units(1.0), units(2.0)
    torch.testing.assert_close(half[0], q[:, : k // 2])
    torch.testing.assert_close(full[0], q)
    torch.testing.assert_close(full[1], v)
    torch.testing.assert_close(double[0], torch.cat((q, -q), dim=1))
    torch.testing.assert_close(double[1], torch.cat((v, key), dim=1))


def test_activator_with_identity_maps_is_the_papers(x: Tensor) -> None:
    """Then every token is alone, and with one norm for both it is the unit of the published code."""
    units = 2 * DIM
    mixer = Activator(DIM, HEADS, TOKENS, width=2.0, causal=False).double()
    proj1, proj2, proj3 = (
        torch.nn.Linear(*sizes).double() for sizes in ((DIM, units), (DIM, units), (units, DIM))
    )
    norm = torch.nn.LayerNorm(units).double()
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
        mixer.gate_value.weight.copy_(torch.cat((proj1.weight, proj2.weight)))
        mixer.gate_value.bias.copy_(torch.cat((proj1.bias, proj2.bias)))
        mixer.gate_norm.load_state_dict(norm.state_dict())
        mixer.value_norm.load_state_dict(norm.state_dict())
        mixer.mixing.copy_(torch.eye(TOKENS))
        mixer.readout.weight.copy_(torch.cat((proj3.weight, torch.zeros(DIM, DIM)), dim=1))
        mixer.readout.bias.copy_(proj3.bias)
    expected = proj3(norm(F.gelu(proj1(x))) * norm(proj2(x)))
    torch.testing.assert_close(mixer(x), expected)


def test_activator_starts_near_the_mean_attention(view: AttentionView) -> None:
    """Gates have mean 1; with them held there, only each token's scale is missing, which the norm takes out."""
    mixer = inherited("activator", view)
    with torch.no_grad():
        mixer.gate_norm.weight.zero_()
    x = torch.randn(2, 1, DIM, dtype=torch.double).expand(-1, TOKENS, -1)  # the same scale everywhere
    values = x @ view.v_weight.T
    spread = view.v_weight.square().sum(dim=1).mean().sqrt()
    scaled = F.layer_norm(values, (DIM,)) * spread
    bare = replace(view, v_weight=torch.eye(DIM).double(), v_bias=0 * view.v_bias)
    expected = with_maps(bare, scaled, view.mean_attention) + view.out_weight @ view.v_bias
    torch.testing.assert_close(mixer(x), expected)
