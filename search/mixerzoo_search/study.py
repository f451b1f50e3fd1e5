"""The Optuna study: true loss and latency of stitched students, seeded with exact plans, no plan twice."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import optuna
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from mixerzoo.errors import MixerzooError
from mixerzoo.plan import Plan
from mixerzoo_search.additive import AdditiveModel
from mixerzoo_search.evaluate import PlanResult
from mixerzoo_search.prior import Prior
from mixerzoo_search.sampler import PlanSampler

STUDY_NAME = "mixerzoo"
RESULT = "result"  # trial attribute: the evaluation as JSON
SOURCE = "source"  # trial attribute: who proposed the plan
REJECTED = "rejected"  # trial attribute: why its evaluation is no result


def open_study(
    storage: str, name: str, *, model: AdditiveModel, prior: Prior, budget_ms: float, seed: int
) -> Study:
    """Create or load the study; it minimises (loss, latency in ms).

    Raises:
        MixerzooError: if the storage cannot be reached; its URL is named.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with _answering(storage):
        return optuna.create_study(
            storage=storage,
            study_name=name,
            directions=["minimize", "minimize"],
            load_if_exists=True,
            sampler=PlanSampler(model=model, prior=prior, budget_ms=budget_ms, seed=seed),
        )


def check_storage(storage: str) -> None:
    """Raise MixerzooError if the storage cannot be reached; better before a search than in the middle of it."""
    with _answering(storage):
        optuna.storages.get_storage(storage)


@contextmanager
def _answering(storage: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # SQLAlchemy, its drivers and Optuna each raise their own
        reason = " ".join(str(error).split())[:160]
        raise MixerzooError(f"storage '{storage}': {reason}; give another --storage") from None


def evaluations(study: Study) -> list[PlanResult]:
    """Return the finished evaluations in order."""
    return [
        PlanResult.from_json(trial.user_attrs[RESULT])
        for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    ]


def run_study(
    study: Study,
    evaluate: Callable[[Plan, str], PlanResult],
    *,
    model: AdditiveModel,
    seeds: Sequence[Plan],
    budget_ms: float,
    trials: int,
    minutes: float | None,
    on_result: Callable[[PlanResult, int], None] = lambda result, done: None,
) -> list[PlanResult]:
    """Evaluate plans until there are `trials` finished ones, or the minutes are up; return all of them.

    A plan whose loss is not finite counts as a trial, and is no result.

    Args:
        study: from `open_study`; its finished trials count.
        evaluate: (plan, source) to its result.
        model: gives the sites and their candidates.
        seeds: plans to evaluate first.
        budget_ms: the constraint latency <= budget.
        trials: finished trials to end with.
        minutes: most minutes to spend here, or None.
        on_result: called with each new result and the number of finished trials.
    """
    _retry_interrupted(study)
    for plan in seeds:
        study.enqueue_trial(plan.to_json(), user_attrs={SOURCE: "exact"}, skip_if_exists=True)
    began = time.monotonic()
    done = len(evaluations(study)) + sum(
        REJECTED in trial.user_attrs for trial in study.get_trials(deepcopy=False)
    )
    size = _space_size(model, trials)
    while done < min(trials, size) and (minutes is None or time.monotonic() - began < 60 * minutes):
        trial = study.ask()
        plan = _suggested(trial, model)
        result = evaluate(plan, trial.user_attrs.get(SOURCE, "sampler"))
        done += 1
        if not math.isfinite(result.loss):
            trial.set_user_attr(REJECTED, f"its loss is {result.loss}")
            study.tell(trial, state=TrialState.FAIL)
            continue
        trial.set_user_attr(RESULT, result.to_json())
        trial.set_constraint("latency_over_budget_ms", result.latency_ms - budget_ms)
        study.tell(trial, [result.loss, result.latency_ms])
        on_result(result, done)
    return evaluations(study)


def _suggested(trial: optuna.Trial, model: AdditiveModel) -> Plan:
    with warnings.catch_warnings():
        # A frozen plan's values are compared with the choices, which is all that this warning is about.
        warnings.simplefilter("ignore", UserWarning)
        choices = {
            site: trial.suggest_categorical(site, [str(candidate) for candidate in row])
            for site, row in zip(model.sites, model.candidates, strict=True)
        }
    return Plan.from_json(choices)


def _retry_interrupted(study: Study) -> None:
    """Close trials that a killed process left running, and queue their plans again."""
    running: list[FrozenTrial] = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    for trial in running:
        plan: dict[str, Any] = trial.system_attrs.get("fixed_params") or dict(trial.params)
        source = trial.user_attrs.get(SOURCE, "sampler")
        study.tell(trial.number, state=TrialState.FAIL)
        if plan:
            study.enqueue_trial(plan, user_attrs={SOURCE: source})


def _space_size(model: AdditiveModel, limit: int) -> int:
    """Return the number of plans, or `limit` if there are more."""
    size = 1
    for row in model.candidates:
        size *= len(row)
        if size >= limit:
            return limit
    return size
