"""Mixers that look around: what they are in the limit, and how far they see."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mixerzoo import AttentionView
from mixerzoo_mixers import local
from mixerzoo_mixers.local import kernel_side

from . import SPECS, attention_view, draw_mask, site
from .test_inherit import DIM, HEADS, TOKENS, heads, inherited, with_maps
from .test_values import agree


@pytest.fixture(autouse=True, params=[0, local.SHORT], ids=["blocks", "short"])
def _both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks, as long sequences go, and as one product."""
    monkeypatch.setattr(local, "SHORT", request.param)


def tokens(count: int) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(2, count, DIM, dtype=torch.double)


def softmax_maps(view: AttentionView, x: Tensor, seen: Tensor) -> Tensor:
    """The teacher's attention maps where it only sees `seen` (N, N)."""
    q, k = heads(x, view.q_weight, view.q_bias), heads(x, view.k_weight, view.k_bias)
    return (q @ k.mT / (DIM // HEADS) ** 0.5).masked_fill(~seen, -torch.inf).softmax(dim=-1)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("prefix", "causal"), [(0, False), (2, False), (0, True), (1, True)])
def test_window_crosses_blocks(prefix: int, causal: bool, masked: bool) -> None:
    spec = SPECS["window"]
    agree(spec, site(spec, dim=2, heads=1, tokens=131, prefix=prefix, causal=causal), 1.0, masked, 0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("count", "prefix"), [(TOKENS, 1), (33, 0), (150, 0), (150, 3)])
def test_window_starts_as_the_teachers_attention_within_reach(count: int, prefix: int, causal: bool) -> None:
    view, x = attention_view(DIM, HEADS, count), tokens(count)
    place = torch.arange(count)
    seen = (place[:, None] - place).abs() <= 32
    seen[:, :prefix] = seen[:prefix] = True
    seen = seen.tril() if causal else seen
    assert bool(seen.all()) == (count <= 33 and not causal)
    mixer = inherited("window", view, tokens=count, prefix=prefix, causal=causal)
    torch.testing.assert_close(mixer(x), with_maps(view, x, softmax_maps(view, x, seen)))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("prefix", [0, 2])
def test_window_leaves_padding_out_of_distances(prefix: int, causal: bool) -> None:
    spec, x = SPECS["window"], tokens(200)
    mixer = spec.make(site(spec, tokens=200, prefix=prefix, causal=causal), 1.0).double()
    mask = draw_mask(2, 200)
    got = mixer(x, mask=mask)
    for sample in range(2):
        alone = mixer(x[sample, mask[sample]].unsqueeze(0))[0]
        torch.testing.assert_close(got[sample, mask[sample]], alone)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_window_takes_no_more_tokens_than_its_prefix(count: int) -> None:
    spec, x = SPECS["window"], tokens(count)
    view = attention_view(DIM, HEADS, count)
    mixer = inherited("window", view, tokens=9, prefix=3)
    everything = torch.ones(count, count, dtype=torch.bool)
    torch.testing.assert_close(mixer(x), with_maps(view, x, softmax_maps(view, x, everything)))
    assert spec.caps.any_length


@pytest.mark.parametrize("grid", [(5, 7), (9, 9), (1, 10), (10, 1), (2, 13)])
@pytest.mark.parametrize("prefix", [0, 2])
def test_dwconv_on_oblong_grids(grid: tuple[int, int], prefix: int) -> None:
    spec = SPECS["dwconv"]
    count = prefix + grid[0] * grid[1]
    agree(spec, site(spec, dim=4, heads=2, tokens=count, prefix=prefix, grid=grid), 1.0, False, 0)


def test_kernels_are_odd_and_no_wider_than_they_can_reach() -> None:
    sides = {side: kernel_side(side) for side in range(1, 65)}
    assert all(kernel % 2 == 1 and kernel <= 2 * side - 1 for side, kernel in sides.items())
    assert (sides[7], sides[14], sides[32]) == (5, 7, 11)


def test_dwconv_starts_as_attention_by_offset() -> None:
    """Maps that depend on the offset alone are what it is: near ones by the kernel, an even spread by the mean."""
    grid, count = (7, 8), 56
    spec = SPECS["dwconv"]
    mixer = spec.make(site(spec, dim=DIM, heads=HEADS, tokens=count, grid=grid), 1.0)
    high, wide = mixer.conv.weight.shape[2:]
    row, column = torch.arange(count) // grid[1], torch.arange(count) % grid[1]
    up, left = row - row[:, None] + high // 2, column - column[:, None] + wide // 2
    near = (up >= 0) & (up < high) & (left >= 0) & (left < wide)
    assert not near.all()
    kernel = torch.rand(HEADS, high, wide, dtype=torch.double)
    maps = torch.where(near, kernel[:, up.clamp(0, high - 1), left.clamp(0, wide - 1)], 0)
    view, x = attention_view(DIM, HEADS, count), tokens(count)
    view = replace(view, mean_attention=maps, v_bias=torch.zeros_like(view.v_bias))
    got = inherited("dwconv", view, tokens=count, grid=grid)
    torch.testing.assert_close(got(x), with_maps(view, x, maps))
    # Attention that is the same everywhere: where the kernel does not reach, the mean takes over.
    even = torch.full_like(maps, 1 / count)
    spread = inherited("dwconv", replace(view, mean_attention=even), tokens=count, grid=grid)
    torch.testing.assert_close(spread.conv.weight.data, torch.full_like(spread.conv.weight, 1 / count))
    expected = 1 - near.double().sum(dim=1).mean() / count
    torch.testing.assert_close(spread.mean.data, expected.expand_as(spread.mean))
