"""What the phases of one search share: the teacher, the data, the run directory, and the tools made from them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mixerzoo.capture import Capture, capture
from mixerzoo.classes import fitting_labels
from mixerzoo.data import Dataset, image_batches
from mixerzoo.hosts import Teacher
from mixerzoo.latency import Stopwatch
from mixerzoo.library.entries import Source
from mixerzoo.library.folder import Library
from mixerzoo.plan import Candidate
from mixerzoo.progress import Reporter
from mixerzoo.registry import get_registry
from mixerzoo.score import Judge, Keep
from mixerzoo_search.candidates import CandidateLibrary, Pair, wider_widths
from mixerzoo_search.evaluate import Evaluator
from mixerzoo_search.finetuning.images import PreparedImages
from mixerzoo_search.image_parts import ImageParts, enough_to_refit
from mixerzoo_search.run_directory import RunDirectory
from mixerzoo_search.settings import Settings


@dataclass(frozen=True, kw_only=True)
class Context:
    """One search.

    Attributes:
        settings: the arguments.
        teacher: the teacher.
        data: the data.
        run: the run directory.
        reporter: shows progress.
        stopwatch: times students beside the teacher.
        teacher_ms: the teacher's latency; all latencies of the run are on its scale.
        budget_ms: the budget.
    """

    settings: Settings
    teacher: Teacher
    data: Dataset
    run: RunDirectory
    reporter: Reporter
    stopwatch: Stopwatch
    teacher_ms: float
    budget_ms: float

    @property
    def calibration(self) -> tuple[int, ...]:
        """Indices of the images to distil on."""
        return self.data.splits.calibration[: self.settings.images]

    @cached_property
    def library(self) -> CandidateLibrary:
        """The distilled candidates, those that other runs have made included."""
        return CandidateLibrary(
            Library(self.run.library),
            self.teacher,
            Source.of(self.teacher, self.data, self.calibration),
            steps=self.settings.distill_steps,
            seed=self.settings.seed,
            objective=self.settings.objective,
            stepped=self.stepped or (),
            wider=wider_widths(self._given_steps),
        )

    @property
    def stepped(self) -> list[Pair] | None:
        """The candidates whose gradient steps count so far; None before any is chosen for them."""
        stored: dict[str, Any] | None = self.run.load("stepped")
        if stored is None:
            return None
        worse = {(site, Candidate.parse(c)) for site, c in stored["worse"]}
        return [pair for pair in self._given_steps if pair not in worse]

    @property
    def _given_steps(self) -> list[Pair]:
        """The candidates that were chosen for steps so far, in their order."""
        stored: dict[str, Any] = self.run.load("stepped") or {"chosen": []}
        return [(site, Candidate.parse(c)) for site, c in stored["chosen"]]

    @cached_property
    def captured(self) -> Capture:
        """The teacher's activations, from one pass; made when they are first needed."""
        with ExitStack() as stack:
            stack.enter_context(self.run.timed("capture"))
            report = stack.enter_context(self.reporter.phase("teacher's activations", len(self.calibration)))
            captured = capture(
                self.teacher,
                # Prepared as they are needed: the images themselves shall not add to the activations.
                image_batches(self.data, self.calibration, self.teacher.image),
                len(self.calibration),
                memory_limit_gb=self.settings.memory_limit,
                on_batch=report,
            )
        self.run.store("statistics", captured.statistics)
        return captured

    @property
    def statistics(self) -> dict[str, dict[str, float]]:
        """Site -> statistics; those of an earlier start are as good."""
        stored: dict[str, dict[str, float]] | None = self.run.load("statistics")
        return self.captured.statistics if stored is None else stored

    def release_activations(self) -> None:
        """Let go of the teacher's activations: nothing is distilled block-locally, or scored, any more."""
        self.__dict__.pop("captured", None)
        self.__dict__.pop("score_judge", None)
        self.library.release_targets()

    @cached_property
    def training_images(self) -> PreparedImages:
        """All images that students are neither compared nor scored on: more than the closed forms have seen."""
        return PreparedImages(self.data, self.image_parts.refit, self.teacher.image)

    @property
    def refit_images(self) -> tuple[int, ...]:
        """Indices of the images to refit a student on."""
        return self.image_parts.refit[: enough_to_refit(self.teacher.sites)]

    @property
    def image_parts(self) -> ImageParts:
        """Indices of the images that students are judged on, each part for what it serves."""
        return ImageParts.of(self.data.splits, len(self.calibration))

    @cached_property
    def score_judge(self) -> Judge:
        """Judges candidates, one site replaced."""
        return self.make_judge(self.image_parts.scores)

    @cached_property
    def study_judge(self) -> Judge:
        """Compares students with each other."""
        return self.make_judge(self.image_parts.study)

    @cached_property
    def final_judge(self) -> Judge:
        """Judges what is done to students that were chosen by the others: these have flattered them."""
        return self.make_judge(self.image_parts.final, keep="images")

    @cached_property
    def choice_judge(self) -> Judge:
        """Judges finalists beside `final_judge`, and alone those whose weights were chosen by that."""
        indices = self.image_parts.choice
        return self.make_judge(indices, keep="images") if indices else self.final_judge

    @cached_property
    def test_judge(self) -> Judge:
        """Judges students for the reader: nothing is chosen by it."""
        return self.make_judge(self.image_parts.test, keep="nothing")

    def make_judge(self, indices: Sequence[int], *, keep: Keep = "prefixes") -> Judge:
        """Return a judge on the given images; labels that cannot be the teacher's classes are left out."""
        labels = fitting_labels(self.teacher, self.data, indices)
        batches = image_batches(self.data, indices, self.teacher.image)
        return Judge(self.teacher, batches, labels, keep=keep)

    @cached_property
    def evaluator(self) -> Evaluator:
        """Stitches, judges and times plans."""
        return Evaluator(self.library, self.study_judge, self.stopwatch, base_ms=self.teacher_ms)

    @cached_property
    def letters(self) -> dict[str, str]:
        """Mixer -> its letter in short names."""
        return {spec.name: spec.letter for spec in get_registry().mixers}
