"""What is special about mixers of a fixed length: their limits, and MLP-Mixer as timm has it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mixerzoo.compat import guard_torchvision
from mixerzoo_mixers.token_mlp import TokenMlp

from . import attention_view
from .test_inherit import DIM, HEADS, TOKENS, inherited, with_maps


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, TOKENS, DIM, dtype=torch.double)


@pytest.mark.parametrize("heads", [1, 2])
def test_token_mlp_agrees_with_timm(heads: int) -> None:
    """With the same MLP in every head, no value projection and nothing read out but the mixed part."""
    guard_torchvision()
    from timm.models.mlp_mixer import MixerBlock

    dim, tokens = 16, 10
    block = MixerBlock(dim, tokens).double()
    mixer = TokenMlp(dim, heads, tokens, width=0.8, causal=False).double()
    mlp = block.mlp_tokens
    with torch.no_grad():
        mixer.value.weight.copy_(torch.eye(dim))
        mixer.readout.weight.copy_(torch.eye(dim, 2 * dim))
        mixer.readout.bias.zero_()
        mixer.weight1.copy_(mlp.fc1.weight)  # the same for every head
        mixer.bias1.copy_(mlp.fc1.bias)
        mixer.weight2.copy_(mlp.fc2.weight)
        mixer.bias2.copy_(mlp.fc2.bias)
    x = torch.randn(2, tokens, dim, dtype=torch.double)
    torch.testing.assert_close(mixer(x), mlp(x.transpose(1, 2)).transpose(1, 2))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("width", [2.0, 3.0])
def test_token_mlp_with_enough_hidden_tokens_starts_as_the_mean_attention(
    width: float, causal: bool, x: Tensor
) -> None:
    view = attention_view(DIM, HEADS, TOKENS, causal=causal)
    mixer = inherited("token_mlp", view, width, causal=causal)
    torch.testing.assert_close(mixer(x), with_maps(view, x, view.mean_attention))


def test_token_mlp_starts_with_the_leading_components_of_the_mean_attention(x: Tensor) -> None:
    view = attention_view(DIM, HEADS, TOKENS)
    view = replace(
        view, v_bias=0 * view.v_bias
    )  # which the readout adds whole: rows of the full maps sum to 1
    mixer = inherited("token_mlp", view, 0.5)
    assert mixer.weight1.shape == (HEADS, 4, TOKENS)
    u, s, vh = torch.linalg.svd(view.mean_attention)
    maps = u[..., :2] @ torch.diag_embed(s[:, :2]) @ vh[:, :2]
    torch.testing.assert_close(mixer(x), with_maps(view, x, maps))


def test_causal_token_mlp_starts_with_the_latest_of_evenly_spaced_rows(x: Tensor) -> None:
    view = attention_view(DIM, HEADS, TOKENS, causal=True)
    mixer = inherited("token_mlp", view, 0.7, causal=True)
    assert mixer.position.tolist() == 2 * [0, 3, 6]
    rows = torch.tensor([0, 0, 0, 3, 3, 3, 6, 6, 6])
    torch.testing.assert_close(mixer(x), with_maps(view, x, view.mean_attention[:, rows]))


@pytest.mark.parametrize("tokens", [1, 2, 7, 50])
@pytest.mark.parametrize("width", [0.125, 0.5, 1.0, 2.5])
def test_hidden_tokens_of_a_causal_token_mlp_are_spread_over_the_sequence(tokens: int, width: float) -> None:
    mixer = TokenMlp(dim=4, heads=2, tokens=tokens, width=width, causal=True)
    places = mixer.position.view(2, -1)
    assert torch.equal(places[0], places[1])
    assert places[0, 0] == 0
    assert places.max() < tokens
    assert (places.diff(dim=1) >= 0).all()
