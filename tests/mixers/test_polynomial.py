"""The polynomial mixer: it is one, of degree 3, and starts as the mean attention near each token."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mixerzoo_mixers.polynomial import Polynomial, inherit_polynomial

from . import attention_view

DIM, HEADS = 12, 3


@pytest.mark.parametrize("grid", [(3, 4), None])
def test_is_a_polynomial_of_degree_three(grid: tuple[int, int] | None) -> None:
    """Along a line of inputs fourth differences vanish, and third ones do not."""
    torch.manual_seed(0)
    mixer = Polynomial(DIM, HEADS, 12, 0.5, 0, grid, False).double()
    x, step = 3 * torch.randn(2, 1, 12, DIM, dtype=torch.double)
    ys = mixer(torch.cat([x + t * step for t in range(5)]))
    third = ys.diff(n=3, dim=0)
    assert third.abs().max() > 1e-3
    torch.testing.assert_close(third.diff(dim=0), torch.zeros_like(third[1:]), rtol=0, atol=1e-10)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("width", [0.25, 1.0])
def test_starts_as_the_mean_attention_near_each_token(causal: bool, width: float) -> None:
    """Where that is one of offsets, within reach, and the higher powers are left out."""
    torch.manual_seed(0)
    rows, columns = (1, 12) if causal else (3, 4)
    offsets = torch.rand(HEADS, 5, 23, dtype=torch.double)
    maps = torch.zeros(HEADS, 12, 12, dtype=torch.double)
    for n in range(12):
        for m in range(n + 1 if causal else 12):
            (y1, x1), (y2, x2) = divmod(n, columns), divmod(m, columns)
            maps[:, n, m] = offsets[:, y2 - y1 + 2, x2 - x1 + 11]
    view = attention_view(DIM, HEADS, 12)
    value = view.v_weight.unflatten(0, (HEADS, -1)).clone()
    value[:, 1:] = value[:, :1]  # of rank one, so that nothing is lost where there is one channel
    view.v_weight.copy_(value.flatten(0, 1))
    view.mean_attention.copy_(maps)
    mixer = Polynomial(DIM, HEADS, 12, width, 0, (rows, columns), causal).double()
    with torch.no_grad():
        inherit_polynomial(mixer, view)
        channels = mixer.factors.out_features // 3
        mixer.readout.weight[:, channels : 3 * channels] = 0
    x = torch.randn(2, 12, DIM, dtype=torch.double)
    values = F.linear(x, view.v_weight).unflatten(-1, (HEADS, -1)).transpose(1, 2)
    mixed = (maps @ values).transpose(1, 2).flatten(2) + view.v_bias
    torch.testing.assert_close(mixer(x), F.linear(mixed, view.out_weight, view.out_bias))


def test_higher_powers_start_as_products_of_lower_ones() -> None:
    torch.manual_seed(0)
    mixer = Polynomial(DIM, HEADS, 13, 1.0, 1, (3, 4), False).double()
    with torch.no_grad():
        inherit_polynomial(mixer, attention_view(DIM, HEADS, 13))
    seen = []
    mixer.spread.register_forward_hook(lambda _, inputs, y: seen.append(y.flatten(2).mT))
    mixer.maps[1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    mixer(torch.randn(2, 13, DIM, dtype=torch.double))
    first, second, _ = seen[0].chunk(3, dim=-1)
    torch.testing.assert_close(seen[1], first * second)
