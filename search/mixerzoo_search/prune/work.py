"""One start of a pruning: what is left of its phases is done, and each result is written when it is there."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from torch import nn

from mixerzoo.data import image_batches
from mixerzoo.errors import MixerzooError
from mixerzoo.hosts import count_params
from mixerzoo.latency import Conditions, Stopwatch, environment
from mixerzoo.pruning.targets import BY, CONFIRM, Gauge, Thresholds, flops
from mixerzoo.score import Evaluation
from mixerzoo.student import Student
from mixerzoo.tracking import Tracker
from mixerzoo_search.context import Context
from mixerzoo_search.differences import machines
from mixerzoo_search.improved import RESULT_FILE
from mixerzoo_search.prune.family import PENALISED, PENALISING, Family, load
from mixerzoo_search.prune.journal import PruneJournal
from mixerzoo_search.prune.phases import Pruner
from mixerzoo_search.prune.report import card
from mixerzoo_search.prune.settings import PruneSettings, label

Figures = tuple[Evaluation, Evaluation]


class Work:
    """One start: what it is made of, and its phases."""

    def __init__(
        self,
        context: Context,
        student: Student,
        settings: PruneSettings,
        family: Family,
        conditions: Conditions,
        command: str,
    ) -> None:
        self.context, self.settings, self.family = context, settings, family
        self.conditions, self.command = conditions, command
        stopwatch = Stopwatch(context.teacher, conditions)
        indices = context.data.splits.calibration[: settings.images]
        by = next(by for by in BY if by == settings.by)
        self.pruner = Pruner(
            teacher=context.teacher,
            student=student,
            batches=list(image_batches(context.data, indices, context.teacher.image)),
            validation=context.final_judge,
            test=context.test_judge,
            gauge=Gauge(by, context.teacher, stopwatch),
            reporter=context.reporter,
            lr=settings.lr,
            seed=settings.seed,
        )

    def go(self, targets: list[float], tracking_uri: str | None) -> None:
        """Prune to these targets, and log what has not been logged.

        Raises:
            MixerzooError: what was wrong with the first target that failed; the others are pruned to.
        """
        self._demand_reachable(targets)
        with self._journal(tracking_uri) as journal:
            journal.students()  # what a killed process had written and not yet logged
            missed = self._prune(targets, journal) if targets else None
        if missed is not None:
            raise missed
        self.family.note(phase="finished")

    def _demand_reachable(self, targets: Sequence[float]) -> None:
        """Refuse targets out of reach; latency does not depend on weights: it is known before anything is trained."""
        thresholds = self.pruner.thresholds(self.pruner.student)
        for target in targets:
            if self.family.known("reached", target) is None:
                thresholds.demand_reachable(target)

    def _prune(self, targets: Sequence[float], journal: PruneJournal) -> MixerzooError | None:
        """Prune to each target; return the first error: a busy machine may miss one, and the others are to be had."""
        student = self._penalised(journal)
        thresholds = self.pruner.thresholds(student)
        missed = None
        for target in targets:
            try:
                self._pruned(student, thresholds, target)
            except MixerzooError as error:
                missed = missed or error
            journal.students()
        return missed

    @contextmanager
    def _journal(self, tracking_uri: str | None) -> Iterator[PruneJournal]:
        pruner, family = self.pruner, self.family
        tracker = Tracker(tracking_uri, f"mixerzoo {self.context.teacher.name}")
        try:
            if "before" not in family.record():
                figures = self._figures(pruner.student.model, pruner.judged(pruner.student.model))
                family.note(command=self.command, environment=environment(self.conditions), before=figures)
            family.note(phase="pruning")
            journal = PruneJournal(tracker, self.context, family, pruner.student.plan)
            try:
                yield journal
            except BaseException as error:
                journal.end("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
                raise
            journal.end("FINISHED")
        finally:
            tracker.close()

    def _penalised(self, journal: PruneJournal) -> Student:
        """Return the student after training with the penalty, from its folder if it is there."""
        settings, family, pruner = self.settings, self.family, self.pruner
        seconds = None if settings.minutes is None else 60 * settings.minutes
        if not (settings.steps or seconds):
            return pruner.student
        path = family.path / PENALISED
        if (path / RESULT_FILE).exists():
            return load(path, pruner.teacher)
        student, tuned = pruner.penalised(
            settings.penalty,
            seconds=seconds,
            steps=settings.steps,
            checkpoint=family.path / PENALISING,
            on_row=journal.row,
        )
        judged = pruner.judged(student.model)
        result = {
            "test": {"after": judged[1].to_json()},
            "validation": {"after": judged[0].to_json()},
            "units_in_use": {
                "before": pruner.in_use(pruner.student.model),
                "after": pruner.in_use(student.model),
            },
            "steps": tuned.steps,
            "seconds": round(tuned.seconds, 3),
            "stopped": tuned.stopped,
            "curve": tuned.curve,
        }
        text = f"# {pruner.teacher.name}, trained with the penalty\n\nNot pruned yet: what its siblings are cut from.\n"
        family.write(path, pruner.teacher, student, text, result)
        family.note_penalised()
        return student

    def _pruned(self, student: Student, thresholds: Thresholds, target: float) -> None:
        """Prune to a target and write the student."""
        family, pruner, began = self.family, self.pruner, time.perf_counter()
        reached = family.known("reached", target)
        if reached is None:
            with self.context.reporter.phase(f"threshold for {label(target)}%, students timed", 6) as report:
                reached = asdict(thresholds.reach(target, on_try=report))
            family.note_of("reached", target, reached)
        working = family.working(target, pruner.teacher) or self._refitted(student, target, reached)
        kept, phases = working
        settings = self.settings
        seconds = None if settings.finetune_minutes is None else 60 * settings.finetune_minutes
        if settings.finetune_steps or seconds:
            kept, tuned = pruner.tuned(
                kept, seconds=seconds, steps=settings.finetune_steps, checkpoint=family.working_path(target)
            )
            phases |= {
                "finetuned": _pair(pruner.judged(kept.model)) | {"steps": tuned.steps, "curve": tuned.curve}
            }
        result = self._result(kept, target, reached, phases, time.perf_counter() - began)
        path = family.student_path(target)
        family.write(
            path, pruner.teacher, kept, card(pruner.teacher, path.name, result, kept.plan.to_json()), result
        )
        family.note_student(target)

    def _refitted(
        self, student: Student, target: float, reached: Mapping[str, Any]
    ) -> tuple[Student, dict[str, Any]]:
        """Cut and refit; what is better by validation loss is written to go on from."""
        pruner = self.pruner
        cut = pruner.cut(student, reached["sizes"])
        refitted = pruner.refitted(cut)
        before, after = pruner.judged(cut.model), pruner.judged(refitted.model)
        phases = {"cut": _pair(before), "refitted": _pair(after)}
        kept = refitted if after[0].loss < before[0].loss else cut
        self.family.write_working(target, pruner.teacher, kept, phases)
        return kept, phases

    def _result(
        self,
        student: Student,
        target: float,
        reached: Mapping[str, Any],
        phases: Mapping[str, Any],
        seconds: float,
    ) -> dict[str, Any]:
        """Return the content of `result.json`."""
        before, judged = self.family.record()["before"], self.pruner.judged(student.model)
        about = self._figures(student.model, judged, share=reached["share"])
        return {
            "schema": 1,
            "kept": "after",
            "target": target,
            "by": self.settings.by,
            **{key: about[key] for key in about if key not in ("validation", "test")},
            "before_params": before["params"],
            "threshold": reached["threshold"],
            "sizes": reached["sizes"],
            "validation": {"before": before["validation"], "after": about["validation"]},
            "test": {"before": before["test"], "after": about["test"]},
            "phases": dict(phases),
            "seconds": round(seconds, 3),
        }

    def _figures(
        self, model: nn.Module, judged: Figures, *, share: Mapping[str, float] | None = None
    ) -> dict[str, Any]:
        """Return what a student takes, and how it does."""
        stopwatch = self.pruner.gauge.stopwatch
        if self.settings.by != "latency" or share is None:
            timing = stopwatch.time({"student": model}, rounds=CONFIRM)
            share = {"value": timing["student"].ratio, "error": timing["student"].error}
        known = self.family.record().get("before", {}).get("teacher_ms") or self._ms_of_run()
        teacher_ms = known or timing["teacher"].median
        return {
            "teacher_ms": teacher_ms,
            "latency_ms": share["value"] * teacher_ms,
            "latency_share": share["value"],
            "latency_error": share["error"],
            "params": count_params(model),
            "flops": flops(model, stopwatch.example),
            **_pair(judged),
        }

    def _ms_of_run(self) -> float | None:
        """Return the teacher's latency in the run, if it was measured there under what holds here."""
        ms = self.context.teacher_ms
        there = self.context.run.record().get("environment") or {}
        return ms if math.isfinite(ms) and machines(there, environment(self.conditions)) is None else None


def _pair(judged: Figures) -> dict[str, Any]:
    return {"validation": judged[0].to_json(), "test": judged[1].to_json()}
