"""Kernel attention: where it is exact, and the two ways of summing it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mixerzoo import AttentionView
from mixerzoo_mixers.kernel import (
    Soft,
    ToeplitzKernel,
    correlate_by_fft,
    correlate_directly,
    fit_relative,
    inherit_soft,
    inherit_toeplitz_kernel,
    newton_inverse,
)

from . import attention_view, draw_mask

DIM, HEADS, TOKENS, PREFIX, GRID = 12, 3, 9, 1, (2, 4)


def heads(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight, bias).unflatten(-1, (HEADS, -1)).transpose(1, 2)


def with_maps(view: AttentionView, x: Tensor, maps: Tensor) -> Tensor:
    mixed = maps @ heads(x, view.v_weight, view.v_bias)
    return F.linear(mixed.transpose(1, 2).flatten(2), view.out_weight, view.out_bias)


@pytest.mark.parametrize("prefix", [0, 1])
def test_soft_is_exact_where_every_token_is_a_landmark(prefix: int) -> None:
    """It starts as the teacher's attention with its keys in a Gaussian, normalised over the tokens."""
    torch.manual_seed(0)
    tokens = prefix + 8
    view = attention_view(DIM, HEADS, tokens)
    view = replace(view, q_weight=3 * view.q_weight, k_weight=3 * view.k_weight)  # keys well apart
    mixer = Soft(DIM, HEADS, tokens, 1.0, prefix, GRID).double()
    with torch.no_grad():
        inherit_soft(mixer, view)
    x = torch.randn(2, tokens, DIM, dtype=torch.double)
    q, k = heads(x, view.q_weight, view.q_bias), heads(x, view.k_weight, view.k_bias)
    k = k - k.mean(dim=2, keepdim=True)
    maps = torch.exp(-(torch.cdist(q, k) ** 2) / (2 * (DIM // HEADS) ** 0.5))
    expected = with_maps(view, x, maps / maps.sum(dim=-1, keepdim=True))
    torch.testing.assert_close(mixer(x), expected, rtol=1e-5, atol=1e-5)


def test_soft_pools_the_keys_into_fewer_landmarks() -> None:
    mixer = Soft(DIM, HEADS, 1 + 14 * 10, 0.5, 1, (14, 10))
    keys = torch.randn(2, HEADS, 141, 2)
    landmarks = mixer._landmarks(keys)
    assert landmarks.shape == (2, HEADS, 1 + 16, 2)
    torch.testing.assert_close(landmarks[:, :, 0], keys[:, :, 0])
    cells = keys[:, :, 1:].unflatten(2, (14, 10))
    torch.testing.assert_close(landmarks[:, :, 1], cells[:, :, :4, :3].mean(dim=(2, 3)))


def test_newtons_inverse_is_one_and_stays_bounded() -> None:
    torch.manual_seed(0)
    points = torch.randn(5, 3, dtype=torch.double)
    kernel = torch.exp(-(torch.cdist(points, points) ** 2))
    torch.testing.assert_close(newton_inverse(kernel, 12), torch.linalg.inv(kernel), rtol=1e-4, atol=1e-4)
    singular = torch.ones(6, 6, dtype=torch.double)
    assert newton_inverse(singular, 10).abs().max() <= 2**10 / 6


@pytest.mark.parametrize("grid", [(1, 1), (1, 12), (12, 1), (3, 4), (5, 2)])
def test_both_ways_of_summing_agree_with_the_sum(grid: tuple[int, int]) -> None:
    torch.manual_seed(0)
    rows, columns = grid
    n = rows * columns
    q, k = torch.rand(2, 2, HEADS, n, 3, dtype=torch.double)
    v = torch.randn(2, HEADS, n, 5, dtype=torch.double)
    near = torch.rand(HEADS, 2 * rows - 1, 2 * columns - 1, dtype=torch.double)
    weights = torch.empty(HEADS, n, n, dtype=torch.double)
    for i in range(n):
        for j in range(n):
            down, right = j // columns - i // columns, j % columns - i % columns
            weights[:, i, j] = near[:, down + rows - 1, right + columns - 1]
    expected = (weights * (q @ k.mT)) @ v
    torch.testing.assert_close(correlate_directly(q, k, v, near), expected)
    torch.testing.assert_close(correlate_by_fft(q, k, v, near), expected)


@pytest.mark.parametrize(("causal", "grid"), [(False, GRID), (True, GRID), (False, None)])
def test_toeplitz_kernel_is_the_same_by_fft(causal: bool, grid: tuple[int, int] | None) -> None:
    torch.manual_seed(0)
    mixer = ToeplitzKernel(DIM, HEADS, TOKENS, 1.0, PREFIX, grid, causal).double()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter)
    x, mask = torch.randn(3, TOKENS, DIM, dtype=torch.double), draw_mask(3, TOKENS)
    y, masked = mixer(x), mixer(x, mask=mask)
    assert not mixer.by_fft
    mixer.by_fft = True
    torch.testing.assert_close(mixer(x), y)
    torch.testing.assert_close(mixer(x, mask=mask)[mask], masked[mask])


def test_many_tokens_are_summed_by_fft() -> None:
    torch.manual_seed(0)
    mixer = ToeplitzKernel(2, 1, 500, 1.0, 0, (20, 25), False)
    assert mixer.by_fft
    x = torch.randn(1, 500, 2)
    y = mixer(x)
    mixer.by_fft = False
    torch.testing.assert_close(mixer(x), y, rtol=1e-4, atol=1e-5)


def relative_maps(prefix: int, grid: tuple[int, int], causal: bool) -> Tensor:
    """Maps whose grid rows are e^b[m - n] normalised; the rows of the prefix are even."""
    rows, columns = grid
    n = prefix + rows * columns
    b = 2 * torch.randn(HEADS, 2 * rows - 1, 2 * columns - 1, dtype=torch.double)
    first = torch.randn(HEADS, prefix, dtype=torch.double)
    scores = torch.zeros(HEADS, n, n, dtype=torch.double)
    for i in range(prefix, n):
        scores[:, i, :prefix] = first
        for j in range(prefix, n):
            (y1, x1), (y2, x2) = divmod(i - prefix, columns), divmod(j - prefix, columns)
            scores[:, i, j] = (
                -torch.inf if causal and j > i else b[:, y2 - y1 + rows - 1, x2 - x1 + columns - 1]
            )
    return scores.softmax(dim=-1)


@pytest.mark.parametrize("prefix", [0, 2])
def test_the_fit_finds_relative_positions_again(prefix: int) -> None:
    torch.manual_seed(0)
    maps = relative_maps(prefix, (3, 4), False)
    b, first = fit_relative(maps, prefix, (3, 4), steps=500)
    mixed = torch.zeros_like(maps[:, prefix:])
    for i in range(12):
        scores = [b.view(HEADS, 5, 7)[:, 2 - i // 4 + y, 3 - i % 4 + x] for y in range(3) for x in range(4)]
        mixed[:, i] = torch.cat((first, torch.stack(scores, dim=1)), dim=1).softmax(dim=-1)
    torch.testing.assert_close(mixed, maps[:, prefix:], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("causal", [False, True])
def test_toeplitz_kernel_starts_near_the_mean_attention(causal: bool) -> None:
    """With queries and keys that say nothing, and a mean map of relative positions, only the fit is left."""
    torch.manual_seed(0)
    prefix, grid = (0, (1, 10)) if causal else (2, (2, 4))
    maps = relative_maps(prefix, grid, causal)
    view = attention_view(DIM, HEADS, 10)
    zero = torch.zeros_like(view.q_weight)
    view = replace(view, q_weight=zero, k_weight=zero, mean_attention=maps)
    mixer = ToeplitzKernel(DIM, HEADS, 10, 1.0, prefix, grid, causal).double()
    with torch.no_grad():
        inherit_toeplitz_kernel(mixer, view)
    x = torch.randn(2, 10, DIM, dtype=torch.double)
    error = mixer(x) - with_maps(view, x, maps)
    assert error[:, prefix:].std() < 0.1 * with_maps(view, x, maps)[:, prefix:].std()
