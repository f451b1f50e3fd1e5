from __future__ import annotations

import numpy as np
import pytest
from optuna.distributions import CategoricalDistribution

from mixerzoo.plan import KEEP_CANDIDATE, Candidate
from mixerzoo_search.additive import AdditiveModel
from mixerzoo_search.sampler.evidence import latency_target, value_target
from mixerzoo_search.sampler.residual import Forecast, Kernels, shares
from mixerzoo_search.sampler.space import Plans, Space

SITES, CANDIDATES = 6, 5


def planted(seed: int = 0, together: float = 0.6) -> tuple[Space, np.ndarray]:
    """Return a space whose scores are the squared lengths of vectors, and the vectors (S, C, D)."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(SITES, CANDIDATES, 8)) + together * 2
    vectors *= rng.lognormal(-1.5, 0.6, (SITES, CANDIDATES, 1))
    vectors[:, 0] = 0
    scores = (vectors**2).sum(-1)
    row = (KEEP_CANDIDATE, *(Candidate(f"m{at}") for at in range(1, CANDIDATES)))
    saved = np.sort(rng.uniform(0.1, 1, (SITES, CANDIDATES)), axis=1)
    saved[:, 0] = 0
    model = AdditiveModel(
        sites=tuple(f"s{at}" for at in range(SITES)),
        candidates=(row,) * SITES,
        loss=tuple(tuple(one) for one in scores.tolist()),
        latency_ms=tuple(tuple(one) for one in (-saved).tolist()),
        base_ms=10.0,
    )
    sites = {site: CategoricalDistribution([str(c) for c in row]) for site in model.sites}
    return Space(sites, model, None), vectors


def truth(vectors: np.ndarray, plans: Plans) -> np.ndarray:
    return (vectors[np.arange(SITES), plans].sum(1) ** 2).sum(-1)


def draw(space: Space, count: int, seed: int) -> Plans:
    return space.draw(np.random.default_rng(seed), count, guided=False)


def test_it_learns_how_candidates_add_up() -> None:
    for seed in range(3):
        space, vectors = planted(seed)
        seen, others = draw(space, 40, 1), draw(space, 300, 2)
        target = value_target(space, seen, truth(vectors, seen), loss=True)
        kernels = Kernels(space, seen)
        mean, spread = Forecast(target, kernels, seen).predict(kernels.compare(others))
        actual = np.array([target.scale(value) for value in truth(vectors, others).tolist()])
        before = np.abs(actual - target.expected(others)).mean()
        assert np.abs(actual - mean).mean() < 0.25 * before
        # Its spread says how far it is off, within a factor.
        assert 0.4 < np.std((actual - mean) / spread) < 2


def test_what_it_has_seen_it_knows() -> None:
    space, vectors = planted()
    seen = draw(space, 30, 1)
    target = value_target(space, seen, truth(vectors, seen), loss=True)
    kernels = Kernels(space, seen)
    _, spread = Forecast(target, kernels, seen).predict(kernels.compare(seen))
    _, elsewhere = Forecast(target, kernels, seen).predict(kernels.compare(draw(space, 200, 3)))
    assert spread.mean() < elsewhere.mean()


def test_an_additive_truth_is_left_as_it_is() -> None:
    space, _ = planted()
    seen, others = draw(space, 20, 1), draw(space, 100, 2)
    assert space.damage is not None
    target = value_target(space, seen, space.of(space.damage, seen).sum(1), loss=True)
    kernels = Kernels(space, seen)
    mean, _ = Forecast(target, kernels, seen).predict(kernels.compare(others))
    np.testing.assert_allclose(mean, target.expected(others), atol=1e-9)


def test_a_latency_that_is_off_by_a_factor_is_corrected() -> None:
    space, _ = planted()
    seen, others = draw(space, 10, 1), draw(space, 100, 2)
    target = latency_target(space, seen, 1.1 * space.predicted_ms(seen))
    kernels = Kernels(space, seen)
    mean, spread = Forecast(target, kernels, seen).predict(kernels.compare(others))
    np.testing.assert_allclose(np.exp(mean), 1.1 * space.predicted_ms(others), rtol=1e-2)
    assert spread.max() < 0.05


@pytest.mark.parametrize("plan", [[0] * SITES, [1] + [0] * (SITES - 1), [2] * SITES])
def test_shares_are_of_unit_length_where_something_is_replaced(plan: list[int]) -> None:
    space, _ = planted()
    found = shares(space, np.array([plan]))
    assert (found**2).sum() == pytest.approx(float(any(plan)))


def test_kernels_are_symmetric_and_positive() -> None:
    space, _ = planted()
    plans = draw(space, 60, 4)
    compared = Kernels(space, plans).compare(plans)
    for kernel, own in zip(compared.with_seen, compared.alone, strict=True):
        np.testing.assert_allclose(kernel, kernel.T, atol=1e-12)
        np.testing.assert_allclose(np.diag(kernel), own, atol=1e-12)
        assert np.linalg.eigvalsh(kernel).min() > -1e-9
