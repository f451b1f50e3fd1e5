"""Another search on what a run has made: its latencies, scores and statistics, and the plans that it has evaluated.

All that carries over is copied into the new run directory, which appears whole or not at all and then stands for
itself; only the library is referred to. Latencies carry over as they are, with the teacher's: those of a run are on
the scale of its own `teacher_ms`.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from optuna.study import Study
from optuna.trial import TrialState

from mixerzoo.errors import MixerzooError
from mixerzoo.files import json_hash, write_json
from mixerzoo.latency.store import code_of
from mixerzoo.plan import Candidate, Plan
from mixerzoo.registry import get_registry
from mixerzoo.temporary import is_free
from mixerzoo_search.additive import AdditiveModel
from mixerzoo_search.candidates import CandidateLibrary, Candidates
from mixerzoo_search.claims import RESULT, WEIGHTS, add_finished, is_in
from mixerzoo_search.context import Context
from mixerzoo_search.differences import machines
from mixerzoo_search.evaluate import PlanResult
from mixerzoo_search.run_directory import RunDirectory
from mixerzoo_search.study import existing_study
from mixerzoo_search.timing import FIT_PLANS

TAKEN_FILE = "taken"
CHECKED = 20  # random students, besides those that the correction is fitted on, that its error is measured on


@dataclass(frozen=True, kw_only=True)
class Carried:
    """What a new run takes over from an earlier one.

    Attributes:
        files: name -> content of its JSON files, as they stand in the new run.
        teacher_ms: the teacher's latency there, None where latencies have to be measured anew.
        why: they have to be, None where they do not.
        told: what is taken over, in words.
    """

    files: dict[str, Any]
    teacher_ms: float | None
    why: str | None
    told: str


def carry(
    source: RunDirectory,
    candidates: Candidates,
    *,
    environment: Mapping[str, Any],
    storage: str | None,
    steps_anew: bool,
) -> Carried:
    """Gather what a run with these candidates can take from `source`, finished or not; writes nothing.

    Latencies, and the evaluations that hold some, carry over from the same machine and versions only; so do those of
    a mixer from the same version of its plugin, and with the same code. The gradient steps that the run has chosen
    count again, so that nothing has to be distilled, unless there are candidates that it did not have.

    Args:
        source: the earlier run.
        candidates: of the new one.
        environment: of measurements here.
        storage: where its study is; in its directory if None.
        steps_anew: choose the candidates that get gradient steps anew.
    """
    record = source.record()
    why = machines(record.get("environment") or {}, environment)
    latency = source.load("latency")
    same = _unchanged(record["identity"], candidates) - _other_code(latency)
    files: dict[str, Any] = {}
    for name in ("statistics", "scores"):
        content = source.load(name)
        if content is not None:
            files[name] = content
    before = record["identity"]["space"]
    known = all(str(c) in before.get(site, ()) for site, row in candidates.items() for c in row)
    stepped = source.load("stepped")
    if stepped is not None and known and not steps_anew:
        files["stepped"] = stepped
    told = [f"{len(files.get('scores', ()))} scores"]
    if why is None:
        if latency is not None:
            files["latency"] = latency = _latencies(latency, same)
            told.insert(
                0, f"latency of {sum(map(len, latency['change_ms'].values()))} candidates at their sites"
            )
        checked = [row for row in source.load("latency_check") or () if _is_of(row["plan"], same)]
        evaluated, unread = _evaluations(source, storage)
        found = [row for row in evaluated if _is_of(row["result"]["plan"], same)]
        files[TAKEN_FILE] = {
            "run": source.path.resolve().name,
            "evaluations": found,
            "latency_check": checked,
        }
        told.append(unread or f"{len(found)} evaluated plans")
    teacher_ms = float(record["teacher_ms"]) if why is None else None
    return Carried(files=files, teacher_ms=teacher_ms, why=why, told=", ".join(told))


def begin(run: RunDirectory, carried: Carried, identity: Mapping[str, Any], **record: Any) -> None:
    """Make the new run directory, whole or not at all."""
    staged = run.path.with_name(f".{run.path.name}.tmp")
    shutil.rmtree(staged, ignore_errors=True)
    staged.parent.mkdir(parents=True, exist_ok=True)
    for name, content in carried.files.items():
        write_json(staged / f"{name}.json", content)
    RunDirectory(staged).start(identity, **record)
    if is_free(run.path):
        shutil.rmtree(run.path, ignore_errors=True)
    staged.rename(run.path)


def take_latency_check(context: Context, model: AdditiveModel) -> None:
    """Let the random students of the earlier run be this one's, where they are plans of its space."""
    taken = context.run.load(TAKEN_FILE)
    if taken is None or context.run.load("latency_check") is not None:
        return
    rows = [row for row in taken["latency_check"] if is_in(Plan.from_json(row["plan"]), model)]
    if len(rows) >= FIT_PLANS + CHECKED:
        context.run.store("latency_check", rows)


def take_evaluations(context: Context, study: Study, model: AdditiveModel) -> int:
    """Add the plans that the earlier run has evaluated, with the same weights, to the study; return how many."""
    taken = context.run.load(TAKEN_FILE)
    if taken is None:
        return 0
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.RUNNING))
    known = {Plan.from_json(trial.params).key for trial in trials if trial.params}
    source = f"run {taken['run']}"
    for row in taken["evaluations"]:
        plan = Plan.from_json(row["result"]["plan"])
        if plan.key in known or not is_in(plan, model):
            continue
        if weights_of(context.library, plan) != row["weights"]:
            continue
        predicted = {"predicted_ms": model.predict_ms(plan), "predicted_loss": model.predict_loss(plan)}
        result = PlanResult.from_json(row["result"] | predicted | {"source": source})
        add_finished(
            study, result, model=model, budget_ms=context.budget_ms, run=taken["run"], weights=row["weights"]
        )
        known.add(plan.key)
    return sum(trial.user_attrs.get("source") == source for trial in study.get_trials(deepcopy=False))


def weights_of(library: CandidateLibrary, plan: Plan) -> str:
    """Return a hash of the weights that a plan's student is stitched from."""
    keys = [
        [site, "" if (entry := library.best(site, candidate)) is None else entry.key]
        for site, candidate in plan.choices
        if not candidate.is_keep
    ]
    return json_hash(keys)[:16]


def _evaluations(source: RunDirectory, storage: str | None) -> tuple[list[dict[str, Any]], str]:
    """Return the finished evaluations of a run with their weights; none, and why, where its study cannot be read."""
    file = source.path / "study.db"
    if storage is None and not file.exists():
        kept = source.record().get("storage")  # known, but for the password
        return [], "" if kept is None else f"no evaluated plans (its study is in '{kept}'; give --storage)"
    storage = storage or f"sqlite:///{file.resolve()}"
    try:
        with existing_study(storage, source.study) as study:  # None where it has not begun yet
            trials = [] if study is None else study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    except MixerzooError as error:
        return [], f"no evaluated plans ({error})"
    return [
        {"result": trial.user_attrs[RESULT], "weights": trial.user_attrs[WEIGHTS]}
        for trial in trials
        if {RESULT, WEIGHTS} <= set(trial.user_attrs)
    ], ""


def _unchanged(identity: Mapping[str, Any], candidates: Candidates) -> set[str]:
    """Return the mixers that come from the same version of the same plugin as in a run."""
    shelf, versions = get_registry().mixers, identity.get("plugins") or {}
    names = {candidate.mixer for row in candidates.values() for candidate in row}
    origins = {name: shelf.origin(name) for name in names}
    return {name for name, origin in origins.items() if versions.get(origin.distribution) == origin.version}


def _other_code(stored: Any) -> set[str]:
    """Return the mixers that were timed, by a run's `latency.json`, with other code than they have now."""
    rows = {} if stored is None else stored.get("code") or {}
    return {
        Candidate.parse(text).mixer
        for row in rows.values()
        for text, code in row.items()
        if code != code_of(text)
    }


def _latencies(stored: Mapping[str, Any], mixers: set[str]) -> dict[str, Any]:
    """Return a run's `latency.json` with the candidates of these mixers only."""
    tables = {
        part: {
            site: {name: value for name, value in row.items() if Candidate.parse(name).mixer in mixers}
            for site, row in content.items()
        }
        for part, content in stored.items()
        if isinstance(content, dict)
    }
    return {**stored, **tables, "reused": 0, "measured": 0}


def _is_of(choices: Mapping[str, str], mixers: set[str]) -> bool:
    """Say whether a plan replaces sites by these mixers only."""
    found = [Candidate.parse(text) for text in choices.values()]
    return all(candidate.is_keep or candidate.mixer in mixers for candidate in found)
