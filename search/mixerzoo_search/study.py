"""The Optuna study: true loss and latency of stitched students, seeded with exact plans, no plan twice."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import optuna
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from mixerzoo.errors import MixerzooError
from mixerzoo.plan import Plan
from mixerzoo_search.additive import AdditiveModel
from mixerzoo_search.claims import (
    REJECTED,
    RESULT,
    WEIGHTS,
    annotate,
    claim,
    close_lost,
    counts,
    end,
    has_result,
    is_running,
    next_plan,
)
from mixerzoo_search.evaluate import PlanResult
from mixerzoo_search.prior import Prior
from mixerzoo_search.sampler import PlanSampler
from mixerzoo_search.workers import Worker

STUDY_NAME = "mixerzoo"
OPEN = "open"  # study attribute: whether the process that leads the search wants more trials
OWNER = "search"  # study attribute: hash of what the search is, so that no other one takes its study
POLL_S = 0.2
ATTEMPTS = 5  # to open a database that other processes are just making
LOCKED_S = 60.0  # that a process waits for another one's write to SQLite


def open_study(
    storage: str,
    name: str,
    *,
    model: AdditiveModel,
    prior: Prior,
    budget_ms: float,
    seed: int,
    owner: str = "",
) -> Study:
    """Create or load the study; it minimises (loss, latency in ms).

    Args:
        storage: URL of the Optuna storage.
        name: of the study.
        model: predicts loss and latency.
        prior: which candidate is promising where.
        budget_ms: the budget.
        seed: of the sampler.
        owner: hash of what the search is.

    Raises:
        MixerzooError: if the storage cannot be reached, or its study of that name is another search's.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with _answering(storage):
        study = optuna.create_study(
            storage=connect(storage),
            study_name=name,
            directions=["minimize", "minimize"],
            load_if_exists=True,
            sampler=PlanSampler(model=model, prior=prior, budget_ms=budget_ms, seed=seed),
        )
        whose = study.user_attrs.get(OWNER)
        if whose is None and owner:
            study.set_user_attr(OWNER, owner)
    if owner and whose not in (None, owner):
        disconnect(study._storage)
        raise of_another(storage, name)
    return study


@contextmanager
def existing_study(storage: str, name: str) -> Iterator[Study | None]:
    """Load a study for the block; None if the storage has none of that name.

    Raises:
        MixerzooError: if the storage cannot be reached.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with _answering(storage):
        database = connect(storage)
        try:
            names = optuna.get_all_study_names(database)
            yield optuna.load_study(study_name=name, storage=database) if name in names else None
        finally:
            disconnect(database)


def of_another(storage: str, name: str) -> MixerzooError:
    """Return the error where a study of that name is another search's."""
    return MixerzooError(
        f"storage '{without_password(storage)}' has a study '{name}' of another search; give a run directory "
        "of another name with --out"
    )


def connect(storage: str) -> optuna.storages.BaseStorage:
    """Return the storage at a URL; with SQLite, one that waits for other processes.

    Where several processes make the tables of a new database at once, all but one are told that these already exist.
    """
    for _ in range(ATTEMPTS - 1):
        try:
            return _connected(storage)
        except Exception as error:  # SQLAlchemy's, of whatever database
            if "already exists" not in str(error):
                raise
            time.sleep(POLL_S)
    return _connected(storage)


def _connected(storage: str) -> optuna.storages.BaseStorage:
    if not storage.startswith("sqlite:"):
        return optuna.storages.get_storage(storage)
    options = {"connect_args": {"timeout": LOCKED_S}}
    return optuna.storages.get_storage(optuna.storages.RDBStorage(storage, engine_kwargs=options))


def disconnect(storage: optuna.storages.BaseStorage) -> None:
    """Close the connections to a database."""
    storage.remove_session()
    engine = getattr(getattr(storage, "_backend", storage), "engine", None)
    if engine is not None:
        engine.dispose()


def is_taken(storage: str, name: str) -> bool:
    """Say whether the storage has a study of that name that belongs to a search.

    Raises:
        MixerzooError: if it cannot be reached; better before a search than in the middle of it.
    """
    with existing_study(storage, name) as study:
        return study is not None and OWNER in study.user_attrs


def without_password(storage: str) -> str:
    """Return a storage URL as it may be shown and kept."""
    head, at, tail = storage.rpartition("@")
    scheme, slashes, account = head.partition("://")
    user, colon, _ = account.partition(":")
    secret = slashes and colon and not scheme.startswith("sqlite")
    return f"{scheme}{slashes}{user}:***{at}{tail}" if secret else storage


@contextmanager
def _answering(storage: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # SQLAlchemy, its drivers and Optuna each raise their own
        reason = " ".join(str(error).split())[:160]
        raise MixerzooError(
            f"storage '{without_password(storage)}': {reason}; give another --storage"
        ) from None


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
    worker: Worker,
    leads: bool = True,
    weights: Callable[[Plan], str] = lambda plan: "",
    on_result: Callable[[PlanResult, int], None] = lambda result, done: None,
) -> list[PlanResult]:
    """Evaluate plans until there are `trials` finished ones, or the minutes are up; return all of them.

    Other processes may be at the same study: their trials count, and no plan is evaluated by two. One of them leads:
    when it wants no more, none begins another trial. It returns when all have finished what they were at. A plan whose
    loss is not finite counts as a trial, and is no result; what was taken over from another run is a result, and does
    not count.

    Args:
        study: from `open_study`; its finished trials count.
        evaluate: (plan, source) to its result.
        model: gives the sites and their candidates.
        seeds: plans to evaluate first.
        budget_ms: the constraint latency <= budget.
        trials: finished trials to end with.
        minutes: most minutes to spend here, or None.
        worker: this process, among those that work on the study.
        leads: whether this process says when it ends, or takes part until then.
        weights: hash of the weights that a plan's student is made of.
        on_result: called with each new result, whoever made it, and the number of finished trials then.
    """
    began = time.monotonic()
    known = {trial.number for trial in study.get_trials(deepcopy=False) if has_result(trial)}
    if leads:
        study.set_user_attr(OPEN, True)
    with worker.working(study):
        while True:
            close_lost(study, worker)
            every = study.get_trials(deepcopy=False)
            _tell_new(every, known, on_result)
            running = sum(is_running(trial) for trial in every)
            plans = len({frozenset(trial.params.items()) for trial in every if has_result(trial)})
            left = min(trials - sum(map(counts, every)), _space_size(model, plans + trials) - plans)
            in_time = minutes is None or time.monotonic() - began < 60 * minutes
            over = left <= 0 or not in_time
            if leads and over and study.user_attrs.get(OPEN):
                study.set_user_attr(OPEN, False)
            over = over or not study.user_attrs.get(OPEN)
            if over and not (running and leads):
                return evaluations(study)
            if over or left <= running:
                time.sleep(POLL_S)  # others are at the last ones; if one of them dies, there is more to do
                continue
            _evaluate_next(study, evaluate, every, seeds, model, worker, weights, budget_ms, trials)


def _tell_new(
    trials: Sequence[FrozenTrial], known: set[int], on_result: Callable[[PlanResult, int], None]
) -> None:
    done = sum(counts(trial) for trial in trials if trial.number in known)
    for trial in trials:
        if has_result(trial) and trial.number not in known:
            known.add(trial.number)
            done += counts(trial)
            if REJECTED not in trial.user_attrs:
                on_result(PlanResult.from_json(trial.user_attrs[RESULT]), done)


def _evaluate_next(
    study: Study,
    evaluate: Callable[[Plan, str], PlanResult],
    trials: Sequence[FrozenTrial],
    seeds: Sequence[Plan],
    model: AdditiveModel,
    worker: Worker,
    weights: Callable[[Plan], str],
    budget_ms: float,
    most: int,
) -> None:
    plan, source = next_plan(study, trials, seeds, model)
    number = claim(study, plan, source, model=model, worker=worker, most=most)
    if number is None:
        return
    result = evaluate(plan, source)
    if not math.isfinite(result.loss):
        if annotate(study, number, {REJECTED: f"its loss is {result.loss}"}):
            end(study, number)
        return
    attributes = {RESULT: result.to_json(), WEIGHTS: weights(plan)}
    if annotate(study, number, attributes, over_ms=result.latency_ms - budget_ms):
        end(study, number, [result.loss, result.latency_ms])


def _space_size(model: AdditiveModel, limit: int) -> int:
    """Return the number of plans, or `limit` if there are more."""
    size = 1
    for row in model.candidates:
        size *= len(row)
        if size >= limit:
            return limit
    return size
