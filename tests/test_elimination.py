"""Which hidden units can go: the error that is foretold is the error that is left, and twins are seen."""

import pytest
import torch

from mixerzoo.elimination import Covariance, importance


def units(rows=400, count=12, *, seed=0):
    """Return hidden units (rows, count) that have much in common, and weights (5, count)."""
    generator = torch.Generator().manual_seed(seed)
    few = torch.randn(rows, count // 2, generator=generator, dtype=torch.float64)
    mixed = few @ torch.randn(count // 2, count, generator=generator, dtype=torch.float64)
    hidden = (mixed + 0.3 * torch.randn(rows, count, generator=generator, dtype=torch.float64)).relu()
    return hidden, torch.randn(5, count, generator=generator, dtype=torch.float64)


def covariance(hidden):
    found = Covariance(hidden.shape[1])
    for part in hidden.split(64):
        found.update(part)
    return found.result()


def left_over(hidden, out, kept):
    """Return the squared error of the output with the best second layer, and bias, for what is kept."""
    target = hidden @ out.T
    features = torch.cat((hidden[:, kept], torch.ones(len(hidden), 1, dtype=hidden.dtype)), dim=1)
    solved = torch.linalg.lstsq(features, target).solution
    return float((features @ solved - target).square().mean(0).sum())


@pytest.mark.parametrize("kept", [10, 6, 2])
def test_the_error_foretold_is_the_error_left(kept):
    hidden, out = units()
    found = importance(covariance(hidden), out)
    ranked = found.argsort(descending=True)
    foretold = float(found[ranked[kept]])  # of the last that is gone
    assert left_over(hidden, out, ranked[:kept]) == pytest.approx(foretold, rel=0.05)


def test_it_keeps_more_than_the_size_of_units_does():
    hidden, out = units(seed=3)
    by_size = hidden.square().mean(0).sqrt() * out.norm(dim=0)
    by_loss = importance(covariance(hidden), out)
    lost = [left_over(hidden, out, order.topk(5).indices) for order in (by_loss, by_size)]
    assert lost[0] < lost[1]


def test_of_twins_one_can_go_and_a_constant_unit_is_worth_nothing():
    hidden, out = units()
    hidden[:, 3] = hidden[:, 7]
    hidden[:, 0] = 5.0
    found = importance(covariance(hidden), out)
    ranked = found.argsort().tolist()
    assert 0 in ranked[:2]
    assert len({3, 7} & set(ranked[:2])) == 1


def test_many_units_go_in_groups_and_each_has_a_rank_of_its_own():
    generator = torch.Generator().manual_seed(0)
    hidden, out = torch.randn(500, 300, generator=generator), torch.randn(4, 300, generator=generator)
    found = importance(covariance(hidden), out)
    assert found.isfinite().all()
    assert (found > 0).all()
    assert len(found.unique()) > 290


def test_units_that_are_all_silent_do_no_harm():
    assert importance(torch.zeros(8, 8), torch.randn(3, 8)).isfinite().all()
