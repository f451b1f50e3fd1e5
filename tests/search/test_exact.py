from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixerzoo.plan import KEEP_CANDIDATE, Candidate, Plan
from mixerzoo_search import knapsack
from mixerzoo_search.additive import AdditiveModel
from mixerzoo_search.exact import Solution, by_highs, frontier, shared, shared_limit, solve
from mixerzoo_search.knapsack import undominated


def random_model(sites: int, candidates: int, seed: int, loss_scale: float = 1.0) -> AdditiveModel:
    rng = np.random.default_rng(seed)
    names = (KEEP_CANDIDATE, *(Candidate(f"m{at}") for at in range(candidates - 1)))
    shape = (sites, candidates - 1)
    loss = loss_scale * rng.lognormal(0, 2, shape)
    saved = rng.uniform(-1.0, 0.2, shape)
    return AdditiveModel(
        sites=tuple(f"s{at}" for at in range(sites)),
        candidates=(names,) * sites,
        loss=tuple((0.0, *map(float, row)) for row in loss),
        latency_ms=tuple((0.0, *map(float, row)) for row in saved),
        base_ms=1.0 + sites,
        intercept_ms=float(rng.uniform(-1, 1)),
        slope=float(rng.uniform(0.5, 1.5)),
    )


def every_plan(model: AdditiveModel) -> list[Plan]:
    return [
        model.plan(indices) for indices in itertools.product(*(range(len(row)) for row in model.candidates))
    ]


def brute_force(model: AdditiveModel, budget: float, avoid: list[Plan], limit: int) -> float | None:
    losses = [
        model.predict_loss(plan)
        for plan in every_plan(model)
        if model.predict_ms(plan) <= budget and all(shared(plan, other) <= limit for other in avoid)
    ]
    return min(losses, default=None)


@settings(max_examples=60, deadline=None)
@given(
    sites=st.integers(1, 4),
    candidates=st.integers(1, 5),
    seed=st.integers(0, 10_000),
    share=st.floats(0, 1.1),
    loss_scale=st.sampled_from([1e-7, 1e-5, 1.0, 10.0, 1e4]),
)
def test_agrees_with_brute_force(
    sites: int, candidates: int, seed: int, share: float, loss_scale: float
) -> None:
    model = random_model(sites, candidates, seed, loss_scale)
    lowest, highest = model.predict_ms(model.fastest()), model.predict_ms(model.plan([0] * sites))
    budget = lowest - 0.05 + share * (highest - lowest)
    expected = brute_force(model, budget, [], sites)
    solution = solve(model, budget)
    if expected is None:
        assert solution is None
        return
    assert solution is not None
    assert solution.loss == pytest.approx(expected, rel=1e-5)
    assert solution.ms <= budget + 1e-8
    assert solution.optimal


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000), overlap=st.sampled_from([0.0, 0.5, 0.75, 1.0]), share=st.floats(0.2, 0.999)
)
def test_diversity_agrees_with_brute_force(seed: int, overlap: float, share: float) -> None:
    model = random_model(4, 3, seed)
    lowest, highest = model.predict_ms(model.fastest()), model.predict_ms(model.plan([0] * 4))
    budget = lowest + share * (highest - lowest)
    avoid = [model.fastest()]
    first = solve(model, budget)
    assert first is not None
    avoid.append(first.plan)
    solution = solve(model, budget, avoid=avoid, overlap=overlap)
    expected = brute_force(model, budget, avoid, shared_limit(4, overlap))
    if expected is None:
        assert solution is None
        return
    assert solution is not None
    assert solution.loss == pytest.approx(expected, rel=1e-5, abs=1e-12)


def test_tiny_and_huge_losses_in_one_model() -> None:
    # The optimum costs 5e-7 beside candidates that cost 10: an absolute tolerance would miss it.
    a, b, c = Candidate("a"), Candidate("b"), Candidate("c")
    model = AdditiveModel(
        sites=("x", "y", "z"),
        candidates=((KEEP_CANDIDATE, a, b, c),) * 3,
        loss=((0.0, 1e-7, 3e-7, 10.0),) * 3,
        latency_ms=((0.0, -1.0, -2.0, -3.0),) * 3,
        base_ms=10.0,
    )
    solution = solve(model, 6.0)
    assert solution is not None
    assert solution.loss == pytest.approx(5e-7)
    solution = solve(model, 2.0)
    assert solution is not None
    assert solution.loss == pytest.approx(20.0, abs=1e-6)


def test_negative_scores_are_welcome() -> None:
    model = AdditiveModel(
        sites=("x",),
        candidates=((KEEP_CANDIDATE, Candidate("a")),),
        loss=((0.0, -0.01),),
        latency_ms=((0.0, 1.0),),
        base_ms=10.0,
    )
    best = solve(model, 12.0)
    assert best is not None
    assert best.loss == -0.01
    within = solve(model, 10.0)
    assert within is not None
    assert within.loss == 0.0


def test_an_unreachable_budget_gives_none() -> None:
    model = random_model(3, 4, 0)
    assert solve(model, model.predict_ms(model.fastest()) - 1e-3) is None
    reached = solve(model, model.predict_ms(model.fastest()))
    assert reached is not None


def test_the_frontier_is_distinct_ordered_and_diverse() -> None:
    model = random_model(10, 6, 3)
    teacher = model.predict_ms(model.plan([0] * 10))
    found = frontier(
        model, [teacher * share for share in (0.6, 0.7, 0.7, 0.8, 1.0)], per_budget=3, overlap=0.7
    )
    assert len({solution.plan for solution in found}) == len(found) >= 9
    assert [solution.ms for solution in found] == sorted(solution.ms for solution in found)
    best = frontier(model, [teacher * 0.8], per_budget=3, overlap=0.7)
    assert len(best) == 3
    for one, other in itertools.combinations(best, 2):
        assert shared(one.plan, other.plan) <= 7


def test_a_frontier_of_one_site_still_gives_distinct_plans() -> None:
    model = random_model(1, 4, 1)
    assert len(frontier(model, [model.base_ms * 3], per_budget=9, overlap=1.0)) == 4


def test_a_large_instance_is_solved() -> None:
    model = random_model(48, 60, 7)
    teacher, fastest = model.predict_ms(model.plan([0] * 48)), model.predict_ms(model.fastest())
    found: list[Solution] = frontier(model, list(np.linspace(fastest * 1.05, teacher, 50)))
    assert len(found) >= 40
    assert all(solution.optimal for solution in found)
    losses = [solution.loss for solution in found]
    assert losses == sorted(losses, reverse=True)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_what_is_left_out_is_dominated_and_nothing_else(pairs: list[tuple[int, int]]) -> None:
    cost = np.array([a for a, _ in pairs], dtype=float)
    weight = np.array([b for _, b in pairs], dtype=float)
    kept = undominated(cost, weight).tolist()
    for at in range(len(pairs)):
        beaten = any(cost[k] <= cost[at] and weight[k] <= weight[at] for k in kept if k != at)
        assert (at in kept) != beaten


def test_where_the_dynamic_program_grows_too_large_highs_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(6, 6, 1)
    budget = 0.5 * (model.predict_ms(model.fastest()) + model.predict_ms(model.plan([0] * 6)))
    expected = solve(model, budget)
    monkeypatch.setattr(knapsack, "MOST_STATES", 1)
    with pytest.raises(knapsack.TooManyStatesError):
        knapsack.cheapest([np.array([2.0, 1.0, 0.0])] * 3, [np.array([0.0, 1.0, 2.1])] * 3, 3.0)
    solution = solve(model, budget)
    assert expected is not None
    assert solution is not None
    assert solution.loss == pytest.approx(expected.loss, rel=1e-6)


@pytest.mark.parametrize("sites", [1, 5, 9])
def test_both_solvers_agree(sites: int) -> None:
    for seed in range(4):
        model = random_model(sites, 6, seed)
        budget = 0.4 * model.predict_ms(model.fastest()) + 0.6 * model.predict_ms(model.plan([0] * sites))
        one, other = solve(model, budget), by_highs(model, budget)
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert one.loss == pytest.approx(other.loss, rel=1e-5, abs=1e-9)
            assert one.optimal
            assert one.gap == 0
