"""Sparse attention by an estimated mask: tiles, the choice, and what it is when nothing is left out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mixerzoo_mixers.sea import SEA, Sea, inherit_sea, tile

from . import attention_view, site
from .test_values import agree

DIM, HEADS = 12, 3


@pytest.mark.parametrize(
    "grid", [(1, 1), (1, 9), (5, 1), (3, 5), (13, 12), (14, 14), (16, 16), (1, 150), (150, 1)]
)
def test_every_token_has_one_place_in_a_tile(grid: tuple[int, int]) -> None:
    order, places = tile(*grid)
    n = grid[0] * grid[1]
    torch.testing.assert_close(order.flatten()[places], torch.arange(n))
    assert (order.flatten() >= 0).sum() == n
    assert ((order >= 0).sum(dim=1) > 0).all()
    assert order.shape[1] <= 25


@pytest.mark.parametrize(("prefix", "grid"), [(0, (4, 4)), (2, (3, 5)), (1, None)])
def test_is_the_teachers_attention_when_all_tiles_are_kept(prefix: int, grid: tuple[int, int] | None) -> None:
    torch.manual_seed(0)
    tokens = prefix + (16 if grid is None else grid[0] * grid[1])
    view = attention_view(DIM, HEADS, tokens)
    mixer = Sea(DIM, HEADS, tokens, 1.0, prefix, grid).double()
    with torch.no_grad():
        inherit_sea(mixer, view)
    x = torch.randn(2, tokens, DIM, dtype=torch.double)
    q, k, v = (
        F.linear(x, w, b).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        for w, b in (
            (view.q_weight, view.q_bias),
            (view.k_weight, view.k_bias),
            (view.v_weight, view.v_bias),
        )
    )
    mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    expected = F.linear(mixed, view.out_weight, view.out_bias)
    assert mixer.chosen < mixer.tiles
    sparse = mixer(x)
    assert (sparse - expected).abs().max() > 1e-3
    if grid is not None and prefix:  # they attend to everything
        torch.testing.assert_close(sparse[:, :prefix], expected[:, :prefix])
    mixer.chosen = mixer.tiles
    torch.testing.assert_close(mixer(x), expected)


def test_weights_sum_to_one() -> None:
    """Where every token has the same value, that is what each of them gets."""
    torch.manual_seed(0)
    mixer = Sea(DIM, HEADS, 1 + 13 * 12, 1.0, 1, (13, 12)).double()
    seen: list[Tensor] = []
    mixer.readout.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        mixer.qkv.weight[2 * DIM :] = 0
    mixer(torch.randn(2, 157, DIM, dtype=torch.double))
    torch.testing.assert_close(seen[0][..., :DIM], mixer.qkv.bias[2 * DIM :].expand(2, 157, -1))


def test_large_tiles_agree_with_the_reference() -> None:
    agree(SEA, site(SEA, dim=2, heads=1, tokens=157, prefix=1), 1.0, False, 0)


def test_the_estimate_finds_where_attention_goes() -> None:
    """Where tiles are alike inside, the tiles chosen by it hold nearly as much attention as any could."""
    torch.manual_seed(0)
    heads, tiles, width = 8, 16, 64
    mixer = Sea(heads * width, heads, 4 * tiles, 1.0, 0, (8, 8)).double()
    for parameter in mixer.decoder.parameters():
        torch.nn.init.zeros_(parameter)
    alike = torch.randn(1, heads, tiles, 1, 3, width, dtype=torch.double)
    tiled = 0.8 * alike + 0.6 * torch.randn(1, heads, tiles, 4, 3, width, dtype=torch.double)
    q, k, _ = tiled.unbind(dim=4)
    maps = (q.flatten(2, 3) @ k.flatten(2, 3).mT / width**0.5).softmax(dim=-1)
    exact = maps.unflatten(3, (tiles, 4)).sum(dim=4).unflatten(2, (tiles, 4)).mean(dim=3)
    estimate = mixer._estimate(tiled, tiled[:, :, :0, 0])
    torch.testing.assert_close(estimate.sum(dim=-1), torch.ones(1, heads, tiles, dtype=torch.double))
    found, best = (exact.gather(-1, e.topk(4).indices).sum() for e in (estimate, exact))
    assert found > 0.9 * best
