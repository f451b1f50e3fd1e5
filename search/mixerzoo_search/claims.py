"""Who evaluates which plan: any number of processes share a study, and none evaluates a plan that another one has.

A plan is chosen first, in a copy of the study, and then claimed: a trial of it is added as running, with all its
parameters and the name of the process, in one step of the storage. Storages number trials one after the other, so
that of several claims on a plan all see the lowest: the others withdraw before anything is evaluated. Nothing waits in
a queue: what is to be evaluated next follows from the trials that there are.
"""

from __future__ import annotations

import uuid
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState, create_trial

from mixerzoo.plan import Plan
from mixerzoo_search.additive import AdditiveModel
from mixerzoo_search.evaluate import PlanResult
from mixerzoo_search.workers import WORKER, Worker

# Trial attributes.
RESULT = "result"  # the evaluation as JSON
SOURCE = "source"  # who proposed the plan
WEIGHTS = "weights"  # hash of the weights that it was evaluated with
TAKEN = "taken from"  # the run that evaluated it
REJECTED = "rejected"  # why its evaluation is no result
CLAIM = "claim"  # random name of a claim
WITHDRAWN = "withdrawn"  # why it was not evaluated here
LOST = "lost"  # what became of the process that should have evaluated it

CONSTRAINT = "latency_over_budget_ms"


def has_result(trial: FrozenTrial) -> bool:
    """Say whether a trial's plan was evaluated, to whatever end: it needs no other evaluation."""
    return trial.state == TrialState.COMPLETE or REJECTED in trial.user_attrs


def counts(trial: FrozenTrial) -> bool:
    """Say whether it is one of the evaluations that were asked for; those of another run are not."""
    return has_result(trial) and TAKEN not in trial.user_attrs


def is_running(trial: FrozenTrial) -> bool:
    """Say whether a process is at it."""
    return trial.state == TrialState.RUNNING


def distributions(model: AdditiveModel) -> dict[str, CategoricalDistribution]:
    """Return the space of the study: one flat categorical a site."""
    rows = zip(model.sites, model.candidates, strict=True)
    return {site: CategoricalDistribution([str(candidate) for candidate in row]) for site, row in rows}


def is_in(plan: Plan, model: AdditiveModel) -> bool:
    """Say whether the space has all candidates of a plan."""
    return tuple(site for site, _ in plan.choices) == model.sites and all(
        candidate in row for (_, candidate), row in zip(plan.choices, model.candidates, strict=True)
    )


def next_plan(
    study: Study, trials: Sequence[FrozenTrial], seeds: Sequence[Plan], model: AdditiveModel
) -> tuple[Plan, str]:
    """Return what is evaluated next and who proposed it: lost plans, then seeds, then what the sampler says."""
    taken = [_choices(trial) for trial in trials if has_result(trial) or is_running(trial)]
    wanted = [
        (_choices(trial), trial.user_attrs.get(SOURCE, "sampler")) for trial in trials if _is_lost(trial)
    ]
    wanted += [(plan.to_json(), "exact") for plan in seeds]
    for choices, source in wanted:
        plan = Plan.from_json(choices)
        if choices not in taken and is_in(plan, model):
            return plan, source
    return _sampled(study, trials, model), "sampler"


def _choices(trial: FrozenTrial) -> dict[str, str]:
    return {site: str(choice) for site, choice in trial.params.items()}


def _is_lost(trial: FrozenTrial) -> bool:
    return trial.state == TrialState.FAIL and not has_result(trial) and WITHDRAWN not in trial.user_attrs


def _sampled(study: Study, trials: Sequence[FrozenTrial], model: AdditiveModel) -> Plan:
    """Ask the sampler, in a copy of the study, so that other processes only ever see whole plans."""
    copy = optuna.create_study(directions=study.directions, sampler=study.sampler)
    copy.add_trials([trial for trial in trials if trial.state != TrialState.WAITING])
    with warnings.catch_warnings():
        # A frozen plan's values are compared with the choices, which is all that this warning is about.
        warnings.simplefilter("ignore", UserWarning)
        trial = copy.ask()
        choices = {
            site: str(trial.suggest_categorical(site, row.choices))
            for site, row in distributions(model).items()
        }
    return Plan.from_json(choices)


def claim(
    study: Study, plan: Plan, source: str, *, model: AdditiveModel, worker: Worker, most: int
) -> int | None:
    """Claim a plan for this process; return its trial's number, or None if it has withdrawn.

    Args:
        study: the study.
        plan: what is to be evaluated.
        source: who proposed it.
        model: gives the space.
        worker: this process.
        most: evaluations that were asked for: with as many before this one, there is nothing left to do.
    """
    name = uuid.uuid4().hex
    space = distributions(model)
    study.add_trial(
        create_trial(
            state=TrialState.RUNNING,
            params=plan.to_json(),
            distributions=dict(space),
            user_attrs={SOURCE: source, WORKER: worker.name, CLAIM: name},
        )
    )
    trials = study.get_trials(deepcopy=False)
    mine = next(trial for trial in reversed(trials) if trial.user_attrs.get(CLAIM) == name)
    others = [trial for trial in trials if trial.number != mine.number]
    before = [trial for trial in others if is_running(trial) and trial.number < mine.number]
    done = [trial for trial in others if has_result(trial)]
    same = next((trial for trial in [*done, *before] if trial.params == mine.params), None)
    if same is not None:
        reason = f"trial {same.number} has this plan"
    elif sum(counts(trial) for trial in done) + len(before) >= most:
        reason = f"there are {most} trials without it"
    else:
        return mine.number
    close(study, mine, **{WITHDRAWN: reason})
    return None


def close(study: Study, trial: FrozenTrial, **reason: Any) -> None:
    """End a running trial without a result, unless another process has ended it."""
    if annotate(study, trial.number, reason):
        end(study, trial.number)


def end(study: Study, number: int, values: Sequence[float] | None = None) -> bool:
    """End a running trial with its values, or as failed; False if another process has ended it."""
    try:
        if values is None:
            study.tell(number, state=TrialState.FAIL)
        else:
            study.tell(number, list(values))
    except (ValueError, optuna.exceptions.UpdateFinishedTrialError):
        return False
    return True


def annotate(
    study: Study, number: int, attributes: Mapping[str, Any], *, over_ms: float | None = None
) -> bool:
    """Set attributes of a running trial, and by how much it is over the budget; False if it runs no more."""
    storage = study._storage
    trial_id = storage.get_trial_id_from_study_id_trial_number(study._study_id, number)
    try:
        for name, value in attributes.items():
            storage.set_trial_user_attr(trial_id, name, value)
        if over_ms is not None:
            for name, value in create_trial(
                value=0.0, constraints={CONSTRAINT: over_ms}
            ).system_attrs.items():
                storage.set_trial_system_attr(trial_id, name, value)
    except optuna.exceptions.UpdateFinishedTrialError:
        return False
    return True


def close_lost(study: Study, worker: Worker) -> None:
    """End the trials of processes that are dead: whoever is next evaluates their plans."""
    lost = []
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        name = trial.user_attrs.get(WORKER)
        if name is None or not worker.is_alive(study, name):
            close(study, trial, **{LOST: "its process ended" if name else "it was no claim"})
            lost.append(name)
    for name in lost:
        if name is not None:
            worker.forget(name)


def add_finished(
    study: Study, result: PlanResult, *, model: AdditiveModel, budget_ms: float, run: str, weights: str
) -> None:
    """Add an evaluation that another run has made."""
    study.add_trial(
        create_trial(
            state=TrialState.COMPLETE,
            values=[result.loss, result.latency_ms],
            params=result.plan.to_json(),
            distributions=dict(distributions(model)),
            user_attrs={RESULT: result.to_json(), SOURCE: result.source, TAKEN: run, WEIGHTS: weights},
            constraints={CONSTRAINT: result.latency_ms - budget_ms},
        )
    )
