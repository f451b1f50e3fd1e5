"""`mixerzoo refit`: a student of a finished run, refitted and distilled, judged before and after, written whole."""

from __future__ import annotations

import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from mixerzoo.data import image_batches
from mixerzoo.errors import MixerzooError
from mixerzoo.files import replace_folder
from mixerzoo.finetune import finetune
from mixerzoo.hosts import count_params
from mixerzoo.progress import Reporter
from mixerzoo.refit import Stitched, refit_students
from mixerzoo.student import Student
from mixerzoo.tracking import Tracker, is_there
from mixerzoo_search import improved
from mixerzoo_search.context import Context
from mixerzoo_search.finetuning.images import PreparedImages
from mixerzoo_search.improved import (
    Improved,
    fill_folder,
    has_result,
    judged,
    model_card,
)
from mixerzoo_search.journal import RUN_ID
from mixerzoo_search.opened_run import find_student, open_run

LEAST_IMAGES = 20  # as for a search


@dataclass(frozen=True, kw_only=True)
class Refitted(Improved):
    """What a refit did.

    Attributes:
        images: calibration images that it was refitted on.
        minutes: of distillation as a whole after it.
        seconds: wall time of both.
    """

    images: int
    minutes: float
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return the content of `result.json`; figures that are not finite become null."""
        about = {"minutes": self.minutes, "images": self.images, "seconds": round(self.seconds, 3)}
        return self.figures() | about


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
        images: calibration images; as many as a search takes unless given.
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
    opened = open_run(path, model, reporter)
    context, student = opened.context, find_student(opened, plan, way_out="give one with --plan")
    tracker = _tracker(context, tracking_uri)
    try:
        student, found = _refit(context, student, folder, minutes=minutes, images=images)
        _write(context, student, found)
        if tracker is not None:
            _log(tracker, context, student, found)
    finally:
        if tracker is not None:
            tracker.close()
    return found


def closing_lines(found: Refitted) -> list[str]:
    """Return what the command line prints."""
    return improved.closing_lines(found.figures(), found.path)


def _refit(
    context: Context, student: Student, folder: Path, *, minutes: float, images: int | None
) -> tuple[Student, Refitted]:
    """Refit and distil the student; return it, or what it was where its validation loss does not fall."""
    teacher, data = context.teacher, context.data
    chosen = context.refit_images if images is None else data.splits.calibration[:images]
    mixers = {site: choice.mixer for site, choice in student.plan.choices if not choice.is_keep}
    before = judged(context, student.model)
    state = {name: tensor.clone() for name, tensor in student.model.state_dict().items()}
    began = time.perf_counter()
    batches = image_batches(data, chosen, teacher.image)
    with context.reporter.phase("sequential refit", len(teacher.sites)) as report:
        stitched = Stitched(student=student.model, mixers=mixers)
        refit_students(teacher, [stitched], batches, on_site=report)
    seconds = time.perf_counter() - began
    after = best = judged(context, student.model)
    if not after[0].loss < before[0].loss:  # nor where it is NaN
        student.model.load_state_dict(state)
        best = before
    if minutes:
        distilled, taken = _distilled(context, student, minutes)
        seconds += taken
        found = judged(context, distilled.model)
        if found[0].loss < best[0].loss:  # its best state was chosen on other images
            student, after = distilled, found
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


def _distilled(context: Context, student: Student, minutes: float) -> tuple[Student, float]:
    """Distil a student as a whole; return its best state on the final images, itself included, and the seconds."""
    began = time.perf_counter()
    with context.reporter.phase("distillation as a whole", 1) as report:
        model, _ = finetune(
            context.teacher,
            student.model,
            # All that there are to distil on: here no student is compared on those of the study.
            PreparedImages(context.data, context.data.splits.calibration, context.teacher.image),
            seconds=60 * minutes,
            evaluate=lambda model: context.final_judge.evaluate(model).loss,
            seed=context.settings.seed,
            on_progress=report,
        )
    return Student(plan=student.plan, model=model), time.perf_counter() - began


def _check_out(folder: Path) -> None:
    """Refuse a folder that is anything but an earlier refit."""
    # What `finetune` writes has a result too, with a curve in it.
    if os.path.lexists(folder) and (not has_result(folder, "kept") or has_result(folder, "curve")):
        raise MixerzooError(f"'{folder}' exists and holds no refit; remove it, or give another --out")


def _write(context: Context, student: Student, found: Refitted) -> None:
    """Write the student's folder."""
    teacher = context.teacher
    steps = f" and distilled as a whole for {found.minutes:g} min" if found.minutes else ""
    card = model_card(
        teacher,
        found,
        title="refitted",
        done=f"refitted in sequence on {found.images} images{steps}",
        in_vain="a sequential refit",
    )
    replace_folder(found.path, lambda folder: fill_folder(folder, teacher, student, card, found.to_json()))


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
