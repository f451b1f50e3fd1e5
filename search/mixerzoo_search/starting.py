"""From the arguments of a search, or those of another run, to its settings, teacher, data and run directory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from mixerzoo.data import Dataset
from mixerzoo.errors import MixerzooError
from mixerzoo.hosts import Teacher
from mixerzoo.latency import default_threads
from mixerzoo.opening import adopt_teacher, open_data, open_teacher
from mixerzoo.progress import Reporter
from mixerzoo_search.run_directory import RUN_FILE, RunDirectory
from mixerzoo_search.settings import FREE, Budget, Settings
from mixerzoo_search.study import without_password

MODEL, DATA = "digits_vit", "digits"
# What another search on the same library may have of its own.
OWN = ("budget", "mixers", "widths", "seed", "distill_minutes", "finetune_minutes", "prior", *FREE)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A search that was asked for.

    Attributes:
        settings: its arguments.
        teacher: the teacher.
        data: the data.
        run: the run directory.
        reporter: shows progress.
        library: folder of distilled candidates, None for the usual one.
        storage: URL of the Optuna storage, None for SQLite in the run directory.
        tracking_uri: of MLflow.
        source: the run whose results are taken over.
        source_storage: where its study is.
        steps_anew: whether the candidates that get gradient steps are chosen anew, and not taken over.
        numbered: whether another name is found for the run directory where it holds something else.
    """

    settings: Settings
    teacher: Teacher
    data: Dataset
    run: RunDirectory
    reporter: Reporter
    library: Path | None = None
    storage: str | None = None
    tracking_uri: str | None = None
    source: RunDirectory | None = None
    source_storage: str | None = None
    steps_anew: bool = False
    numbered: bool = False


def ask(
    model: str | nn.Module | None,
    data: str | Path | None,
    *,
    budget: Budget | None,
    out: Path | None,
    quiet: bool,
    storage: str | None,
    source: Path | None = None,
    join: Path | None = None,
    options: Mapping[str, Any],
    **places: Any,
) -> Asked:
    """Open what a search needs.

    Args:
        model: name or object of the teacher; the embedded one, or the other run's, if None.
        data: likewise.
        budget: the budget; the other run's if None.
        out: run directory.
        quiet: no progress.
        storage: URL of the Optuna storage.
        source: another run, to take over from.
        join: another run, to take part in.
        options: the other fields of `Settings` that were given.
        places: other attributes of `Asked`.

    Raises:
        MixerzooError: for anything the user can mend, such as an argument that contradicts the other run's.
    """
    given = {name: value for name, value in options.items() if value is not None}
    other = join or source
    if other is None:
        if budget is None:
            raise MixerzooError("give one of budget_ms (--budget-ms 5) and budget (--budget 60%)")
        if "threads" in options:  # None for as many as there are
            given.setdefault("threads", default_threads())
        name = name_of(MODEL if model is None else model)
        settings = Settings(model=name, data=str(DATA if data is None else data), budget=budget, **given)
        path = out or default_out(name, budget)
    else:
        named = {"budget": budget, "model": None if model is None else name_of(model), "data": data}
        given |= {name: value for name, value in named.items() if value is not None}
        settings = _of_run(RunDirectory(other), given, own=FREE if join else OWN)
        named_other = other if other.name else other.resolve()
        path = join or out or Path(f"{named_other}-{settings.budget.label}")
    opened = open_data(settings.data)
    if isinstance(model, nn.Module):
        teacher = adopt_teacher(model)
    else:
        teacher = open_teacher(settings.model, settings.checkpoint)
    run = RunDirectory(path)
    if other is not None:
        _demand_same(RunDirectory(other), teacher, opened)
    if join is not None:  # it goes by these names in the other process
        there = settings_of(run)
        settings = replace(settings, data=there.data, checkpoint=there.checkpoint)
    asked = Asked(
        settings=settings,
        teacher=teacher,
        data=opened,
        run=run,
        reporter=Reporter(quiet=quiet),
        storage=_storage_of(run, storage),
        **places,
    )
    if source is None or join is not None:
        return asked
    return replace(
        asked,
        source=RunDirectory(source),
        source_storage=_storage_of(RunDirectory(source), storage, needed=False),
        steps_anew="distill_minutes" in given,
        numbered=out is None,
    )


def default_out(model: str, budget: Budget) -> Path:
    """Return the run directory of a search that was given none."""
    return Path("runs") / f"{model.replace('/', '-')}-{budget.label}"


def settings_of(run: RunDirectory) -> Settings:
    """Return the arguments of a search from its run directory.

    Raises:
        MixerzooError: if it has none.
    """
    if not run.begun:
        raise MixerzooError(
            f"'{run.path}' is not a run directory: it has no {RUN_FILE}; give what a search wrote"
        )
    record = run.record()
    try:
        float(record["teacher_ms"])
        free = {name: record[name] for name in FREE if record.get(name) is not None}
        if not isinstance(record["identity"]["space"], dict):
            raise TypeError("space")
        return Settings.from_identity(record["identity"], **free)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise MixerzooError(f"'{run.path / RUN_FILE}': not a search of mixerzoo ({error!r})") from None


def _of_run(run: RunDirectory, given: Mapping[str, Any], *, own: tuple[str, ...]) -> Settings:
    """Return a run's arguments with those of the given ones that may be others."""
    there = settings_of(run)
    changes: dict[str, Any] = {}
    for name, value in given.items():
        known = getattr(there, name)
        if name == "checkpoint":
            value = Path(value)
        elif isinstance(known, tuple):
            value = tuple(value)
        if name in own:
            changes[name] = value
        elif value != known and name not in ("data", "checkpoint"):  # their content is compared
            flag = f"--{name.replace('_', '-')}"
            if name == "budget":
                known, value = known.label, value.label
            raise MixerzooError(
                f"{flag} {_text(value)}: run '{run.path}' has {flag} {_text(known)}; leave it out, or search without "
                "that run"
            )
        elif name in ("data", "checkpoint"):
            changes[name] = str(value) if name == "data" else value
    if "seed" in changes:  # what was distilled and scored goes by the run's own
        seed = changes.pop("seed")
        changes["study_seed"] = None if seed == there.seed else seed
    return replace(there, **changes)


def _demand_same(run: RunDirectory, teacher: Teacher, data: Dataset) -> None:
    identity = run.record()["identity"]
    for flag, what, there, here in (
        ("--model", teacher.name, identity.get("teacher_fingerprint"), teacher.fingerprint[:16]),
        ("--data", data.name, identity.get("data_fingerprint"), data.fingerprint[:16]),
    ):
        if there != here:
            raise MixerzooError(
                f"{flag} {what}: not what run '{run.path}' was made with (fingerprint {there} there, {here} here); "
                "search without that run"
            )


def _storage_of(run: RunDirectory, given: str | None, *, needed: bool = True) -> str | None:
    """Return the storage that a run's study is in: the given one, or what `run.json` says of it."""
    kept: str | None = run.record().get("storage") if run.begun else None
    if kept is None:
        return given if needed else None
    if given is not None and (needed or without_password(given) == kept):
        return given
    if without_password(kept) == kept and ":***@" not in kept:
        return kept
    if needed:
        raise MixerzooError(f"run '{run.path}' keeps its study in '{kept}'; give --storage with the password")
    return None


def name_of(model: str | nn.Module) -> str:
    """Return what a teacher is called."""
    return model if isinstance(model, str) else type(model).__name__


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "all"
    return f"{value:g}" if isinstance(value, float) else str(value)
