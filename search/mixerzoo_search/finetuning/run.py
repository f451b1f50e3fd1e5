"""`mixerzoo finetune`: a student of a finished run, distilled as a whole; resumable, judged before and after."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mixerzoo import student_source
from mixerzoo.classes import fitting_labels
from mixerzoo.errors import MixerzooError
from mixerzoo.finetune import Recipe, Tuned, train
from mixerzoo.hosts import count_params, fingerprint
from mixerzoo.latency import Conditions, check_device, environment
from mixerzoo.locks import alone
from mixerzoo.progress import Reporter
from mixerzoo.student import Student
from mixerzoo.tracking import Tracker
from mixerzoo_search.context import Context
from mixerzoo_search.finetuning.curves import Curves
from mixerzoo_search.finetuning.folder import TuningFolder
from mixerzoo_search.finetuning.held_out import held_out
from mixerzoo_search.finetuning.images import PreparedImages
from mixerzoo_search.finetuning.settings import FinetuneSettings
from mixerzoo_search.improved import Improved, judged, model_card
from mixerzoo_search.opened_run import find_student, open_run


@dataclass(frozen=True, kw_only=True)
class Finetuned:
    """What a fine-tuning did: the folder of the student, and the content of its `result.json`."""

    path: Path
    result: dict[str, Any]


def places(path: Path, run: Path | None) -> tuple[Path, Path | None, Path]:
    """Return the run directory, the student in it or elsewhere (None: the run's best), and the default `--out`.

    Args:
        path: a run directory, or a student.
        run: the run of the student's teacher and data; for a student within a run directory it need not be given.

    Raises:
        MixerzooError: if it is neither, or in no run directory.
    """
    source = student_source.find_student(path)
    found = run or source.run
    if found is None:
        raise MixerzooError(
            f"student '{path}' is in no run directory; name the run of its teacher and data with --run"
        )
    if source.is_best and run is None:
        return found, None, found / "finetuned"
    name = source.path.stem if source.path.is_file() else source.path.resolve().name
    return found, source.path, source.path.parent / f"{name}-finetuned"


def finetune_run(
    path: Path,
    settings: FinetuneSettings,
    *,
    run: Path | None = None,
    out: Path | None = None,
    tracking_uri: str | None = None,
    model: nn.Module | None = None,
    reporter: Reporter | None = None,
    command: str = "",
) -> Finetuned:
    """Distil a student as a whole and write the better of both by validation loss. What was stopped goes on.

    Args:
        path: a run directory, or a student.
        settings: for how long, and how.
        run: the run of the student's teacher and data, for a student that is in no run directory.
        out: folder to write, `finetuned` in the run directory unless given.
        tracking_uri: MLflow store.
        model: the teacher, for runs that were given an object.
        reporter: shows progress.
        command: the command line, for the record.

    Raises:
        MixerzooError: for anything the user can mend; nothing is written then.
    """
    check_device(settings.device, settings.dtype or "float32")
    run_path, student_path, default = places(path, run)
    reporter = Reporter(quiet=True) if reporter is None else reporter
    opened = open_run(run_path, model, reporter)
    student = find_student(opened, student_path, way_out="give the folder of a student")
    context = opened.context
    folder = TuningFolder(
        out or default,
        settings.identity()
        | {
            "student": fingerprint(student.model)[:16],
            "teacher": context.teacher.fingerprint[:16],
            "data": context.data.fingerprint[:16],
        },
    )
    labels = _labels(context, settings)
    if folder.result() is None or folder.record():  # what was killed behind the result has its record still
        with alone(folder.path, "trains"), _tracking(context, tracking_uri) as tracker:
            _go_on(context, student, labels, settings, folder, tracker, command)
    found = folder.result()
    assert found is not None
    return Finetuned(path=folder.path, result=found)


@contextmanager
def _tracking(context: Context, tracking_uri: str | None) -> Iterator[Tracker]:
    tracker = Tracker(tracking_uri, f"mixerzoo {context.teacher.name}")
    try:
        yield tracker
    finally:
        tracker.close()


def _go_on(
    context: Context,
    student: Student,
    labels: torch.Tensor | None,
    settings: FinetuneSettings,
    folder: TuningFolder,
    tracker: Tracker,
    command: str,
) -> None:
    """Train, write the student, and end the run in MLflow: what of this is not done yet."""
    folder.note(command=command)
    curves = Curves(tracker, context, folder, student.plan)
    try:
        result = folder.result() or _tune(context, student, labels, settings, folder, curves)
    except BaseException as error:
        curves.end("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    curves.conclude(result, folder.path)
    folder.tidy()


def _labels(context: Context, settings: FinetuneSettings) -> torch.Tensor | None:
    """Return the labels of the images to train on, or None if they have no weight."""
    if not settings.labels:
        return None
    labels = fitting_labels(context.teacher, context.data, _indices(context, settings))
    if labels is None:
        raise MixerzooError(
            f"--labels {settings.labels:g}: data '{context.data.name}' has no labels that are classes of "
            f"teacher '{context.teacher.name}'; leave it out"
        )
    return labels


def _indices(context: Context, settings: FinetuneSettings) -> tuple[int, ...]:
    return context.data.splits.calibration[: settings.images]


def _tune(
    context: Context,
    student: Student,
    labels: torch.Tensor | None,
    settings: FinetuneSettings,
    folder: TuningFolder,
    curves: Curves,
) -> dict[str, Any]:
    """Train, and write the student and its result."""
    images = PreparedImages(context.data, _indices(context, settings), context.teacher.image)
    before = judged(context, student.model)
    tuned = _trained(context, student, images, labels, settings, folder, curves)
    after = judged(context, tuned.student)
    found = Improved(
        path=folder.path,
        plan=student.plan,
        better=after[0].loss < before[0].loss,
        validation=(before[0], after[0]),
        test=(before[1], after[1]),
    )
    result = _result(found, tuned, settings, len(images), count_params(tuned.student))
    card = model_card(
        context.teacher,
        found,
        title="fine-tuned",
        done=f"distilled as a whole on {len(images)} images in {tuned.steps} steps",
        in_vain="distillation as a whole",
    )
    kept = Student(plan=student.plan, model=tuned.student if found.better else student.model)
    folder.finish(context.teacher, kept, card, result)
    return result


def _trained(
    context: Context,
    student: Student,
    images: PreparedImages,
    labels: torch.Tensor | None,
    settings: FinetuneSettings,
    folder: TuningFolder,
    curves: Curves,
) -> Tuned:
    with context.reporter.phase("distillation as a whole, percent", 100) as report:
        tuned = train(
            context.teacher,
            student.model,
            images,
            _recipe(settings),
            evaluate=held_out(context, settings.device),
            labels=labels,
            checkpoint=folder.path,
            on_progress=lambda share: report(100 * share),
            on_row=curves.row,
        )
    if tuned.stopped is not None:
        context.reporter.note(f"ended early: {tuned.stopped}; a lower --lr than {settings.lr:g} may help")
    return tuned


def _recipe(settings: FinetuneSettings) -> Recipe:
    return Recipe(
        steps=settings.steps,
        seconds=None if settings.minutes is None else 60 * settings.minutes,
        lr=settings.lr,
        batch_size=settings.batch_size,
        label_weight=settings.labels,
        seed=settings.seed,
        device=settings.device,
        dtype=None if settings.dtype is None else getattr(torch, settings.dtype),
    )


def _result(
    found: Improved, tuned: Tuned, settings: FinetuneSettings, images: int, params: int
) -> dict[str, Any]:
    """Return the content of `result.json`."""
    computed = _recipe(settings).autocast or torch.float32
    conditions = Conditions(
        threads=torch.get_num_threads(),
        batch_size=settings.batch_size,
        device=settings.device,
        dtype=str(computed).removeprefix("torch."),
    )
    return {
        **found.figures(),
        "settings": asdict(settings),
        "plan": found.plan.to_json(),
        "params": params,
        "images": images,
        "steps": tuned.steps,
        "seconds": round(tuned.seconds, 3),
        "stopped": tuned.stopped,
        "ended": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "curve": tuned.curve,
        "environment": environment(conditions),
    }
