"""Attention made smaller: equalities, and cascaded group attention against timm's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from mixerzoo import AttentionView
from mixerzoo.compat import guard_torchvision
from mixerzoo_mixers.reduced import CascadedGroup, medoids, spread

from . import SPECS, attention_view, site
from .test_inherit import DIM, HEADS, TOKENS, inherited, with_maps
from .test_local import softmax_maps, tokens
from .test_sparse import low_rank_view
from .test_values import agree


def everything(count: int) -> Tensor:
    return torch.ones(count, count, dtype=torch.bool)


@pytest.mark.parametrize(
    ("name", "grid"),
    [("strip", (9, 3)), ("strip", (10, 11)), ("cascaded_group", (7, 3)), ("cascaded_group", (1, 11))],
)
@pytest.mark.parametrize("prefix", [0, 2])
def test_on_oblong_grids(name: str, prefix: int, grid: tuple[int, int]) -> None:
    spec = SPECS[name]
    count = prefix + grid[0] * grid[1]
    agree(spec, site(spec, dim=8, heads=2, tokens=count, prefix=prefix, grid=grid), 1.0, False, 0)


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("grid", [(12, 10), (11, 9)])
def test_strip_starts_as_attention_where_tiles_are_alike(grid: tuple[int, int], prefix: int) -> None:
    """Tiles of equal tokens, also cut ones, and scores of low rank: then nothing is lost."""
    count = prefix + grid[0] * grid[1]
    view, x = low_rank_view(count, 1)
    mixer = inherited("strip", view, tokens=count, prefix=prefix, grid=grid)
    assert mixer.reduce.weight.shape[2:] == (2, 2)
    tiles = torch.randn(2, 6, 5, DIM, dtype=torch.double)
    cells = tiles.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, : grid[0], : grid[1]]
    x = torch.cat((x[:, :prefix], cells.flatten(1, 2)), dim=1)
    torch.testing.assert_close(mixer(x), with_maps(view, x, softmax_maps(view, x, everything(count))))


def narrow_view(count: int) -> AttentionView:
    """A teacher whose heads each look at K directions of the input only."""
    view = attention_view(DIM, HEADS, count)
    width = DIM // HEADS
    seen = torch.randn(HEADS, width, DIM, dtype=torch.double)

    def narrow(w: Tensor) -> Tensor:
        return (w.view(HEADS, width, DIM)[..., :width] @ seen).flatten(0, 1)

    return replace(view, **{n: narrow(getattr(view, n)) for n in ("q_weight", "k_weight", "v_weight")})


@pytest.mark.parametrize("prefix", [0, 1])
def test_cascade_starts_as_attention_of_heads_with_narrow_inputs(prefix: int) -> None:
    count = prefix + 12
    view, x = narrow_view(count), tokens(count)
    mixer = inherited("cascaded_group", view, tokens=count, prefix=prefix, grid=(3, 4))
    torch.testing.assert_close(mixer(x), with_maps(view, x, softmax_maps(view, x, everything(count))))


def test_spread_is_the_table_by_distance() -> None:
    rows, columns, prefix = 3, 4, 2
    table = torch.randn(2, rows, columns)
    bias = spread(table, prefix).flip(2)
    assert bias.shape == (2, 14, 14)
    assert (bias[:, :prefix] == 0).all()
    assert (bias[:, :, :prefix] == 0).all()
    for n in range(rows * columns):
        for m in range(rows * columns):
            i, j = abs(n // columns - m // columns), abs(n % columns - m % columns)
            assert torch.equal(bias[:, prefix + n, prefix + m], table[:, i, j])


def fold(layer: nn.Module) -> nn.Module:
    """A convolution of timm's with its batch norm folded in, in float64."""
    folded: nn.Module = layer.fuse().double()
    return folded


def test_cascade_agrees_with_timm() -> None:
    """With the split of EfficientViT for the projection and a cascade of ones, up to its ReLU and projection."""
    guard_torchvision()
    msra = pytest.importorskip("timm.models.efficientvit_msra")
    side, dim, heads = 5, 24, 3
    theirs = msra.CascadedGroupAttention(dim, 8, heads, attn_ratio=1, resolution=side, kernels=(5,) * heads)
    with torch.no_grad():
        for tensor in theirs.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.1)  # variances among them
        for p in theirs.parameters():
            p.copy_(torch.randn_like(p) / max(1, p[0].numel()) ** 0.5)
        theirs.attention_biases.copy_(torch.randn_like(theirs.attention_biases))
    theirs.double()
    theirs.eval()  # returns None
    ours = CascadedGroup(dim, heads, side * side, 1.0, (side, side)).double()
    with torch.no_grad():
        ours.inner.weight.copy_(torch.eye(dim))
        ours.inner.bias.zero_()
        # Its offsets come in the order of first sight, which for the first token is that of the grid.
        ours.bias.copy_(theirs.attention_biases.unflatten(1, (side, side)))
        for mine, conv, other, other_conv in zip(ours.qkv, ours.conv, theirs.qkvs, theirs.dws, strict=True):
            mine.weight.copy_(fold(other).weight.flatten(1))
            mine.bias.copy_(fold(other).bias)
            conv.load_state_dict(fold(other_conv).state_dict())
    found: list[Tensor] = []
    theirs.proj.register_forward_pre_hook(lambda _, args: found.append(args[0].clone()))
    ours.readout.register_forward_pre_hook(lambda _, args: found.append(args[0][..., :dim]))
    x = torch.randn(2, dim, side, side, dtype=torch.double)
    theirs(x)
    ours(x.flatten(2).mT)
    torch.testing.assert_close(found[1], found[0].flatten(2).mT, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_all_heads_start_as_the_teachers_attention(causal: bool) -> None:
    view, x = attention_view(DIM, HEADS, TOKENS), tokens(TOKENS)
    seen = everything(TOKENS).tril() if causal else everything(TOKENS)
    mixer = inherited("fewer_heads", view, 1.0, causal=causal)
    torch.testing.assert_close(mixer(x), with_maps(view, x, softmax_maps(view, x, seen)))


def test_merging_twins_loses_nothing() -> None:
    """Two heads that look alike, and whose values together are no more than one head can hold."""
    view, x = attention_view(DIM, HEADS, TOKENS), tokens(TOKENS)
    width = DIM // HEADS

    def same(name: str) -> Tensor:
        t = getattr(view, name).clone()
        t[2 * width :] = t[:width]
        return t

    twins = {n: same(n) for n in ("q_weight", "q_bias", "k_weight", "k_bias", "v_weight")}
    mean = view.mean_attention.clone()
    mean[2] = mean[0]
    view = replace(view, mean_attention=mean, **twins)
    mixer = inherited("fewer_heads", view, 0.5)
    assert mixer.heads == 2
    torch.testing.assert_close(mixer(x), with_maps(view, x, softmax_maps(view, x, everything(TOKENS))))


def test_medoids_keep_what_stands_for_most() -> None:
    maps = torch.tensor([0.0, 1.0, 1.1, 1.2, 5.0]).view(5, 1, 1)
    ones = torch.ones(5, dtype=torch.double)
    assert medoids(maps, ones, 5) == [[0], [1], [2], [3], [4]]
    assert medoids(maps, ones, 3) == [[0], [2, 1, 3], [4]]
    assert sorted(len(c) for c in medoids(maps, ones, 2)) == [1, 4]
    # A head that does little is given up first.
    assert medoids(maps, torch.tensor([0, 1, 1, 1, 1e-9], dtype=torch.double), 3) == [[1, 0], [2], [3, 4]]


def test_there_is_always_a_head() -> None:
    spec = SPECS["fewer_heads"]
    assert spec.make(site(spec, dim=12, heads=2), 0.25).heads == 1
