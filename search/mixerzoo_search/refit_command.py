"""`mixerzoo refit`: a student of a finished run, refitted and distilled, judged before and after, written whole."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mixerzoo.data import image_batches
from mixerzoo.errors import MixerzooError
from mixerzoo.files import read_json, write_json, write_text
from mixerzoo.finetune import finetune
from mixerzoo.hosts import Teacher, assemble, count_params
from mixerzoo.latency import Conditions, Stopwatch
from mixerzoo.opening import adopt_teacher, open_data, open_teacher
from mixerzoo.plan import Plan
from mixerzoo.progress import Reporter
from mixerzoo.refit import refit_student
from mixerzoo.score import Evaluation, Judge
from mixerzoo.student import PLAN_FILE, Student, load_student, make_replacement, save_student
from mixerzoo.tracking import Tracker, is_there
from mixerzoo_search.context import Context
from mixerzoo_search.finish import REFIT_TOKENS
from mixerzoo_search.journal import RUN_ID
from mixerzoo_search.run_directory import RUN_FILE, RunDirectory
from mixerzoo_search.settings import Budget, Settings

RESULT_FILE = "result.json"
LEAST_IMAGES = 20  # as for a search
SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Refitted:
    """What a refit did.

    Attributes:
        path: folder of the student, for `mixerzoo.load`.
        plan: its plan.
        better: whether the refitted student was kept; else the one that was given.
        validation: figures before and after, on the images that this was chosen on.
        test: likewise, on images that nothing was chosen on.
        images: calibration images that it was refitted on.
        minutes: of distillation as a whole after it.
        seconds: wall time of both.
    """

    path: Path
    plan: Plan
    better: bool
    validation: tuple[Evaluation, Evaluation]
    test: tuple[Evaluation, Evaluation]
    images: int
    minutes: float
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return the content of `result.json`; figures that are not finite become null."""
        figures = {
            part: {"before": _finite(before), "after": _finite(after)}
            for part, (before, after) in (("validation", self.validation), ("test", self.test))
        }
        return {
            "schema": SCHEMA,
            "kept": "after" if self.better else "before",
            "minutes": self.minutes,
            "images": self.images,
            "seconds": round(self.seconds, 3),
            **figures,
        }


def refit_run(
    path: Path,
    *,
    plan: Path | None = None,
    minutes: float = 0.0,
    images: int | None = None,
    out: Path | None = None,
    tracking_uri: str | None = None,
    model: nn.Module | None = None,
    reporter: Reporter | None = None,
) -> Refitted:
    """Refit the best student of a finished run, or another one of its teacher; keep the better by validation loss.

    Args:
        path: the run directory.
        plan: a plan, whose weights come from the run's library, or the folder of a student.
        minutes: wall time for gradient steps after the closed form, on all weights of the student together.
        images: calibration images; as many of the run's as a readout needs unless given.
        out: folder to write, `refit` in the run directory unless given; an earlier refit there is replaced.
        tracking_uri: MLflow store that the run was logged to.
        model: the teacher, for runs that were given an object.
        reporter: shows progress.

    Raises:
        MixerzooError: for anything the user can mend; nothing is written then.
    """
    folder = path / "refit" if out is None else out
    if not 0 <= minutes < math.inf:
        raise MixerzooError(f"--minutes {minutes:g}: give at least 0")
    if images is not None and images < LEAST_IMAGES:
        raise MixerzooError(f"--images {images}: give at least {LEAST_IMAGES}")
    _check_out(folder)
    reporter = Reporter(quiet=True) if reporter is None else reporter
    context, summary = _open_run(path, model, reporter)
    student = _student(context, summary, plan)
    tracker = _tracker(context, tracking_uri)
    try:
        student, found = _refit(context, student, folder, minutes=minutes, images=images)
        _write(folder, context.teacher, student, found)
        if tracker is not None:
            _log(tracker, context, student, found)
    finally:
        if tracker is not None:
            tracker.close()
    return found


def closing_lines(found: Refitted) -> list[str]:
    """Return what the command line prints: the figures on test images before and after, and where the student is."""
    rows = zip(("before", "after"), found.test, found.validation, strict=True)
    lines = [f"{'test images':<12}{'loss':>10}{'agreement':>12}{'accuracy':>11}{'validation loss':>18}"]
    for name, test, validation in rows:
        accuracy = "" if test.accuracy is None else f"{test.accuracy:.2%}"
        lines.append(
            f"{name:<12}{test.loss:>10.4g}{test.agreement:>12.2%}{accuracy:>11}{validation.loss:>18.4g}"
        )
    if not found.better:
        lines.append("no lower loss on validation images: the student was kept as it was")
    return [*lines, "", f"student     {found.path}   (mixerzoo.load)"]


def _finite(judged: Evaluation) -> dict[str, float | None]:
    return {
        name: value if value is not None and math.isfinite(value) else None
        for name, value in asdict(judged).items()
    }


def _open_run(path: Path, model: nn.Module | None, reporter: Reporter) -> tuple[Context, dict[str, Any]]:
    """Open the teacher and the data of a finished run, and check that they still are what they were."""
    run = RunDirectory(path)
    if not (path / RUN_FILE).exists():
        raise MixerzooError(
            f"'{path}' is not a run directory: it has no {RUN_FILE}; give what a search wrote"
        )
    record = run.record()
    try:
        identity = record["identity"]
        known = {field.name for field in fields(Settings)} & set(identity)
        values = {name: identity[name] for name in known}
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        checkpoint = None if values["checkpoint"] is None else Path(values["checkpoint"])
        settings = Settings(**values | {"budget": Budget.parse(values["budget"]), "checkpoint": checkpoint})
        teacher_ms, wanted = float(record["teacher_ms"]), identity["teacher_fingerprint"]
        wanted_data = identity["data_fingerprint"]
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise MixerzooError(f"'{path / RUN_FILE}': not a run of mixerzoo ({error!r})") from None
    if not (path / "summary.json").exists():
        raise MixerzooError(f"run '{path}' is not finished: start the same search again, and it goes on")
    teacher = open_teacher(settings.model, checkpoint) if model is None else adopt_teacher(model)
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
        stopwatch=Stopwatch(teacher, Conditions()),  # a refit changes no latency: nothing is timed
        teacher_ms=teacher_ms,
        budget_ms=settings.budget.in_ms(teacher_ms),
    )
    return context, read_json(path / "summary.json")


def _student(context: Context, summary: Mapping[str, Any], source: Path | None) -> Student:
    """Return the student to refit; its replacements are its own."""
    teacher, path = context.teacher, context.run.path
    if source is None:
        if not summary.get("met") or not (path / "best" / PLAN_FILE).exists():
            raise MixerzooError(
                f"run '{path}' has no best student: no plan met its budget; give one with --plan"
            )
        source = path / "best"
    folder = source.is_dir()
    student = (
        load_student(source, model=assemble(teacher.model, {})) if folder else _stitched(context, source)
    )
    plan = student.plan
    if [site for site, _ in plan.choices] != [site.name for site in teacher.sites]:
        raise MixerzooError(f"'{source}': its sites are not those of the run's teacher '{teacher.name}'")
    if not plan.replaced():
        raise MixerzooError(f"'{source}' keeps every site: there is nothing to refit")
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


def _refit(
    context: Context, student: Student, folder: Path, *, minutes: float, images: int | None
) -> tuple[Student, Refitted]:
    """Refit and distil the student; return it, or what it was where its validation loss does not fall."""
    teacher, data = context.teacher, context.data
    enough = -(-REFIT_TOKENS // max(site.tokens for site in teacher.sites))
    chosen = data.splits.calibration[: images or min(enough, context.settings.images)]
    mixers = {site: choice.mixer for site, choice in student.plan.choices if not choice.is_keep}
    before = _judged(context, student.model)
    state = {name: tensor.clone() for name, tensor in student.model.state_dict().items()}
    began = time.perf_counter()
    batches = list(image_batches(data, chosen, teacher.image))
    with context.reporter.phase("sequential refit", len(teacher.sites)) as report:
        refit_student(teacher, student.model, mixers, batches, on_site=report)
    seconds = time.perf_counter() - began
    after = _judged(context, student.model)
    if not after[0].loss < before[0].loss:  # nor where it is NaN
        student.model.load_state_dict(state)
    if minutes:
        student, taken = _distilled(context, student, batches, minutes)
        seconds += taken
        after = _judged(context, student.model)
    return student, Refitted(
        path=folder,
        plan=student.plan,
        better=after[0].loss < before[0].loss,
        validation=(before[0], after[0]),
        test=(before[1], after[1]),
        images=len(chosen),
        minutes=minutes,
        seconds=seconds,
    )


def _distilled(
    context: Context, student: Student, batches: Sequence[torch.Tensor], minutes: float
) -> tuple[Student, float]:
    """Distil a student as a whole; return the best by validation loss, itself included, and the seconds taken."""
    began = time.perf_counter()
    with context.reporter.phase("distillation as a whole", 1) as report:
        model, _ = finetune(
            context.teacher,
            student.model,
            batches,
            seconds=60 * minutes,
            evaluate=lambda model: context.judge.evaluate(model).loss,
            seed=context.settings.seed,
            on_progress=report,
        )
    return Student(plan=student.plan, model=model), time.perf_counter() - began


def _judged(context: Context, student: nn.Module) -> tuple[Evaluation, Evaluation]:
    """Return the figures on validation and on test images."""
    judges: tuple[Judge, Judge] = (context.judge, context.test_judge)
    return judges[0].evaluate(student), judges[1].evaluate(student)


def _check_out(folder: Path) -> None:
    """Refuse a folder that is anything but an earlier refit."""
    if not os.path.lexists(folder):
        return
    try:
        earlier = "kept" in read_json(folder / RESULT_FILE)
    except (MixerzooError, TypeError):
        earlier = False
    if not earlier:
        raise MixerzooError(f"'{folder}' exists and holds no refit; remove it, or give another --out")


def _write(folder: Path, teacher: Teacher, student: Student, found: Refitted) -> None:
    """Write the student's folder beside its place, then rename it: it is there whole, or not at all."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    old = temporary.with_suffix(".old")
    try:
        save_student(temporary, student, teacher)
        write_text(temporary / "README.md", _card(teacher, found))
        write_json(temporary / RESULT_FILE, found.to_json())
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
    except OSError as error:
        raise MixerzooError(f"'{folder}' cannot be written ({error.strerror}); give another --out") from None
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)


def _card(teacher: Teacher, found: Refitted) -> str:
    """Return the README.md of the folder."""
    before, after = found.test
    now = after if found.better else before
    figures = [("loss against the teacher", f"{before.loss:.4g}", f"{now.loss:.4g}")]
    figures += [("agreement with the teacher", f"{before.agreement:.2%}", f"{now.agreement:.2%}")]
    if before.accuracy is not None and now.accuracy is not None:
        figures.append(("accuracy", f"{before.accuracy:.2%}", f"{now.accuracy:.2%}"))
    done = (
        f"refitted in sequence on {found.images} images"
        + (f" and distilled as a whole for {found.minutes:g} min" if found.minutes else "")
        if found.better
        else "as it was: a sequential refit did not lower its validation loss"
    )
    return "\n".join(
        [
            f"# {teacher.name}, refitted",
            "",
            f"A student of `{teacher.name}` made by mixerzoo, {done}.",
            "",
            "| | before | this student |",
            "|---|---|---|",
            *(f"| {name} | {old} | {new} |" for name, old, new in figures),
            "",
            "On images that nothing was chosen or trained on. Latency is that of the plan, as before.",
            "",
            "```python",
            "import mixerzoo",
            "",
            f"student = mixerzoo.load({json.dumps(found.path.name)})  # this folder; images (B, C, H, W)",
            "```",
            "",
            "| site | candidate |",
            "|---|---|",
            *(f"| `{site}` | `{candidate}` |" for site, candidate in found.plan.to_json().items()),
            "",
        ]
    )


def _tracker(context: Context, tracking_uri: str | None) -> Tracker | None:
    """Return the MLflow store that has the run; none is made for a refit alone."""
    if context.run.record().get(RUN_ID) is None or not is_there(tracking_uri):
        return None
    return Tracker(tracking_uri, f"mixerzoo {context.teacher.name}")


def _log(tracker: Tracker, context: Context, student: Student, found: Refitted) -> None:
    """Log what was kept as a child of the run's, if this store has the run."""
    parent = context.run.record()[RUN_ID]
    if not tracker.children(parent):
        return
    short = found.plan.short_name(context.teacher.sites, context.letters)
    kept = found.validation[int(found.better)]
    tracker.log_child(
        parent,
        f"{short} {found.plan.key[:6]} refitted",  # a search calls its own `refit`
        plan=found.plan,
        short_name=short,
        metrics={**asdict(kept), "params": float(count_params(student.model))},
        tags={"mixerzoo.source": "refitted", "mixerzoo.minutes": f"{found.minutes:g}"},
    )
