from __future__ import annotations

import itertools
import math
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import StudyDirection
from optuna.testing.pytest_samplers import (
    BasicSamplerTestCase,
    MultiObjectiveSamplerTestCase,
    RelativeSamplerTestCase,
)
from scipy.stats import norm

from mixerzoo.plan import KEEP_CANDIDATE, Candidate, Plan
from mixerzoo_search.additive import AdditiveModel
from mixerzoo_search.elites import elites
from mixerzoo_search.exact import solve
from mixerzoo_search.prior import Prior
from mixerzoo_search.sampler import PlanSampler
from mixerzoo_search.sampler.proposals import log_improvement

optuna.logging.set_verbosity(optuna.logging.WARNING)


class TestConformance(BasicSamplerTestCase, RelativeSamplerTestCase, MultiObjectiveSamplerTestCase):
    """Optuna's own checks of a sampler."""

    @pytest.fixture
    def sampler(self) -> Callable[[], BaseSampler]:
        return PlanSampler


def make_model(sites: int = 8, candidates: int = 5, seed: int = 0) -> AdditiveModel:
    rng = np.random.default_rng(seed)
    row = (KEEP_CANDIDATE, *(Candidate(f"m{at}", 0.5) for at in range(candidates - 1)))
    saved = np.sort(rng.uniform(0.1, 1.0, (sites, candidates - 1)))
    loss = np.sort(rng.lognormal(-2, 1, (sites, candidates - 1))) * rng.lognormal(0, 1, (sites, 1))
    return AdditiveModel(
        sites=tuple(f"s{at}" for at in range(sites)),
        candidates=(row,) * sites,
        loss=tuple((0.0, *map(float, values)) for values in loss),
        latency_ms=tuple((0.0, *(-float(value) for value in values)) for values in saved),
        base_ms=1.0 + sites,
    )


def suggest(trial: optuna.Trial, model: AdditiveModel) -> Plan:
    choices = {
        site: trial.suggest_categorical(site, [str(candidate) for candidate in row])
        for site, row in zip(model.sites, model.candidates, strict=True)
    }
    return Plan.from_json(choices)


def true_loss(model: AdditiveModel, plan: Plan) -> float:
    """The additive loss, and an interaction of neighbours that the additive model does not know."""
    losses = [row[at] for row, at in zip(model.loss, model.indices(plan), strict=True)]
    return sum(losses) + 3.0 * sum((a * b) ** 0.5 for a, b in itertools.pairwise(losses))


def search(
    model: AdditiveModel, sampler: BaseSampler, budget: float, trials: int, *, multi: bool = False
) -> optuna.Study:
    def objective(trial: optuna.Trial) -> float | tuple[float, float]:
        plan = suggest(trial, model)
        trial.set_constraint("latency", model.predict_ms(plan) - budget)
        loss = true_loss(model, plan)
        return (loss, model.predict_ms(plan)) if multi else loss

    study = optuna.create_study(directions=["minimize"] * (2 if multi else 1), sampler=sampler)
    study.optimize(objective, n_trials=trials)
    return study


def plans(study: optuna.Study) -> list[tuple[Any, ...]]:
    return [tuple(sorted(trial.params.items())) for trial in study.trials]


@pytest.mark.parametrize("multi", [False, True])
def test_no_plan_is_repeated_and_none_breaks_the_budget(multi: bool) -> None:
    model = make_model()
    sampler = PlanSampler(model=model, budget_ms=6.0, seed=1)
    study = search(model, sampler, 6.0, 60, multi=multi)
    assert len(set(plans(study))) == 60
    for trial in study.trials:
        assert model.predict_ms(Plan.from_json({site: trial.params[site] for site in model.sites})) <= 6.0


def test_it_beats_random_search_on_what_the_model_does_not_know() -> None:
    wins = 0
    for seed in range(4):
        model = make_model(sites=10, seed=seed)
        ours = search(model, PlanSampler(model=model, budget_ms=7.0, seed=seed), 7.0, 60)
        random = search(model, RandomSampler(seed=seed), 7.0, 60)
        wins += ours.best_value < random.best_value
    assert wins == 4


def test_evidence_improves_on_the_exact_solution_of_a_wrong_model() -> None:
    model = make_model(sites=10, seed=2)
    exact = solve(model, 7.0)
    assert exact is not None
    study = optuna.create_study(sampler=PlanSampler(model=model, budget_ms=7.0, seed=0))
    study.enqueue_trial(exact.plan.to_json())

    def objective(trial: optuna.Trial) -> float:
        return true_loss(model, suggest(trial, model))

    study.optimize(objective, n_trials=150)
    assert study.trials[0].params == exact.plan.to_json()
    assert study.best_value < true_loss(model, exact.plan)


@pytest.mark.parametrize("with_model", [True, False])
def test_a_small_space_is_exhausted_before_anything_is_repeated(with_model: bool) -> None:
    model = make_model(sites=3, candidates=3)
    sampler = PlanSampler(model=model if with_model else None, budget_ms=2.5, seed=0)
    study = search(model, sampler, 2.5, 30)
    assert len(set(plans(study)[:26])) >= 26 - (0 if with_model else 1)
    assert len(set(plans(study))) == 27
    if with_model:  # what meets the budget came first
        fits = [
            model.predict_ms(Plan.from_json({s: t.params[s] for s in model.sites})) <= 2.5
            for t in study.trials
        ]
        feasible = sum(
            model.predict_ms(model.plan(indices)) <= 2.5 for indices in itertools.product(range(3), repeat=3)
        )
        assert all(fits[:feasible])


def test_enqueued_and_running_plans_are_known() -> None:
    model = make_model(sites=2, candidates=2)
    study = optuna.create_study(sampler=PlanSampler(model=model, seed=0))
    study.enqueue_trial({"s0": "keep", "s1": "keep"})
    study.enqueue_trial({"s0": "m0@0.5", "s1": "keep"})
    seen = []
    for _ in range(4):  # asked, never told: all are running
        seen.append(suggest(study.ask(), model))
    assert len(set(seen)) == 4
    late = optuna.create_study(sampler=PlanSampler(model=model, seed=0))
    asked = late.ask()  # sampled, but nothing suggested yet
    first = suggest(late.ask(), model)
    assert suggest(asked, model) != first


def test_a_seed_decides_everything_and_a_study_can_be_resumed(tmp_path: Path) -> None:
    model = make_model()

    def run(name: str, parts: list[int], seed: int) -> list[tuple[Any, ...]]:
        storage = f"sqlite:///{tmp_path}/{name}.db"
        for part in parts:
            sampler = PlanSampler(model=model, budget_ms=6.0, seed=seed)
            study = optuna.create_study(storage=storage, study_name="s", load_if_exists=True, sampler=sampler)
            study.optimize(lambda trial: true_loss(model, suggest(trial, model)), n_trials=part)
        found = plans(study)
        study._storage.remove_session()
        return found

    whole = run("whole", [12], 0)
    assert run("parts", [1, 6, 5], 0) == whole
    assert run("other", [12], 1) != whole


def test_the_prior_is_followed_first_and_a_wrong_one_is_forgotten() -> None:
    names = ["keep", "good@1", "bad@1"]
    believed = Prior({f"s{at}": {"keep": 0.02, "good@1": 0.08, "bad@1": 0.9} for at in range(8)})
    study = optuna.create_study(sampler=PlanSampler(prior=believed, seed=0, n0=10))

    def objective(trial: optuna.Trial) -> float:
        return float(sum(trial.suggest_categorical(f"s{at}", names) == "bad@1" for at in range(8)))

    study.optimize(objective, n_trials=120)
    values = [trial.value for trial in study.trials if trial.value is not None]
    assert np.mean(values[:5]) > 5
    assert study.best_value <= 1


def test_other_studies_are_served_at_random() -> None:
    model = make_model()
    study = optuna.create_study(sampler=PlanSampler(model=model, budget_ms=6.0))

    def objective(trial: optuna.Trial) -> float:
        kind = trial.suggest_categorical("kind", [True, 1, "x", None])
        # A site by a name that the model knows, with choices that it does not.
        unknown = trial.suggest_categorical("s0", ["other", "choices"])
        extra = trial.suggest_float("y", 0, 1) if kind == "x" else trial.suggest_int("z", 1, 9, log=True)
        return extra + len(unknown)

    study.optimize(objective, n_trials=30)
    assert len(study.trials) == 30


def test_an_unreachable_budget_gives_the_fastest_first() -> None:
    model = make_model()
    study = search(model, PlanSampler(model=model, budget_ms=0.01, seed=0), 0.01, 20)
    assert Plan.from_json({site: study.trials[0].params[site] for site in model.sites}) == model.fastest()
    assert len(set(plans(study))) == 20


def test_threads_do_not_share_a_plan() -> None:
    model = make_model(sites=3, candidates=3)
    study = optuna.create_study(sampler=PlanSampler(model=model, seed=0))
    study.optimize(lambda trial: true_loss(model, suggest(trial, model)), n_trials=20, n_jobs=2)
    assert len(set(plans(study))) == 20


def test_a_space_of_one_plan() -> None:
    study = optuna.create_study(sampler=PlanSampler())
    study.optimize(lambda trial: float(trial.suggest_categorical("s0", ["keep"]) == "keep"), n_trials=3)
    assert len(study.trials) == 3


def test_the_sampler_can_be_pickled() -> None:
    model = make_model()
    copy = pickle.loads(pickle.dumps(PlanSampler(model=model, budget_ms=6.0, seed=3)))
    assert plans(search(model, copy, 6.0, 5)) == plans(
        search(model, PlanSampler(model=model, budget_ms=6.0, seed=3), 6.0, 5)
    )


def planted(seed: int, sites: int = 4, candidates: int = 6) -> tuple[AdditiveModel, np.ndarray]:
    """Return a model whose scores are the squared lengths of vectors, and the vectors: their sum is what counts."""
    rng = np.random.default_rng([seed, 7])
    vectors = rng.normal(size=(sites, candidates, 6)) + 1.5 * rng.normal(size=(sites, 1, 6))
    vectors *= rng.lognormal(-1, 0.5, (sites, candidates, 1))
    vectors[:, 0] = 0
    model = make_model(sites, candidates, seed)
    return replace(
        model, loss=tuple(tuple(map(float, row)) for row in (vectors**2).sum(-1).tolist())
    ), vectors


def test_it_finds_what_the_additive_model_cannot_rank() -> None:
    found, regret, regret_of_order, trials = 0, 0.0, 0.0, 24
    for seed in (0, 4, 6, 7):
        model, vectors = planted(seed)
        every = np.indices((6,) * 4).reshape(4, -1).T
        losses = (vectors[np.arange(4), every].sum(1) ** 2).sum(-1)
        ms = model.base_ms + np.array(model.latency_ms)[np.arange(4), every].sum(1)
        predicted = np.array(model.loss)[np.arange(4), every].sum(1)
        budget = float(np.quantile(ms, 0.4))
        best = losses[ms <= budget].min()
        order = np.argsort(np.where(ms <= budget, predicted, np.inf))[:trials]

        def objective(
            trial: optuna.Trial,
            model: AdditiveModel = model,
            vectors: np.ndarray = vectors,
            budget: float = budget,
        ) -> float:
            plan = suggest(trial, model)
            trial.set_constraint("latency", model.predict_ms(plan) - budget)
            return float((vectors[np.arange(4), list(model.indices(plan))].sum(0) ** 2).sum())

        study = optuna.create_study(sampler=PlanSampler(model=model, budget_ms=budget, seed=seed))
        study.optimize(objective, n_trials=trials)
        found += study.best_value <= best + 1e-9
        regret += study.best_value / best - 1
        regret_of_order += losses[order].min() / best - 1
    assert found >= 3
    assert regret < 0.3 * regret_of_order


def test_measured_latencies_correct_what_is_within_the_budget() -> None:
    for factor in (0.9, 1.1):
        model = make_model(sites=6)

        def objective(trial: optuna.Trial, model: AdditiveModel = model, factor: float = factor) -> float:
            plan = suggest(trial, model)
            trial.set_constraint("latency", factor * model.predict_ms(plan) - 5.0)
            return true_loss(model, plan)

        study = optuna.create_study(sampler=PlanSampler(model=model, budget_ms=5.0, seed=0))
        study.optimize(objective, n_trials=30)
        over = [trial.constraints["latency"] > 0 for trial in study.trials]
        assert sum(over[6:]) <= 2
        # All of the room there really is gets used.
        assert (
            max(t.constraints["latency"] for t, no in zip(study.trials, over, strict=True) if not no) > -0.15
        )


def test_a_study_of_three_objectives_and_no_model_is_served() -> None:
    names = [f"c{at}" for at in range(4)]

    def objective(trial: optuna.Trial) -> tuple[float, float, float]:
        plan = [names.index(trial.suggest_categorical(f"s{at}", names)) for at in range(4)]
        return float(sum(plan)), float(plan[0] - plan[1]), -float(plan[2])

    study = optuna.create_study(directions=["minimize", "maximize", "minimize"], sampler=PlanSampler(seed=0))
    study.optimize(objective, n_trials=25)
    assert len(set(plans(study))) == 25


def test_the_improvement_of_a_normal_has_no_underflow() -> None:
    z = np.array([-1e6, -40.0, -5.0, -1.0, -0.999, 0.0, 3.0])
    found = log_improvement(z)
    assert np.isfinite(found).all()
    assert (np.diff(found) > 0).all()
    middle = z[2:]
    plain = np.exp(-0.5 * middle**2) / math.sqrt(2 * math.pi) + middle * norm.cdf(middle)
    np.testing.assert_allclose(found[2:], np.log(plain), rtol=1e-6)


def trial(number: int, values: list[float], **constraints: float) -> optuna.trial.FrozenTrial:
    made = optuna.trial.create_trial(values=values, constraints=constraints)
    made.number = number
    return made


def test_elites() -> None:
    low, high = StudyDirection.MINIMIZE, StudyDirection.MAXIMIZE
    many = [trial(at, [float(at)]) for at in range(50)]
    assert [t.number for t in elites(many, [low])] == [0, 1, 2, 3, 4]
    assert [t.number for t in elites(many, [high])] == [49, 48, 47, 46, 45]
    front = [
        trial(0, [1.0, 3.0]),
        trial(1, [2.0, 2.0]),
        trial(2, [2.0, 3.0]),
        trial(3, [0.0, 0.0], latency=1.0),
    ]
    assert [t.number for t in elites(front, [low, low])] == [0, 1]
    assert [t.number for t in elites(front[3:], [low, low])] == [3]
    assert elites([trial(0, [float("inf")])], [low]) == []
