"""Closed-form readouts against NumPy's least squares."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mixerzoo.ridge import PENALTIES, Gram, ridge, solve


def rows(count, features=5, targets=3, *, noise=0.1, seed=0, shift=0.5):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, features, generator=generator) + shift
    weight = torch.randn(features, targets, generator=torch.Generator().manual_seed(99))
    y = x @ weight + torch.arange(targets) + noise * torch.randn(count, targets, generator=generator)
    return x, y


def gram_of(x, y, batch=7):
    gram = Gram(x.shape[1], y.shape[1])
    for part in range(0, len(x), batch):
        gram.update(x[part : part + batch], y[part : part + batch])
    return gram


def nmse(x, y, weight, bias):
    error = (x.double() @ weight.double().T + bias.double() - y.double()).square().sum()
    return float(error / (y.double() - y.double().mean(0)).square().sum())


def numpy_ridge(x, y, penalty):
    """Ridge by stacking rows, and no penalty on the constant."""
    features = x.shape[1]
    size = float(x.double().square().sum(0).mean())
    design = np.hstack([x.double().numpy(), np.ones((len(x), 1))])
    extra = np.hstack([np.eye(features) * np.sqrt(penalty * size), np.zeros((features, 1))])
    target = np.vstack([y.double().numpy(), np.zeros((features, y.shape[1]))])
    return np.linalg.lstsq(np.vstack([design, extra]), target, rcond=None)[0]


def test_streaming_in_parts_changes_nothing():
    x, y = rows(100)
    whole, parts = gram_of(x, y, batch=100), gram_of(x, y, batch=9)
    assert whole.rows == parts.rows == 100
    for name in ("xx", "xy", "yy", "y"):
        torch.testing.assert_close(getattr(whole, name).float(), getattr(parts, name).float())


def test_it_is_the_ridge_solution_of_numpy():
    x, y = rows(300)
    found = solve(gram_of(x, y), gram_of(*rows(100, seed=1)))
    expected = numpy_ridge(x, y, found.penalty)
    np.testing.assert_allclose(found.weight.T.numpy(), expected[:-1], atol=1e-4)
    np.testing.assert_allclose(found.bias.numpy(), expected[-1], atol=1e-4)


def test_with_a_start_the_penalty_is_on_the_change():
    x, y = rows(300)
    start = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    missing = y - (x.double() @ start[:-1] + start[-1]).float()
    found = solve(gram_of(x, y), gram_of(*rows(100, seed=1)), start=start)
    expected = start.numpy() + numpy_ridge(x, missing, found.penalty)
    np.testing.assert_allclose(found.weight.T.numpy(), expected[:-1], atol=1e-4)
    np.testing.assert_allclose(found.bias.numpy(), expected[-1], atol=1e-4)


def test_with_few_rows_a_good_start_is_hardly_left():
    weight = torch.randn(41, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    parts = []
    for seed, count in ((0, 20), (1, 20), (2, 500)):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(count, 40, generator=generator)
        noise = torch.randn(count, 3, generator=generator)
        parts.append((x, (x.double() @ weight[:-1] + weight[-1]).float() + noise))
    train, choose, test = parts
    errors = [
        nmse(*test, found.weight, found.bias)
        for found in (
            solve(gram_of(*train), gram_of(*choose), start=weight),
            solve(gram_of(*train), gram_of(*choose)),
        )
    ]
    assert errors[0] < 0.5 * errors[1]


def test_without_noise_it_is_the_least_squares_solution():
    x, y = rows(300, noise=0)
    found = solve(gram_of(x, y), gram_of(*rows(100, seed=1, noise=0)))
    design = np.hstack([x.double().numpy(), np.ones((len(x), 1))])
    expected = np.linalg.lstsq(design, y.double().numpy(), rcond=None)[0]
    np.testing.assert_allclose(found.weight.T.numpy(), expected[:-1], atol=1e-3)
    np.testing.assert_allclose(found.bias.numpy(), expected[-1], atol=1e-3)
    assert found.penalty <= PENALTIES[1]  # where rounding is all that is left
    assert found.nmse < 1e-6


def test_the_error_is_that_of_the_held_out_rows():
    x, y = rows(100, seed=1, noise=1.0)
    found = solve(gram_of(*rows(300, noise=1.0)), gram_of(x, y))
    assert found.nmse == pytest.approx(nmse(x, y, found.weight, found.bias), rel=1e-4)
    assert found.nmse > 0.02


def test_noisy_features_want_a_larger_penalty():
    few = gram_of(*rows(12, features=10, noise=5.0))
    held_out = gram_of(*rows(200, features=10, noise=5.0, seed=1))
    found = solve(few, held_out)
    assert found.penalty > PENALTIES[0]
    errors = [
        held_out.nmse(torch.from_numpy(numpy_ridge(*rows(12, features=10, noise=5.0), p))) for p in PENALTIES
    ]
    assert found.nmse == pytest.approx(min(errors), rel=1e-3)
    assert found.penalty == PENALTIES[int(np.argmin(errors))]


def test_faded_rows_count_for_less():
    old, new = rows(200, noise=0), rows(200, seed=1, noise=0)
    gram = gram_of(old[0], old[1] + 10)
    gram.fade(1e-6)
    gram.update(*new)
    solution = ridge(gram, 1e-6)
    assert gram.rows == pytest.approx(200, rel=1e-3)
    assert nmse(*new, solution[:-1].T, solution[-1]) < 1e-4


@pytest.mark.parametrize("noise", [0.0, 0.3, 3.0, 30.0])
@pytest.mark.parametrize("count", [15, 60, 400])
def test_going_downhill_finds_the_best_penalty(noise, count):
    train, held_out = rows(count, features=10, noise=noise), gram_of(*rows(300, features=10, seed=1))
    found = solve(gram_of(*train), held_out)
    errors = [held_out.nmse(torch.from_numpy(numpy_ridge(*train, penalty))) for penalty in PENALTIES]
    assert found.nmse == pytest.approx(min(errors), rel=1e-3, abs=1e-9)


def test_features_that_repeat_each_other_do_no_harm():
    x, y = rows(200)
    found = solve(
        gram_of(torch.cat([x, x, x[:, :1] * 0], 1), y), gram_of(torch.cat([x, x, x[:, :1] * 0], 1), y)
    )
    assert found.nmse < 0.02
    assert torch.isfinite(found.weight).all()


def test_fewer_rows_than_features_do_no_harm():
    x, y = rows(6, features=40)
    found = solve(gram_of(x, y), gram_of(x, y))
    assert found.nmse < 1e-2


def test_constant_targets_are_met_by_the_bias():
    x, _ = rows(50)
    y = torch.tensor([3.0, -1.0, 0.0]).expand(50, 3).contiguous()
    found = solve(gram_of(x, y), gram_of(x, y))
    torch.testing.assert_close(x @ found.weight.T + found.bias, y, atol=1e-3, rtol=0)


def test_a_constant_offset_is_not_shrunk():
    x, y = rows(200, noise=1.0)
    found = solve(gram_of(x, y + 1000), gram_of(x, y + 1000))
    torch.testing.assert_close((x @ found.weight.T + found.bias).mean(0), y.mean(0) + 1000, atol=0.05, rtol=0)


def test_without_a_bias_it_is_the_best_map_through_the_origin():
    x, y = rows(300)
    found = solve(gram_of(x, y), gram_of(x, y), bias=False)
    expected = np.linalg.lstsq(x.double().numpy(), y.double().numpy(), rcond=None)[0]
    np.testing.assert_allclose(found.weight.T.numpy(), expected, atol=1e-4)
    assert not found.bias.any()
    assert found.nmse == pytest.approx(nmse(x, y, found.weight, found.bias), rel=1e-4)


def test_features_that_are_not_finite_have_no_solution():
    x, y = rows(50)
    x[3, 2] = float("nan")
    assert solve(gram_of(x, y), gram_of(x, y)) is None


@given(
    seed=st.integers(0, 2**31),
    features=st.integers(1, 8),
    targets=st.integers(1, 4),
    count=st.integers(2, 60),
)
def test_the_error_of_any_map_is_the_direct_one(seed, features, targets, count):
    x, y = rows(count, features, targets, seed=seed, noise=1.0)
    generator = torch.Generator().manual_seed(seed + 1)
    weight, bias = (
        torch.randn(targets, features, generator=generator),
        torch.randn(targets, generator=generator),
    )
    gram = gram_of(x, y)
    solution = torch.cat([weight.T, bias[None]]).double()
    assert gram.nmse(solution) == pytest.approx(nmse(x, y, weight, bias), rel=1e-3, abs=1e-4)


@given(seed=st.integers(0, 2**31))
def test_no_map_does_better_on_its_own_rows(seed):
    x, y = rows(60, noise=1.0, seed=seed)
    gram = gram_of(x, y)
    found = solve(gram, gram)
    generator = torch.Generator().manual_seed(seed)
    moved = found.weight + 0.1 * torch.randn(found.weight.shape, generator=generator)
    assert nmse(x, y, moved, found.bias) >= found.nmse - 1e-6


def test_a_solution_that_fits_the_rounding_errors_of_the_sums_is_none():
    """What the sums tell of it is wrong: rows that are kept are there to show it."""
    x, y = rows(400, features=6, targets=2)
    gram = gram_of(x, y, batch=300)
    good = ridge(gram, 1e-6)
    assert good is not None
    assert gram.is_true(good, gram.nmse(good))
    away = torch.linalg.eigh(gram.xx[:-1, :-1]).eigenvectors[:, :1]
    bad = good.clone()
    bad[:-1] += 30 * away
    assert gram.is_true(bad, gram.nmse(bad))  # it is bad, and the sums say so
    gram.xx[:-1, :-1] -= away @ away.T * float(away.T @ gram.xx[:-1, :-1] @ away)  # as rounding may do
    gram.xy[:-1] -= away @ (away.T @ gram.xy[:-1])
    assert not gram.is_true(bad, gram.nmse(bad))


def test_a_constant_target_has_a_solution():
    x, _ = rows(64)
    solution = solve(*(gram_of(x, torch.full((64, 2), 3.0)) for _ in "ab"))
    assert solution is not None
    torch.testing.assert_close(x @ solution.weight.T + solution.bias, torch.full((64, 2), 3.0))


def test_channels_that_are_always_large_do_not_drown_the_others():
    """As the massive activations of pretrained transformers would, beside features that nearly repeat each other."""
    x, y = rows(4000, features=6, noise=0.01)
    near = x + 1e-2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    large = 3000 + torch.randn(4000, 3, generator=torch.Generator().manual_seed(4))
    x = torch.cat([x, near, large], 1)
    found = ridge(gram_of(x, y, batch=1000), 1e-9)
    assert found is not None
    expected = numpy_ridge(x, y, 1e-9)
    best = nmse(x, y, torch.from_numpy(expected[:-1].T), torch.from_numpy(expected[-1]))
    assert nmse(x, y, found[:-1].T, found[-1]) == pytest.approx(best, rel=1e-2)
