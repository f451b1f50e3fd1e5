"""Attention to few keys from all over the grid: which ones, and that it is the teacher's where they are all."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mixerzoo import MixerzooError
from mixerzoo_mixers.sparse import window_side

from . import SPECS, attention_view, site
from .test_inherit import DIM, HEADS, heads, inherited, with_maps
from .test_local import softmax_maps, tokens
from .test_values import agree


@pytest.mark.parametrize("grid", [(5, 7), (10, 3), (1, 11)])
@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("name", ["factorized", "topk_attention"])
def test_on_oblong_grids(name: str, prefix: int, grid: tuple[int, int]) -> None:
    spec = SPECS[name]
    count = prefix + grid[0] * grid[1]
    agree(spec, site(spec, dim=8, heads=2, tokens=count, prefix=prefix, grid=grid), 1.0, False, 0)


@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("name", ["factorized", "topk_attention"])
def test_starts_as_the_teachers_attention_where_all_keys_are_seen(name: str, prefix: int) -> None:
    count = prefix + 12
    view, x = attention_view(DIM, HEADS, count), tokens(count)
    mixer = inherited(name, view, tokens=count, prefix=prefix, grid=(3, 4))
    everything = torch.ones(count, count, dtype=torch.bool)
    torch.testing.assert_close(mixer(x), with_maps(view, x, softmax_maps(view, x, everything)))


@pytest.mark.parametrize("name", ["factorized", "topk_attention"])
def test_needs_a_grid(name: str) -> None:
    with pytest.raises(MixerzooError, match=f"mixer '{name}' needs a grid"):
        SPECS[name].make(site(SPECS[name], grid=None), 1.0)


def test_windows_cover_the_grid_and_none_is_empty() -> None:
    for side in range(1, 129):
        size, count = window_side(side)
        assert (count - 1) * size < side <= count * size
    assert [window_side(side) for side in (7, 14, 16, 32)] == [(4, 2), (7, 2), (8, 2), (11, 3)]


def test_factorized_keeps_the_heads_apart_that_look_near() -> None:
    """Heads whose mean attention stays in windows become the near-sighted ones: with such a teacher nothing is lost."""
    grid, count = (6, 8), 48
    place = torch.arange(count)
    row, column = place // 8, place % 8
    (high, down), (wide, across) = (window_side(side) for side in grid)
    near = (row // high == row[:, None] // high) & (column // wide == column[:, None] // wide)
    far = (row % down == row[:, None] % down) & (column % across == column[:, None] % across)
    view, x = attention_view(DIM, HEADS, count), tokens(count)
    masks = torch.stack((far, near, far))  # of three heads the first two are to be far-sighted
    mean = masks / masks.sum(dim=-1, keepdim=True)
    mixer = inherited("factorized", replace(view, mean_attention=mean), tokens=count, grid=grid)
    torch.testing.assert_close(mixer(x), with_maps(view, x, softmax_maps(view, x, masks)))


def low_rank_view(count: int, rank: int) -> tuple[Tensor, Tensor]:
    """A teacher whose scores are of low rank, biases included, and tokens for it."""
    view = attention_view(DIM, HEADS, count)
    low = [
        torch.cat((getattr(view, f"{n}_weight"), getattr(view, f"{n}_bias")[:, None]), dim=1).unflatten(
            0, (HEADS, -1)
        )
        for n in "qk"
    ]
    turned = torch.linalg.qr(torch.randn(HEADS, DIM // HEADS, rank, dtype=torch.double))[0]
    q, k = (turned @ turned.mT @ t for t in low)
    parts = {f"{n}_{p}": t for n, m in zip("qk", (q, k), strict=True) for p, t in split_bias(m).items()}
    return replace(view, **parts), tokens(count)


def split_bias(m: Tensor) -> dict[str, Tensor]:
    return {"weight": m[..., :-1].flatten(0, 1), "bias": m[..., -1].flatten()}


def test_topk_predicts_scores_of_low_rank_exactly() -> None:
    """Then each tile sees just the keys that its queries' scores add up to most for."""
    grid, count = (10, 10), 100
    view, x = low_rank_view(count, 1)  # a quarter of the head width of 4
    mixer = inherited("topk_attention", view, tokens=count, grid=grid)
    assert (mixer.low, mixer.kept) == (1, 40)
    place = torch.arange(count)
    tile = place // 10 // mixer.high * mixer.across + place % 10 // mixer.wide
    q, k = heads(x, view.q_weight, view.q_bias), heads(x, view.k_weight, view.k_bias)
    total = torch.zeros(2, HEADS, 4, count, dtype=torch.double).index_add(2, tile, q @ k.mT)
    best = torch.zeros_like(total, dtype=torch.bool).scatter(3, total.topk(40).indices, True)
    torch.testing.assert_close(mixer(x), with_maps(view, x, softmax_maps(view, x, best[:, :, tile])))


def test_topk_predicts_by_the_channels_that_matter_most() -> None:
    """Where the queries of a tile are alike, the leading channels make a better choice than the last ones."""
    count, rank = 100, DIM // HEADS
    view = attention_view(DIM, HEADS, count)
    tiles = torch.randn(2, 2, 2, DIM, dtype=torch.double).repeat_interleave(5, 1).repeat_interleave(5, 2)
    x = 4 * tiles.flatten(1, 2) + tokens(count)
    mixer = inherited("topk_attention", view, tokens=count, grid=(10, 10))
    expected = with_maps(view, x, softmax_maps(view, x, torch.ones(count, count, dtype=torch.bool)))
    best = (mixer(x) - expected).norm()
    with torch.no_grad():
        for t in (mixer.qkv.weight, mixer.qkv.bias):
            # The order of the channels changes nothing but the choice.
            t[: 2 * DIM] = t[: 2 * DIM].unflatten(0, (-1, rank)).flip(1).flatten(0, 1)
    assert best < 0.9 * (mixer(x) - expected).norm()
