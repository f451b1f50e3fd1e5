"""The samplers that are compared, and one run of each: evaluations are distinct plans, a repeated one is free."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence

import optuna
from optuna.samplers import BaseSampler

from mixerzoo_search.additive import AdditiveModel
from mixerzoo_search.exact import frontier
from mixerzoo_search.prior import Prior
from mixerzoo_search.sampler import PlanSampler

Truth = Callable[[Mapping[str, str]], tuple[float, float]]  # plan -> loss, latency in ms

MOST_TRIALS = 4  # times the evaluations, after which a sampler that only repeats itself is stopped

OTHERS: dict[str, Callable[[int], BaseSampler]] = {
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
    "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed, multivariate=True),
    "nsga2": lambda seed: optuna.samplers.NSGAIISampler(seed=seed, population_size=16),
    "gp": lambda seed: optuna.samplers.GPSampler(seed=seed),
}
OTHERS_OF_TWO = OTHERS | {"nsga3": lambda seed: optuna.samplers.NSGAIIISampler(seed=seed, population_size=16)}


def ours(model: AdditiveModel | None, prior: Prior | None, budget_ms: float | None, seed: int) -> BaseSampler:
    """Return mixerzoo's sampler."""
    return PlanSampler(model=model, prior=prior, budget_ms=budget_ms, seed=seed)


def exact_plans(model: AdditiveModel, budgets_ms: Sequence[float]) -> list[dict[str, str]]:
    """Return the exact plans of the model, those of the first budget first."""
    plans = [solution.plan.to_json() for budget in budgets_ms for solution in frontier(model, [budget])]
    return [plan for at, plan in enumerate(plans) if plan not in plans[:at]]


def run(
    sampler: BaseSampler,
    space: Mapping[str, Sequence[str]],
    truth: Truth,
    *,
    evaluations: int,
    budget_ms: float | None,
    seeds: Sequence[Mapping[str, str]] = (),
) -> list[tuple[float, float]]:
    """Return (loss, ms) of the distinct plans that a sampler evaluates, in order.

    Args:
        sampler: fresh.
        space: site -> choices.
        truth: evaluates a plan.
        evaluations: how many.
        budget_ms: minimise the loss under this constraint; without, minimise loss and latency.
        seeds: plans to evaluate first.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # samplers that are experimental, frozen values
        study = optuna.create_study(directions=["minimize"] * (1 if budget_ms else 2), sampler=sampler)
        for plan in seeds:
            study.enqueue_trial(dict(plan))
        found: dict[tuple[str, ...], tuple[float, float]] = {}
        for _ in range(MOST_TRIALS * evaluations):
            trial = study.ask()
            plan = {site: trial.suggest_categorical(site, list(row)) for site, row in space.items()}
            loss, ms = found.get(tuple(plan.values())) or truth(plan)
            found[tuple(plan.values())] = loss, ms
            if budget_ms:
                trial.set_constraint("latency_over_budget_ms", ms - budget_ms)
            study.tell(trial, loss if budget_ms else [loss, ms])
            if len(found) == evaluations:
                break
        return list(found.values())
