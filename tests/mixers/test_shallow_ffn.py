"""What is special about networks over the whole sequence: the paper's sizes, their start, and their price."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from mixerzoo import MixerSpec, MixerzooError
from mixerzoo_mixers.shallow_ffn import (
    SHALLOW_FFN,
    SHALLOW_FFN_HEADS,
    ShallowFfn,
    ShallowFfnHeads,
    inherit_shallow_ffn,
    inherit_shallow_ffn_heads,
    top_components,
)

from . import attention_view, site
from .test_inherit import DIM, HEADS, TOKENS, with_maps

K = DIM // HEADS


def alr(flat: int, hidden: int) -> nn.Sequential:
    """The network of Rethinking Attention (ALR)."""
    layers = (nn.LayerNorm(flat), nn.Linear(flat, hidden), nn.LeakyReLU(), nn.LayerNorm(hidden))
    return nn.Sequential(*layers, nn.Linear(hidden, flat)).double()


def shake(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.5)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, TOKENS, DIM, dtype=torch.double)


def test_the_network_is_the_papers(x: Tensor) -> None:
    mixer = ShallowFfn(DIM, TOKENS, width=20.0).double()
    theirs = alr(TOKENS * DIM, mixer.up.out_features)
    shake(theirs)
    first, up, _, second, down = theirs
    for mine, their in zip(
        (mixer.norm1, mixer.up, mixer.norm2, mixer.down), (first, up, second, down), strict=True
    ):
        mine.load_state_dict(their.state_dict())
    with torch.no_grad():
        mixer.readout.weight.copy_(torch.eye(DIM, 2 * DIM))
        mixer.readout.bias.zero_()
    mask = torch.ones(2, TOKENS, dtype=torch.bool)
    mask[1, 5:] = False
    expected = theirs((x * mask[..., None]).flatten(1)).view(x.shape) * mask[..., None]
    torch.testing.assert_close(mixer(x, mask=mask), expected)
    torch.testing.assert_close(mixer(x)[0], expected[0])


def test_heads_are_separate_networks(x: Tensor) -> None:
    mixer = ShallowFfnHeads(DIM, HEADS, TOKENS, width=20.0).double()
    hidden = mixer.up.weight.shape[1]
    networks = [alr(TOKENS * K, hidden) for _ in range(HEADS)]
    outputs = []
    for h, network in enumerate(networks):
        shake(network)
        first, up, _, second, down = network
        with torch.no_grad():
            for mine, their in zip(
                (mixer.norm1, mixer.up, mixer.norm2, mixer.down), (first, up, second, down), strict=True
            ):
                mine.weight[h], mine.bias[h] = their.weight, their.bias
        values = x @ mixer.value.weight[h * K : (h + 1) * K].T
        outputs.append(network(values.flatten(1)).view(2, TOKENS, K))
    torch.testing.assert_close(mixer(x), mixer.readout(torch.cat((*outputs, x), dim=-1)))


def test_sizes_are_the_papers() -> None:
    """In the paper's table of sizes the hidden units of XS and S are N*D / 256 and N*D / 128."""
    tokens, dim = 200, 128
    hidden = [ShallowFfn(dim, tokens, width).up.out_features for width in SHALLOW_FFN.widths]
    assert hidden == [round(tokens * dim / 1024), tokens * dim // 256, tokens * dim // 128]


def demand_proportional(got: Tensor, expected: Tensor) -> None:
    """One factor for all, and not far from 1."""
    scale = (got * expected).sum() / (expected**2).sum()
    torch.testing.assert_close(got, scale * expected)
    assert 0.5 < scale < 2


@torch.no_grad()
def test_a_wide_one_starts_as_the_mean_attention_up_to_a_scale_for_each_sample(x: Tensor) -> None:
    """The norms take out the mean and the size of the whole sample, and nothing else."""
    view = attention_view(DIM, HEADS, TOKENS)
    mixer = ShallowFfn(DIM, TOKENS, width=512.0).double()
    inherit_shallow_ffn(mixer, view)
    without = replace(view, v_bias=0 * view.v_bias, out_bias=0 * view.out_bias)
    for sample in x:
        centred = (sample - sample.mean())[None]
        got = mixer(sample[None]) - view.out_bias - view.out_weight @ view.v_bias
        demand_proportional(got, with_maps(without, centred, view.mean_attention))


@torch.no_grad()
def test_wide_heads_start_as_their_mean_attention_up_to_a_scale_for_each_sample(x: Tensor) -> None:
    view = attention_view(DIM, HEADS, TOKENS)
    mixer = ShallowFfnHeads(DIM, HEADS, TOKENS, width=128.0).double()
    inherit_shallow_ffn_heads(mixer, view)
    features: list[Tensor] = []
    mixer.readout.register_forward_pre_hook(lambda _, args: features.append(args[0]))
    mixer(x)
    values = mixer.value(x)
    for h in range(HEADS):
        part = slice(h * K, (h + 1) * K)
        for got, value in zip(features[0][..., part], values[..., part], strict=True):
            demand_proportional(got, view.mean_attention[h] @ (value - value.mean()))
        product = mixer.readout.weight[:, part] @ mixer.value.weight[part]
        torch.testing.assert_close(product, view.out_weight[:, part] @ view.v_weight[part])


@torch.no_grad()
def test_narrow_ones_start_with_the_components_that_matter_most(x: Tensor) -> None:
    """A teacher in which one head looks at one token, and takes one number from it, needs two hidden units."""
    view = attention_view(DIM, HEADS, TOKENS)
    maps, out = torch.zeros_like(view.mean_attention), torch.zeros_like(view.out_weight)
    maps[..., 4] = 1
    out[:, K] = view.out_weight[:, K]  # the first value of the second head
    view = replace(view, mean_attention=maps, out_weight=out, v_weight=view.v_weight.clone())
    wide, narrow = (ShallowFfn(DIM, TOKENS, width).double() for width in (512.0, 1.0))
    for mixer in (wide, narrow):
        inherit_shallow_ffn(mixer, view)
    assert narrow.up.out_features == 8
    for got, expected in zip(*(mixer(x) - view.out_bias for mixer in (narrow, wide)), strict=True):
        demand_proportional(got, expected)


def test_top_components_are_those_of_the_matrix() -> None:
    matrix = torch.randn(40, 40, dtype=torch.double) @ torch.diag(0.5 ** torch.arange(40)).double()
    u, s, vh = torch.linalg.svd(matrix)
    left, values, right = top_components(lambda m: matrix @ m, lambda m: matrix.T @ m, matrix, 5)
    torch.testing.assert_close(values, s[:5])
    torch.testing.assert_close((left * values) @ right.T, (u[:, :5] * s[:5]) @ vh[:5])


@pytest.mark.parametrize("spec", [SHALLOW_FFN, SHALLOW_FFN_HEADS], ids=lambda spec: spec.name)
def test_weights_out_of_reach_are_refused(spec: MixerSpec) -> None:
    where = site(spec, dim=768, heads=12, tokens=16_384)
    with pytest.raises(
        MixerzooError, match=rf"'{spec.name}' at width 1 would have [\d,.]+ GiB .* more than 2 GiB"
    ):
        spec.make(where, 1.0)
    with torch.device("meta"):  # the largest of the usual sites that it still has to fit
        mixer = spec.make(site(spec, dim=384, heads=6, tokens=257), spec.widths[-1])
    assert sum(p.numel() for p in mixer.parameters()) * 4 < 2 * 2**30
