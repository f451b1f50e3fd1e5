"""`mixerzoo distill --recipe far`: all attention replaced at once and trained as a whole (FAR, arXiv 2505.21535).

Stage 1 trains the replaced mixers, each fed by the student itself, on the task loss plus, for every site, 1 - the
mean cosine along the tokens between the student's and the teacher's head outputs. Stage 2 trains all parameters on
the task loss alone. docs/far.md says what differs from the paper.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mixerzoo.checkpoint import remove_checkpoint, restore_moments
from mixerzoo.classes import fitting_labels
from mixerzoo.data import Dataset, image_batches
from mixerzoo.denormals import tiny_as_zero
from mixerzoo.files import write_bytes, write_json, write_text
from mixerzoo.hosts import Teacher, count_params
from mixerzoo.latency import Conditions, environment
from mixerzoo.locks import alone
from mixerzoo.plan import Plan
from mixerzoo.progress import Reporter
from mixerzoo.registry import get_registry
from mixerzoo.score import Evaluation, judge
from mixerzoo.spec import Site
from mixerzoo.student import Student, save_student
from mixerzoo.tracking import Tracker
from mixerzoo_search.far.images import TrainingImages
from mixerzoo_search.far.report import far_picture, model_card
from mixerzoo_search.far.settings import FarSettings
from mixerzoo_search.far.student import attention_sites, compared, start_student
from mixerzoo_search.far.token_correlation import Measured, average, measure
from mixerzoo_search.far.training import (
    STAGES,
    Pace,
    Standing,
    Trainer,
    even,
    load_standing,
    save_standing,
)
from mixerzoo_search.image_parts import FINAL_IMAGES, TEST_IMAGES
from mixerzoo_search.journal import RUN_ID
from mixerzoo_search.run_directory import RunDirectory

SCHEMA = 1
RESULT, PICTURE = "far.json", "far.png"
VIEW_IMAGES = 256  # that mean attention is taken on, for mixers that inherit it


def run_far(
    settings: FarSettings,
    teacher: Teacher,
    data: Dataset,
    run: RunDirectory,
    *,
    reporter: Reporter,
    tracking_uri: str | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Train, measure and write; returns the content of `far.json`. A run that was stopped goes on.

    Raises:
        MixerzooError: for anything the user can mend; nothing is written then, unless a loss is not finite.
    """
    sites = attention_sites(teacher, settings.mixer)
    identity = {
        "recipe": "far",
        **settings.to_json(),
        "teacher_fingerprint": teacher.fingerprint[:16],
        "data_fingerprint": data.fingerprint[:16],
        "plugins": get_registry().versions(),
    }
    result: dict[str, Any]
    if run.check(identity) and run.record().get("phase") == "finished":
        result = run.load("far")
        return result
    tracker = Tracker(tracking_uri, f"mixerzoo {teacher.name}")
    with closing(tracker), alone(run.path, "trains"):
        if not run.check(identity):
            conditions = Conditions(threads=torch.get_num_threads(), batch_size=settings.batch_size)
            run.start(
                identity,
                environment=environment(conditions),
                classes=list(data.classes),
                skipped_images=list(data.skipped),
                command=command,
            )
        parent = _parent(tracker, run, settings, teacher)
        try:
            with tiny_as_zero():
                far = _Far(settings, teacher, data, run.path, sites, reporter)
                result = run.load("far") or far.run(run.record()["environment"])
        except BaseException as error:
            tracker.finish(parent, "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
            raise
        remove_checkpoint(run.path)
        _log(tracker, parent, run.path, result)
        run.note(phase="finished")
    return result


class _Far:
    """One run: what it is made of, and its phases."""

    def __init__(
        self,
        settings: FarSettings,
        teacher: Teacher,
        data: Dataset,
        path: Path,
        sites: Sequence[Site],
        reporter: Reporter,
    ) -> None:
        self.settings, self.teacher, self.data, self.path = settings, teacher, data, path
        self.sites, self.reporter = sites, reporter
        splits = data.splits
        self.train = splits.calibration[: settings.images]
        self.validation = splits.validation[:FINAL_IMAGES]
        self.test = splits.test[:TEST_IMAGES]

    def run(self, environment: Mapping[str, Any]) -> dict[str, Any]:
        """Train and write."""
        settings, teacher = self.settings, self.teacher
        spec = get_registry().mixers.get(settings.mixer.mixer)
        few = self.train[:VIEW_IMAGES]
        with self.reporter.phase("the student as inherited", 1):
            batches = image_batches(self.data, few, teacher.image)
            student = start_student(
                teacher, settings.mixer, self.sites, batches, len(few), seed=settings.seed
            )
        labels = fitting_labels(teacher, self.data, self.train)
        trainer = Trainer(
            teacher,
            student,
            compared(teacher, student, self.sites, spec),
            TrainingImages(
                self.data,
                self.train,
                teacher.image,
                labels,
                classes=int(getattr(teacher.model, "num_classes", 0)),
                augment=settings.augment,
            ),
            batch_size=even(settings.batch_size, len(self.train)),
            lr=settings.lr,
            seed=settings.seed,
        )
        standing = self._train(trainer)
        last = self._measured(student)
        plan = Plan.of({site.name: settings.mixer for site in self.sites}, teacher.sites)
        result = {
            "schema": SCHEMA,
            "recipe": "far",
            "settings": settings.to_json(),
            "teacher": {"name": teacher.name, "params": teacher.params, "accuracy": last.teacher.accuracy},
            "student": {"plan": plan.to_json(), "params": count_params(student)},
            "task_loss": self._task(labels is not None),
            "compared": trainer.kept.what,
            "images": {"train": len(self.train), "validation": len(self.validation), "test": len(self.test)},
            "measured": standing.measured | {"stage 2": figures(last)},
            "curve": standing.curve,
            "environment": dict(environment),
        }
        student.requires_grad_(False)
        save_student(self.path / "best", Student(plan=plan, model=student), teacher)
        write_text(self.path / "best" / "README.md", model_card(result, self.data.name))
        write_bytes(self.path / PICTURE, far_picture(result, last.sites))
        write_json(self.path / RESULT, result)
        return result

    def _train(self, trainer: Trainer) -> Standing:
        """Go through what is left of both stages; the checkpoint is written after every epoch."""
        student, settings = trainer.student, self.settings
        stored = load_standing(self.path, student)
        standing, moments = (Standing(), {}) if stored is None else stored
        student.eval()
        if not standing.measured:
            standing.measured["start"] = figures(self._measured(student))
        for stage in STAGES:
            if standing.stage != stage:
                continue
            optimizer = trainer.optimizer(stage)
            restore_moments(student, optimizer, moments)
            pace = Pace.of(stage, epochs=settings.epochs, minutes=settings.minutes)
            with self.reporter.phase(f"stage {stage} of {len(STAGES)}, percent", 100) as report:
                while pace.share(standing.epoch, standing.seconds) < 1:
                    row = trainer.epoch(standing, optimizer, pace, lambda share: report(100 * min(share, 1)))
                    row["validation"] = self._validated(student).to_json()
                    standing.curve.append(row)
                    save_standing(self.path, standing, student, optimizer)
            if stage < STAGES[-1]:
                standing.measured[f"stage {stage}"] = figures(self._measured(student))
            standing.stage, standing.epoch, standing.seconds, moments = stage + 1, 0, 0.0, {}
            save_standing(self.path, standing, student, None)
        return standing

    def _measured(self, student: nn.Module) -> Measured:
        """Compare the student with the teacher on the test images."""
        batches = image_batches(self.data, self.test, self.teacher.image)
        labels = fitting_labels(self.teacher, self.data, self.test)
        return measure(self.teacher, student, self.sites, batches, labels)

    @torch.inference_mode()
    def _validated(self, student: nn.Module) -> Evaluation:
        """Judge the student on validation images."""
        batches, target, labels = self._validation
        output = torch.cat([student(batch) for batch in batches])
        return judge(output, target, labels, classifier=self.teacher.classifier)

    @cached_property
    def _validation(self) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor | None]:
        """Validation images in batches, the teacher's outputs, and labels."""
        batches = list(image_batches(self.data, self.validation, self.teacher.image))
        target = torch.cat([self.teacher.model(batch) for batch in batches])
        return batches, target, fitting_labels(self.teacher, self.data, self.validation)

    def _task(self, labelled: bool) -> str:
        if labelled:
            return "cross-entropy on labels"
        return (
            "KL to the teacher's logits, for want of labels"
            if self.teacher.classifier
            else "1 - cosine to the teacher's embedding"
        )


def figures(measured: Measured) -> dict[str, Any]:
    """Return a student's figures as JSON-ready data; what is not finite becomes null."""
    mean = {name: site.mean for name, site in measured.sites.items()}
    per_image = {name: site.per_image for name, site in measured.sites.items()}
    return {
        **measured.student.to_json(),
        **_finite({"token_correlation": average(mean), "token_correlation_per_image": average(per_image)}),
        "sites": {
            name: _finite({"token_correlation": mean[name], "token_correlation_per_image": per_image[name]})
            for name in mean
        },
    }


def _finite(values: Mapping[str, float | None]) -> dict[str, float | None]:
    return {
        name: value if value is not None and math.isfinite(value) else None for name, value in values.items()
    }


def _parent(tracker: Tracker, run: RunDirectory, settings: FarSettings, teacher: Teacher) -> str:
    """Return the run in MLflow, the one of an earlier start if this store has it."""
    known: str | None = run.record().get(RUN_ID)
    if known is None or not tracker.resume_parent(known):
        known = tracker.start_parent(
            run.path.name,
            params={"recipe": "far", **settings.to_json(), "teacher": teacher.name},
            tags={"mixerzoo.run": str(run.path.resolve())},
        )
        run.note(**{RUN_ID: known})
    return known


def _log(tracker: Tracker, parent: str, path: Path, result: Mapping[str, Any]) -> None:
    """Log the last figures and the artifacts, and end the run."""
    metrics: dict[str, float | None] = {"teacher_accuracy": result["teacher"]["accuracy"]}
    for step, row in result["measured"].items():
        prefix = "" if step == "stage 2" else f"{step.replace(' ', '_')}."
        names = ("accuracy", "agreement", "loss", "token_correlation", "token_correlation_per_image")
        metrics |= {f"{prefix}{name}": row[name] for name in names}
    metrics["params"] = float(result["student"]["params"])
    tracker.log_artifacts(
        parent, [path / RESULT, path / PICTURE, path / "best" / "plan.json", path / "run.json"]
    )
    tracker.finish(parent, "FINISHED", metrics)
