"""Part `refit`: all attention replaced at once: stitched, after the sequential refit, and after minutes of steps.

Accuracies are on test images. What is kept, and which steps are, is chosen on validation images.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from sections import Section, Settings, table, verdict
from subjects import Subject, open_subject, widest
from torch import nn

from mixerzoo.finetune import finetune
from mixerzoo.hosts import Replacement, assemble
from mixerzoo.library.entries import Source
from mixerzoo.library.folder import Library
from mixerzoo.plan import Candidate
from mixerzoo.refit import refit
from mixerzoo.score import Judge
from mixerzoo.student import make_replacement
from mixerzoo_search.candidates import CandidateLibrary
from mixerzoo_search.finetuning.images import PreparedImages

CORE = ("static", "glu_mlp", "linear_attention", "multihead_lstm", "shallow_ffn")
QUICK_CORE = ("static",)
BEST, KEPT_BEST = "best", "best-keep4"  # the best candidate of each layer; four layers kept
KEPT = 4
PLANS = (*CORE, BEST, KEPT_BEST)
TEST_IMAGES, VALIDATION_IMAGES, QUICK_IMAGES = 500, 200, 60
QUICK_MINUTES = 0.05
# Points below the teacher, DINOv2-S only: variant -> plan -> when -> most.
BARS: dict[str, dict[str, dict[str, float]]] = {
    "centred": {"static": {"refit": 2.0}, BEST: {"steps": 1.0}},
    "random": {BEST: {"steps": 6.0}, KEPT_BEST: {"steps": 2.0}},
}
PASSES_BAR = 5.0  # of the refit of `static`, centred


def run(subject: Subject, settings: Settings, section: Section, console: Console) -> None:
    """Go through the variants of the digits; each has a teacher of its own."""
    for variant in settings.variants:
        if variant == "random":
            subject = open_subject(
                settings.teacher,
                images=settings.images,
                cache=settings.cache,
                data=settings.data,
                scattered=True,
            )
        _Variant(variant, subject, settings, section, console).run()


class _Variant:
    """All plans on one variant of the data."""

    def __init__(
        self, variant: str, subject: Subject, settings: Settings, section: Section, console: Console
    ) -> None:
        self.variant, self.subject, self.settings = variant, subject, settings
        self.section, self.console = section, console
        core = QUICK_CORE if settings.quick else CORE
        self.best: dict[str, Candidate] = {}
        self.names = settings.plans or (*core, BEST, KEPT_BEST)
        self.mixers = tuple(dict.fromkeys((*core, *settings.mixers)))

    def run(self) -> None:
        """Measure the plans that the file does not have yet."""
        todo = [name for name in self.names if f"{self.variant}: {name}" not in self.section.rows]
        if todo:
            self._prepare(todo)
        for name in todo:
            self.section.rows[f"{self.variant}: {name}"] = self._measure(name)
            self.section.save()
        self._print()

    def _prepare(self, names: Sequence[str]) -> None:
        """Build what the plans need of the library, kept in the cache, and judge the teacher."""
        subject, settings = self.subject, self.settings
        splits, quick = subject.data.splits, settings.quick
        self.test = subject.judge(splits.test[: QUICK_IMAGES if quick else TEST_IMAGES])
        self.validation = subject.judge(splits.validation[: QUICK_IMAGES if quick else VALIDATION_IMAGES])
        source = Source.of(subject.teacher, subject.data, subject.indices)
        library = Library(settings.cache / "distill-library")
        self.shelf = CandidateLibrary(library, subject.teacher, source, steps=0, seed=settings.seed)
        chosen = {BEST, KEPT_BEST} & set(names)  # from all mixers
        candidates = [widest(name) for name in (self.mixers if chosen else names)]
        todo = [(site.name, candidate) for site in subject.attention for candidate in candidates]
        if any(self.shelf.find(*pair, stepped=False) is None for pair in todo):
            captured = subject.capture(subject.attention)
            for site, candidate in todo:
                self.shelf.make(site, candidate, captured, stepped=False)
        row = self.section.rows.setdefault(f"{self.variant}: teacher", {})
        row["accuracy"] = self.test.teacher_evaluation().accuracy
        if chosen:
            row |= self._choose(candidates)

    def _choose(self, candidates: Sequence[Candidate]) -> dict[str, Any]:
        """Find the best candidate of each layer, and the layers to keep; return what goes into the file."""
        # By the loss of the teacher with that one site replaced, as a search scores them: a site's own error does not
        # tell which directions matter to what comes behind it.
        scores = {
            site.name: {
                c: self.validation.evaluate_modules(self._modules({site.name: c})).loss
                for c in candidates
                if self.shelf.best(site.name, c) is not None
            }
            for site in self.subject.attention
        }
        self.best = {site: min(row, key=row.__getitem__) for site, row in scores.items()}
        lowest = {site: min(row.values()) for site, row in scores.items()}
        self.kept = sorted(lowest, key=lowest.__getitem__)[-KEPT:]
        return {
            "best": {site: str(candidate) for site, candidate in self.best.items()},
            "scores": {site: round(score, 5) for site, score in lowest.items()},
        }

    def _modules(self, choices: Mapping[str, Candidate]) -> dict[str, Replacement]:
        """Return fresh replacements with the weights of the library."""
        modules = {}
        for site, candidate in choices.items():
            entry = self.shelf.best(site, candidate)
            if entry is None:
                raise LookupError(f"{candidate} at {site} failed")
            modules[site] = make_replacement(
                candidate, self.subject.teacher.site(site), self.shelf.state(entry)
            )
        return modules

    def _choices(self, name: str) -> dict[str, Candidate]:
        if name == BEST:
            return self.best
        if name == KEPT_BEST:
            return {site: candidate for site, candidate in self.best.items() if site not in self.kept}
        return {site.name: widest(name) for site in self.subject.attention}

    def _measure(self, name: str) -> dict[str, Any]:
        """Stitch, refit, take steps; each judged."""
        teacher, settings = self.subject.teacher, self.settings
        choices = self._choices(name)
        try:
            modules = self._modules(choices)
        except LookupError as reason:
            return {"failed": str(reason)}
        row: dict[str, Any] = {"plan": {site: str(candidate) for site, candidate in choices.items()}}
        row["stitched"] = _judged(self.test, assemble(teacher.model, modules))
        passes = [self.subject.pass_seconds()]
        began = time.perf_counter()
        mixers = {site: candidate.mixer for site, candidate in choices.items()}
        student = refit(teacher, modules, mixers, self.subject.batches)
        seconds = time.perf_counter() - began
        passes.append(self.subject.pass_seconds())
        row["refit"] = _judged(self.test, student) | {
            "seconds": round(seconds, 2),
            "passes": round(seconds / (sum(passes) / len(passes)), 2),
        }
        minutes = QUICK_MINUTES if settings.quick else settings.minutes
        began = time.perf_counter()
        tuned, _ = finetune(
            teacher,
            student,
            # As in a search: all that are there to distil on.
            PreparedImages(self.subject.data, self.subject.data.splits.calibration, teacher.image),
            seconds=60 * minutes,
            evaluate=lambda model: self.validation.evaluate(model).loss,
            seed=settings.seed,
        )
        row["steps"] = _judged(self.test, tuned) | {"seconds": round(time.perf_counter() - began, 2)}
        return row

    def _print(self) -> None:
        found = {name: self.section.rows.get(f"{self.variant}: {name}") for name in self.names}
        teacher = self.section.rows[f"{self.variant}: teacher"]["accuracy"]
        rows = []
        for name, row in found.items():
            if row is None or "failed" in row:
                rows.append((name, *["[red]failed" if row else ""] * 4))
                continue
            accuracies = [f"{row[when]['accuracy']:.1%}" for when in ("stitched", "refit", "steps")]
            rows.append((name, *accuracies, f"{row['refit']['passes']:.1f}"))
        columns = ("all attention", "stitched", "refitted", "and steps", "refit, passes")
        title = f"{self.variant} digits: accuracy on test images; teacher {teacher:.1%}"
        table(self.console, title, columns, rows)
        bars = BARS.get(self.variant, {}) if self.settings.teacher == "dinov2" else {}
        met = self.section.content.setdefault("met", {})
        for name, limits in bars.items():
            row = found.get(name)
            if row is None or "failed" in row:
                continue
            for when, most in limits.items():
                what = f"{self.variant} {name}, {when}: points below the teacher"
                lost = round(100 * (teacher - row[when]["accuracy"]), 2)
                met[what] = verdict(self.console, what, lost, most)
            if "refit" in limits:
                what = f"{self.variant} {name}: teacher passes of the refit"
                met[what] = verdict(self.console, what, row["refit"]["passes"], PASSES_BAR)
        self.section.save()


def _judged(judge: Judge, student: nn.Module) -> dict[str, float]:
    found = judge.evaluate(student)
    assert found.accuracy is not None  # all data here have labels
    figures = {"accuracy": found.accuracy, "agreement": found.agreement, "loss": found.loss}
    return {name: round(value, 5) for name, value in figures.items()}
