"""Which candidates are worth gradient steps: gains checked against every plan there is, bounds, order, limits."""

from __future__ import annotations

import itertools
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixerzoo.plan import Candidate
from mixerzoo_search import steps
from mixerzoo_search.additive import AdditiveModel
from mixerzoo_search.steps import ENOUGH, HOPE, LEAST_GAIN, Effect, Pair, hope, next_round, seconds_of_steps

A, B = Candidate("a", 0.5), Candidate("b")


def make_model(sites: int, candidates: int, seed: int) -> AdditiveModel:
    rng = np.random.default_rng(seed)
    return AdditiveModel.from_scores(
        {
            f"s{site}": {
                Candidate(f"m{at}"): (float(rng.lognormal(-3, 1.5)), -float(rng.uniform(0.05, 1.0)))
                for at in range(candidates)
            }
            for site in range(sites)
        },
        base_ms=2.0 * sites,
    )


def pairs_of(model: AdditiveModel) -> list[Pair]:
    rows = zip(model.sites, model.candidates, strict=True)
    return [(site, c) for site, row in rows for c in row if not c.is_keep]


def least_loss(model: AdditiveModel, budget_ms: float) -> float:
    """Look at every plan."""
    plans = (model.plan(at) for at in itertools.product(*(range(len(row)) for row in model.candidates)))
    within = [model.predict_loss(plan) for plan in plans if model.predict_ms(plan) <= budget_ms + 1e-9]
    return min(within, default=float("nan"))


def gain_of(model: AdditiveModel, budget_ms: float, pair: Pair, factor: float) -> float:
    before = least_loss(model, budget_ms)
    return (before - least_loss(steps._lowered(model, pair, factor), budget_ms)) / before


@settings(max_examples=20)
@given(seed=st.integers(0, 10_000), share=st.floats(0.2, 0.8), factor=st.floats(0.1, 0.95))
def test_gains_are_those_of_all_plans_and_bounds_are_not_below_them(
    seed: int, share: float, factor: float
) -> None:
    model = make_model(4, 3, seed)
    fastest = model.predict_ms(model.fastest())
    budget = fastest + share * (model.base_ms - fastest)
    problem = steps._Problem.of(model, budget)
    assert problem is not None
    for pair in pairs_of(model):
        expected = gain_of(model, budget, pair, factor)
        assert problem.gain(pair, factor) == pytest.approx(expected, abs=1e-6)
        assert problem.bound(pair, factor) >= expected - 1e-9


@settings(max_examples=15)
@given(seed=st.integers(0, 10_000), timed=st.booleans())
def test_what_can_change_the_best_plans_most_comes_first(seed: int, timed: bool) -> None:
    model = make_model(4, 3, seed)
    fastest = model.predict_ms(model.fastest())
    budgets = [fastest + share * (model.base_ms - fastest) for share in (0.6, 0.4)]
    factors = dict.fromkeys(pairs_of(model), 0.5)
    rng = np.random.default_rng(seed)
    seconds = {pair: float(rng.uniform(0.1, 10)) for pair in factors} if timed else None
    chosen = next_round(model, budgets, factors, seconds, most=99)
    gains = {pair: statistics.fmean(gain_of(model, b, pair, 0.5) for b in budgets) for pair in factors}
    worth = {pair: gains[pair] / (seconds[pair] if seconds else 1) for pair in factors}
    assert len({site for site, _ in chosen}) == len(chosen)
    assert all(gains[pair] >= LEAST_GAIN - 1e-6 for pair in chosen)
    assert [worth[pair] for pair in chosen] == sorted((worth[pair] for pair in chosen), reverse=True)
    for site in model.sites:  # at each site the one of highest worth, if any can gain
        able = [pair for pair in factors if pair[0] == site and gains[pair] > LEAST_GAIN + 1e-6]
        if able:
            assert max(able, key=lambda pair: worth[pair]) in chosen
    assert next_round(model, budgets, factors, seconds, most=2) == chosen[:2]


def test_what_no_plan_would_take_gets_no_steps() -> None:
    model = AdditiveModel.from_scores(
        {"s": {A: (0.1, -1.0), B: (1.0, -1.0)}, "t": {A: (0.0, -0.1)}}, base_ms=4.0
    )
    every = dict.fromkeys(pairs_of(model), HOPE)
    assert next_round(model, [3.0], every, None, most=9) == [("s", A)]  # half of 1.0 is still more than 0.1
    assert next_round(model, [3.0], every | {("s", B): 0.09}, None, most=9) == [("s", A)]  # 0.05 beats 0.01
    assert next_round(model, [3.0], {("s", B): 0.09}, None, most=9) == [("s", B)]
    assert next_round(model, [3.0], {("s", A): 1.0}, None, most=9) == []  # no hope
    assert next_round(model, [4.0], every, None, most=9) == []  # the teacher itself meets it
    assert next_round(model, [0.5], every, None, most=9) == []  # out of reach
    assert next_round(model, [3.0, 0.5], every, None, most=9) == [("s", A)]
    assert next_round(model, [], every, None, most=9) == []
    assert next_round(model, [3.0], every, None, most=9, harmless=0.09) == [("s", A)]
    assert next_round(model, [3.0], every, None, most=9, harmless=0.11) == []  # as good as the teacher


def test_a_score_below_nothing_cannot_fall() -> None:
    model = AdditiveModel.from_scores({"s": {A: (-1e-9, -1.0)}, "t": {A: (1.0, -1.0)}}, base_ms=4.0)
    every = dict.fromkeys(pairs_of(model), HOPE)
    assert next_round(model, [2.0], every, None, most=9) == [("t", A)]


def effect(candidate: Candidate, factor: float, solve_s: float = 1.0, steps_s: float = 8.0) -> Effect:
    return Effect(candidate=candidate, before=2.0, after=2.0 * factor, solve_s=solve_s, steps_s=steps_s)


def test_hope_is_the_best_effect_so_far() -> None:
    assert hope([], "a") == HOPE
    assert hope([effect(A, 0.9)], "a") == HOPE
    assert hope([effect(A, 0.3)], "a") == 0.3
    seen = [effect(A, 0.9 + at / 100) for at in range(ENOUGH)]
    assert hope(seen, "a") == 0.9
    assert hope(seen, "b") == HOPE
    assert hope([effect(A, 1.3)] * ENOUGH, "a") == 1.0
    assert hope([effect(A, -0.1)] * ENOUGH, "a") == 0.0
    assert Effect(candidate=A, before=0.0, after=0.0, solve_s=1.0, steps_s=1.0).factor == 1.0


def test_seconds_follow_the_candidate_then_its_closed_form() -> None:
    assert seconds_of_steps([], A, 0.5) == 0.5 * steps.STEPS_PER_SOLVE
    seen = [effect(B, 0.9, solve_s=2.0, steps_s=6.0), effect(B, 0.9, solve_s=0.0, steps_s=9.0)]
    assert seconds_of_steps(seen, A, 0.5) == 1.5
    assert seconds_of_steps([*seen, effect(A, 0.9, steps_s=4.0)], A, 0.5) == 4.0
