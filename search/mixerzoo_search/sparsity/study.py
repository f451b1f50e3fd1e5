"""`mixerzoo study sparsity`: whether sparser layers are easier to replace.

Groups of consecutive attention layers are replaced, one group at a time, under the same training budget; what is
lost on test images is related to how sparse the group's attention is (From Sparsity to Simplicity,
arXiv 2605.18865).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from mixerzoo.capture import Capture, capture
from mixerzoo.classes import fitting_labels
from mixerzoo.data import Dataset, image_batches
from mixerzoo.errors import MixerzooError
from mixerzoo.hosts import Teacher
from mixerzoo.latency import Conditions, environment
from mixerzoo.plan import Candidate
from mixerzoo.progress import Report, Reporter
from mixerzoo.registry import get_registry
from mixerzoo.score import Evaluation, Judge, judge, output_loss
from mixerzoo.spec import Site
from mixerzoo.statistics import ATTENTION_STATISTICS
from mixerzoo_search.run_directory import RunDirectory
from mixerzoo_search.sparsity.group_student import BATCH, LR, GroupStudents
from mixerzoo_search.sparsity.relation import MAIN, closest, relate, verdict
from mixerzoo_search.sparsity.settings import StudySettings, choose, label_of, windows

SCHEMA = 1
TEST_IMAGES = 500  # their activations are kept
ENVIRONMENT = ("device_name", "threads", "python", "system", "versions")


def run_study(
    settings: StudySettings,
    teacher: Teacher,
    data: Dataset,
    path: Path,
    *,
    reporter: Reporter,
    command: str = "",
) -> dict[str, Any]:
    """Replace group after group, write `sparsity.json` and `sparsity.png` into the folder `path`, return the former.

    Every finished group is on disk: the same call goes on where a killed one stopped.

    Raises:
        MixerzooError: for anything the user can mend; nothing is written then.
    """
    layers = [site for site in teacher.sites if site.kind == "attention"]
    size = settings.size(len(layers))
    groups = windows(layers, size, settings.stride)
    candidates = [choose(name, settings.width, layers) for name in settings.mixers]
    identity = settings.identity() | {
        "study": "sparsity",
        "group_size": size,
        "candidates": [str(candidate) for candidate in candidates],
        "teacher_fingerprint": teacher.fingerprint[:16],
        "data_fingerprint": data.fingerprint[:16],
        "plugins": get_registry().versions(),
    }
    run = RunDirectory(path)
    if not run.check(identity):
        run.start(identity, environment=_environment(), skipped_images=list(data.skipped), command=command)
    bench = _Bench(settings, replace(teacher, sites=tuple(layers)), data, run, reporter)
    if not all(bench.is_done(candidate, group) for candidate in candidates for group in groups):
        bench.prepare()
    records: dict[str, list[dict[str, Any]]] = {}
    for candidate in candidates:
        with reporter.phase(f"groups of {candidate}", len(groups) * max(settings.steps, 1)) as report:
            records[str(candidate)] = [
                bench.record(candidate, group, _Part(report, number, settings.steps))
                for number, group in enumerate(groups)
            ]
    statistics = [bench.statistics[site.name] for site in layers]
    content = {
        "schema": SCHEMA,
        "teacher": bench.teacher_record() | {"layers": [site.name for site in layers]},
        "settings": {
            "mixers": list(settings.mixers),
            "group_size": size,
            "stride": settings.stride,
            "steps": settings.steps,
            "batch": BATCH,
            "lr": LR,
            "images": len(bench.indices),
            "test_images": len(bench.test),
            "seed": settings.seed,
            "data": settings.data,
        },
        "main": MAIN,
        "statistics": {site.name: _finite(bench.statistics[site.name]) for site in layers},
        "mixers": {candidate: _conclusion(rows, statistics, layers) for candidate, rows in records.items()},
        "environment": run.record()["environment"],
        "command": command,
    }
    _write(run, content)
    return content


class _Part:
    """Turns the steps of one group into the progress of all."""

    def __init__(self, report: Report, number: int, steps: int) -> None:
        self.report, self.before = report, number * max(steps, 1)

    def __call__(self, done: int) -> None:
        self.report(self.before + done)


class _Bench:
    """Replaces groups and measures what is lost; opens images and teacher only if there is something left to do."""

    def __init__(
        self, settings: StudySettings, teacher: Teacher, data: Dataset, run: RunDirectory, reporter: Reporter
    ) -> None:
        self.settings, self.teacher, self.data = settings, teacher, data
        self.run, self.reporter = run, reporter
        self.indices = data.splits.calibration[: settings.images]
        self.test = data.splits.test[:TEST_IMAGES]

    def prepare(self) -> None:
        """Run the teacher over all images, before anything else shows its progress."""
        _ = self.captured, self.judge

    def is_done(self, candidate: Candidate, group: Sequence[Site]) -> bool:
        """Whether a group was finished before."""
        return self.run.load(self._name(candidate, group)) is not None

    def record(self, candidate: Candidate, group: Sequence[Site], on_step: _Part) -> dict[str, Any]:
        """Return what became of one group, from disk if it was finished before."""
        name = self._name(candidate, group)
        stored: dict[str, Any] | None = self.run.load(name)
        if stored is None:
            label = label_of(group, self.teacher.sites)
            stored = {"layers": label, "sites": [site.name for site in group]}
            stored |= self._measured(candidate, group, on_step)
            if not stored["failed"]:  # what has failed is tried again by the same command
                self.run.store(name, stored)
        on_step(max(self.settings.steps, 1))
        return stored

    def _name(self, candidate: Candidate, group: Sequence[Site]) -> str:
        return f"groups/{candidate}-{label_of(group, self.teacher.sites)}"

    def teacher_record(self) -> dict[str, Any]:
        """Return the teacher's own figures, from disk if they are there."""
        run = self.run
        stored: dict[str, Any] | None = run.load("teacher")
        if stored is None:
            own = self.judge.teacher_evaluation()
            stored = {"name": self.teacher.name, "params": self.teacher.params, "accuracy": own.accuracy}
            run.store("teacher", stored)
        return stored

    @property
    def statistics(self) -> dict[str, dict[str, float]]:
        """Site -> attention statistics."""
        run = self.run
        stored: dict[str, dict[str, float]] | None = run.load("statistics")
        if stored is None:
            stored = self.captured.statistics
            run.store("statistics", stored)
        return stored

    @cached_property
    def batches(self) -> list[torch.Tensor]:
        """The images to distil on, prepared."""
        return list(image_batches(self.data, self.indices, self.teacher.image))

    @cached_property
    def captured(self) -> Capture:
        """The teacher's activations at its attention layers."""
        with self.reporter.phase("teacher's activations", len(self.indices)) as report:
            return capture(self.teacher, self.batches, len(self.indices), on_batch=report)

    @cached_property
    def students(self) -> GroupStudents:
        """Makes the students."""
        return GroupStudents(self.teacher, self.captured, self.batches, seed=self.settings.seed)

    @cached_property
    def judge(self) -> Judge:
        """Judges them on test images."""
        labels = fitting_labels(self.teacher, self.data, self.test)
        return Judge(self.teacher, image_batches(self.data, self.test, self.teacher.image), labels)

    def _measured(self, candidate: Candidate, group: Sequence[Site], on_step: _Part) -> dict[str, Any]:
        began = time.perf_counter()
        try:
            student = self.students.solved(candidate, group)
            solved = self._judged(student, group)
            steps = self.students.train(student, group, steps=self.settings.steps, on_step=on_step)
            trained = self._judged(student, group) if steps else solved
        except Exception as error:  # a plugin's mixer may raise anything; it costs no other group
            known = "" if isinstance(error, MixerzooError) else f"{type(error).__name__}: "
            return {"failed": " ".join(f"{known}{error}".split())}
        seconds = round(time.perf_counter() - began, 3)
        return {"failed": "", "solved": solved, "trained": trained, "steps": steps, "seconds": seconds}

    def _judged(self, student: torch.nn.Module, group: Sequence[Site]) -> dict[str, float | None]:
        """Return the figures on test images, with the standard error of the loss."""
        output = self.judge.outputs(student, first=min(site.stage for site in group))
        classifier = self.teacher.classifier
        found: Evaluation = judge(output, self.judge.target, self.judge.labels, classifier=classifier)
        if not math.isfinite(found.loss):
            raise MixerzooError(f"the loss of its student is {found.loss}")
        losses = output_loss(output, self.judge.target, classifier=classifier)
        error = float(losses.std()) / math.sqrt(len(losses)) if len(losses) > 1 else 0.0
        return asdict(found) | {"loss_error": error}


def _conclusion(
    rows: Sequence[Mapping[str, Any]], statistics: Sequence[Mapping[str, float]], layers: Sequence[Site]
) -> dict[str, Any]:
    """Return the groups of one mixer with their statistics, and how the drop relates to these."""
    place = {site.name: at for at, site in enumerate(layers)}
    whole = [row for row in rows if not row["failed"]]
    over = [[place[site] for site in row["sites"]] for row in whole]
    relations, unstepped, disagreement = (
        relate(over, statistics, drops)
        for drops in (
            [row["trained"]["loss"] for row in whole],
            [row["solved"]["loss"] for row in whole],
            [1 - row["trained"]["agreement"] for row in whole],
        )
    )
    means = [
        {
            name: sum(statistics[place[site]][name] for site in row["sites"]) / len(row["sites"])
            for name in ATTENTION_STATISTICS
        }
        for row in rows
    ]
    return {
        "verdict": verdict(relations) if whole else f"no group could be replaced: {rows[0]['failed']}",
        "closest": closest(relations),
        "relations": [relation.to_json() for relation in relations],
        "relations_without_steps": [relation.to_json() for relation in unstepped],
        "relations_of_disagreement": [relation.to_json() for relation in disagreement],
        "groups": [dict(row) | {"statistics": _finite(mean)} for row, mean in zip(rows, means, strict=True)],
    }


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _environment() -> dict[str, Any]:
    found = environment(Conditions(threads=torch.get_num_threads()))
    return {name: found[name] for name in ENVIRONMENT}


def _write(run: RunDirectory, content: Mapping[str, Any]) -> None:
    from mixerzoo.files import write_bytes, write_json
    from mixerzoo_search.report.sparsity_picture import sparsity_picture

    write_bytes(run.path / "sparsity.png", sparsity_picture(content))
    write_json(run.path / "sparsity.json", content)
