"""A finished run, opened again: its teacher and data, and the students that were made of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import nn

from mixerzoo.errors import MixerzooError
from mixerzoo.files import read_json
from mixerzoo.hosts import assemble
from mixerzoo.latency import Conditions, Stopwatch
from mixerzoo.opening import adopt_teacher, open_data, open_teacher
from mixerzoo.plan import Plan
from mixerzoo.progress import Reporter
from mixerzoo.student import PLAN_FILE, Student, load_student, make_replacement
from mixerzoo_search.context import Context
from mixerzoo_search.run_directory import RUN_FILE, RunDirectory
from mixerzoo_search.settings import Budget, Settings

# What a search, or a training of all attention at once, writes last.
SUMMARY_FILE, FAR_FILE = "summary.json", "far.json"


@dataclass(frozen=True, kw_only=True)
class OpenedRun:
    """A finished run.

    Attributes:
        context: its teacher, data and directory; nothing in it is timed.
        met: whether it has a best student.
    """

    context: Context
    met: bool


def open_run(path: Path, model: nn.Module | None, reporter: Reporter) -> OpenedRun:
    """Open the teacher and the data of a finished run, and check that they still are what they were.

    Args:
        path: the run directory of a search or of `distill --recipe far`.
        model: the teacher, for runs that were given an object.
        reporter: shows progress.

    Raises:
        MixerzooError: if it is no finished run, or its teacher or data are not what they were.
    """
    run = RunDirectory(path)
    if not (path / RUN_FILE).exists():
        raise MixerzooError(
            f"'{path}' is not a run directory: it has no {RUN_FILE}; give what a search wrote"
        )
    record = run.record()
    try:
        identity = record["identity"]
        far = identity.get("recipe") == "far"
        settings = _settings(identity, far=far)
        teacher_ms = math.nan if far else float(record["teacher_ms"])
        wanted, wanted_data = identity["teacher_fingerprint"], identity["data_fingerprint"]
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise MixerzooError(f"'{path / RUN_FILE}': not a run of mixerzoo ({error!r})") from None
    if not (path / (FAR_FILE if far else SUMMARY_FILE)).exists():
        what = "distillation" if far else "search"
        raise MixerzooError(f"run '{path}' is not finished: start the same {what} again, and it goes on")
    teacher = open_teacher(settings.model, settings.checkpoint) if model is None else adopt_teacher(model)
    data = open_data(settings.data)
    for what, there, here in (
        (f"teacher '{settings.model}'", wanted, teacher.fingerprint),
        (f"data '{settings.data}'", wanted_data, data.fingerprint),
    ):
        if there != here[:16]:
            raise MixerzooError(f"run '{path}': {what} is no longer what it was when the run was made")
    context = Context(
        settings=settings,
        teacher=teacher,
        data=data,
        run=run,
        reporter=reporter,
        stopwatch=Stopwatch(
            teacher, Conditions()
        ),  # what is made of a plan has its latency: nothing is timed
        teacher_ms=teacher_ms,
        budget_ms=settings.budget.in_ms(teacher_ms),
    )
    return OpenedRun(context=context, met=far or bool(read_json(path / SUMMARY_FILE).get("met")))


def _settings(identity: Mapping[str, Any], *, far: bool) -> Settings:
    """Return the arguments of a run; those of FAR's recipe have no budget, and fewer of the others."""
    names = {"model", "data", "checkpoint", "seed"} if far else {field.name for field in fields(Settings)}
    values = {name: identity[name] for name in names & set(identity)}
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    checkpoint = None if values["checkpoint"] is None else Path(values["checkpoint"])
    budget = Budget(share=1.0) if far else Budget.parse(values["budget"])
    return Settings(**values | {"budget": budget, "checkpoint": checkpoint})


def find_student(opened: OpenedRun, source: Path | None, *, way_out: str) -> Student:
    """Return a student of the run's teacher; its replacements are its own.

    Args:
        opened: the run.
        source: a plan, whose weights come from the run's library, or the folder (or file) of a student; its best
            if None.
        way_out: what to do where it has no best student.

    Raises:
        MixerzooError: if there is none, it is of another teacher, or it keeps every site.
    """
    context = opened.context
    teacher, path = context.teacher, context.run.path
    if source is None:
        if not opened.met or not (path / "best" / PLAN_FILE).exists():
            raise MixerzooError(f"run '{path}' has no best student: no plan met its budget; {way_out}")
        source = path / "best"
    made = source.is_dir() or source.suffix == ".safetensors"
    student = load_student(source, model=assemble(teacher.model, {})) if made else _stitched(context, source)
    plan = student.plan
    if [site for site, _ in plan.choices] != [site.name for site in teacher.sites]:
        raise MixerzooError(f"'{source}': its sites are not those of the run's teacher '{teacher.name}'")
    if not plan.replaced():
        raise MixerzooError(f"'{source}' keeps every site: it is the teacher itself, as good as it can be")
    return Student(plan=plan, model=student.model.requires_grad_(False))


def _stitched(context: Context, file: Path) -> Student:
    """Return a plan's student with the weights of the run's library."""
    content = read_json(file)
    teacher, library = context.teacher, context.library
    choices = content.get("plan", content) if isinstance(content, dict) else None
    if not isinstance(choices, dict):
        raise MixerzooError(
            f"'{file}': not a plan; give an object of site and candidate, such as a plan.json"
        )
    plan = Plan.of(dict(Plan.from_json(choices).choices), teacher.sites)
    modules = {}
    for site, candidate in plan.choices:
        if candidate.is_keep:
            continue
        entry = library.best(site, candidate)
        if entry is None:
            raise MixerzooError(
                f"'{file}': {candidate} at {site} is not in the library of run '{context.run.path}'; "
                "give a plan of that run, or the folder of a student"
            )
        modules[site] = make_replacement(candidate, teacher.site(site), library.state(entry))
    return Student(plan=plan, model=assemble(teacher.model, modules))
