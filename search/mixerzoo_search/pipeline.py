"""The search, phase by phase. Every finished part is on disk before the next begins, so that it can go on."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mixerzoo.capture import Capture, capture
from mixerzoo.data import Dataset, image_batches, load_labels
from mixerzoo.errors import BudgetOutOfReachError, MixerzooError
from mixerzoo.files import write_json, write_text
from mixerzoo.hosts import Teacher, assemble
from mixerzoo.latency import (
    Conditions,
    LatencyTable,
    Stopwatch,
    check_device,
    environment,
    measure_table,
    threads,
)
from mixerzoo.library import Library
from mixerzoo.plan import Candidate, Plan
from mixerzoo.progress import Reporter
from mixerzoo.registry import get_registry
from mixerzoo.score import Judge
from mixerzoo.student import Student, make_replacement, save_student
from mixerzoo.tracking import Tracker
from mixerzoo_search import exact
from mixerzoo_search.additive import AdditiveModel
from mixerzoo_search.candidates import (
    CandidateLibrary,
    Candidates,
    forecast,
    list_candidates,
    missing,
    not_dominated,
    promising,
)
from mixerzoo_search.evaluate import Evaluator, PlanResult
from mixerzoo_search.finish import (
    FINAL_ROUNDS,
    REFIT_ROWS,
    REFITTED,
    TUNED,
    Finalist,
    choose,
    finalists,
    finetune_plan,
    load_finalist,
    refit_plan,
    save_finalist,
)
from mixerzoo_search.fit_quality import mape, max_error, spearman
from mixerzoo_search.journal import Journal
from mixerzoo_search.prior import Prior
from mixerzoo_search.report import write_report
from mixerzoo_search.results import make_report, model_card
from mixerzoo_search.run_directory import RunDirectory
from mixerzoo_search.settings import Settings
from mixerzoo_search.study import evaluations, open_study, run_study
from mixerzoo_search.summary import constant_loss, frontier_of, summarize

VALIDATION_IMAGES = 200
TEST_IMAGES = 500
CALIBRATION_PLANS = 12  # random plans that the affine correction of the latency is fitted on
CHECK_PLANS = 24  # further ones that its error is measured on
STEPS_PER_SITE = 1.5  # candidates that get gradient steps, per site
UNIFORM_SHARE = 0.1  # of candidates that the prior would leave out
SWEEP = 12  # budgets of the exact frontier
TOLERANCE = 0.01  # of the teacher's latency: changes below it are not told apart


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """What a search returns: the run directory and the content of its `summary.json`."""

    path: Path
    summary: dict[str, Any]

    @property
    def best(self) -> Path:
        """Folder of the winning student, for `mixerzoo.load`."""
        return self.path / "best"


class Pipeline:
    """One search. `run` goes through the phases; each of them first looks at what is there already."""

    def __init__(
        self,
        settings: Settings,
        teacher: Teacher,
        data: Dataset,
        run: RunDirectory,
        *,
        reporter: Reporter,
        storage: str | None,
        tracking_uri: str | None,
    ) -> None:
        check_device(settings.device, settings.dtype)
        get_registry().runtimes.get(settings.runtime)
        self.settings = settings
        self.teacher = teacher
        self.data = data
        self.directory = run
        self.reporter = reporter
        self.conditions = Conditions(
            batch_size=settings.batch_size,
            threads=settings.threads,
            dtype=settings.dtype,
            device=settings.device,
            runtime=settings.runtime,
        )
        self.candidates: Candidates = list_candidates(
            teacher.sites, mixers=settings.mixers, widths=settings.widths
        )
        self.storage = storage
        resumed = run.check(self._identity())
        self.stopwatch = Stopwatch(teacher, self.conditions)
        self.teacher_ms: float = run.record()["teacher_ms"] if resumed else self._time_teacher()
        self.budget_ms = settings.budget.in_ms(self.teacher_ms)
        if self.budget_ms >= self.teacher_ms:
            raise MixerzooError(
                f"budget {settings.budget.label}: the teacher '{teacher.name}' already takes only "
                f"{self.teacher_ms:.3g} ms here; give less"
            )
        tracker = Tracker(tracking_uri, f"mixerzoo {teacher.name}")
        if not resumed:
            run.start(
                self._identity(),
                teacher_ms=self.teacher_ms,
                environment=environment(self.conditions),
                command=command_line(),
            )
        self.journal = Journal(tracker, run, settings, teacher)
        self.library = CandidateLibrary(
            Library(run.path / "library"),
            teacher,
            data=data.fingerprint,
            images=len(self.calibration),
            seed=settings.seed,
        )

    # -- what a search is made of ---------------------------------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        return self.settings.identity() | {
            "teacher_fingerprint": self.teacher.fingerprint[:16],
            "data_fingerprint": self.data.fingerprint[:16],
            "plugins": get_registry().versions(),
            "space": {site: [str(c) for c in row] for site, row in self.candidates.items()},
        }

    @property
    def calibration(self) -> tuple[int, ...]:
        """Indices of the images to distil on."""
        return self.data.splits.calibration[: self.settings.images]

    @cached_property
    def calibration_batches(self) -> list[torch.Tensor]:
        """The images to distil on, prepared."""
        return list(image_batches(self.data, self.calibration, self.teacher.image))

    def _judge(self, indices: Sequence[int]) -> Judge:
        labels = load_labels(self.data, indices)
        if labels is not None and not self._labels_fit(labels):
            labels = None
        return Judge(self.teacher, image_batches(self.data, indices, self.teacher.image), labels)

    def _labels_fit(self, labels: torch.Tensor) -> bool:
        """Whether the labels can be the teacher's classes: as many, or, unnamed, no higher number."""
        classes = int(getattr(self.teacher.model, "num_classes", 0))
        if not self.teacher.classifier:
            return False
        return len(self.data.classes) == classes if self.data.classes else int(labels.max()) < classes

    def _time_teacher(self) -> float:
        again = assemble(self.teacher.model, {})
        return self.stopwatch.time({"again": again}, rounds=FINAL_ROUNDS)["teacher"].median

    @cached_property
    def judge(self) -> Judge:
        """Judges students on the validation images: everything is chosen on these."""
        return self._judge(self.data.splits.validation[:VALIDATION_IMAGES])

    @cached_property
    def evaluator(self) -> Evaluator:
        """Stitches, judges and times plans."""
        return Evaluator(
            self.library,
            self.judge,
            self.stopwatch,
            base_ms=self.teacher_ms,
            steps=self.settings.distill_steps,
        )

    # -- phases ---------------------------------------------------------------------------------------------

    def run(self) -> SearchResult:
        """Run all phases and write the results.

        Raises:
            BudgetOutOfReachError: if even the fastest plan is over the budget.
        """
        try:
            with threads(self.settings.threads):
                summary = self._phases()
        except BaseException as error:
            self.journal.finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
            raise
        self.journal.finish("FINISHED")
        return SearchResult(path=self.directory.path, summary=summary)

    def _phases(self) -> dict[str, Any]:
        run = self.directory
        with run.timed("latency"):
            table = self._latency()
            self._demand_reachable(table)
        with run.timed("capture"):
            captured = self._capture()
        with run.timed("distill"):
            statistics: dict[str, dict[str, float]] = run.load("statistics")
            self._distill(captured, statistics, table)
        del captured
        with run.timed("score"):
            model, prior = self._score(statistics, table)
        with run.timed("latency"):
            model, latency_model = self._calibrate(model)
        with run.timed("exact"):
            line = self._exact(model)
        with run.timed("study"):
            results = self._study(model, prior, [solution.plan for solution in line])
        with run.timed("finetune"):
            best, finished = self._finish(results, model)
        return self._write(results + finished, best, latency_model, line, statistics, prior)

    def _latency(self) -> LatencyTable:
        """Time every candidate in place, on the scale of the teacher's latency in this run."""
        stored = self.directory.load("latency")
        if stored is None:
            with self.reporter.phase("latency of every candidate", 15) as report:
                measured = measure_table(self.stopwatch, self.candidates, on_round=report)
            scale = self.teacher_ms / measured.base_ms
            change = {
                site: {name: ms * scale for name, ms in row.items()}
                for site, row in measured.change_ms.items()
            }
            self.directory.store("latency", {"base_ms": self.teacher_ms, "change_ms": change})
            stored = self.directory.load("latency")
        return LatencyTable(base_ms=stored["base_ms"], change_ms=stored["change_ms"])

    def _demand_reachable(self, table: LatencyTable) -> None:
        """Raise if the fastest plan, with one candidate at each site chosen for speed alone, misses the budget."""
        fastest = self._additive(self.candidates, table, {}).fastest()
        modules = {
            site: make_replacement(candidate, self.teacher.site(site))
            for site, candidate in fastest.choices
            if not candidate.is_keep
        }
        timing = self.stopwatch.time({"fastest": assemble(self.teacher.model, modules)})["fastest"]
        ms = timing.ratio * self.teacher_ms
        if ms <= self.budget_ms:
            return
        letters = {spec.name: spec.letter for spec in get_registry().mixers}
        raise BudgetOutOfReachError(
            f"budget {self.settings.budget.label} ({self.budget_ms:.3g} ms) is out of reach: the fastest plan "
            f"{fastest.short_name(self.teacher.sites, letters)} takes {ms:.3g} ms of the teacher's "
            f"{self.teacher_ms:.3g} ms, most of it outside the {len(self.teacher.sites)} sites "
            "(embedding, norms, head) or in the narrowest mixers of the space; give at least "
            f"--budget-ms {ms * 1.1:.3g}"
        )

    def _capture(self) -> Capture | None:
        """Run the teacher once over the calibration images, unless nothing is left to distil."""
        planned: list[str] | None = self.directory.load("stepped")
        done = planned is not None and not missing(self.library, self.candidates, 0)
        done = done and all(
            self.library.find(site, candidate, self.settings.distill_steps)
            for site, candidate in self._parse_stepped(planned or [])
        )
        if done and self.directory.load("statistics") is not None:
            return None
        with self.reporter.phase("teacher's activations", len(self.calibration)) as report:
            captured = capture(self.teacher, self.calibration_batches, len(self.calibration), on_batch=report)
        self.directory.store("statistics", captured.statistics)
        return captured

    def _distill(
        self, captured: Capture | None, statistics: Mapping[str, Mapping[str, float]], table: LatencyTable
    ) -> None:
        """Closed form for all candidates; then gradient steps for those on their site's frontier."""
        if captured is None:
            return
        todo = missing(self.library, self.candidates, 0)
        with self.reporter.phase("closed-form candidates", len(todo)) as report:
            for done, (site, candidate) in enumerate(todo):
                self.library.make(site, candidate, 0, captured)
                report(done + 1)
        steps = self.settings.distill_steps
        planned: list[str] | None = self.directory.load("stepped")
        if planned is None:
            damage = forecast(self.library, self.candidates, statistics, steps=0).damage
            order = promising(self.candidates, damage, table.change_ms) if steps else []
            with_weights = [(s, c) for s, c in order if self._has_weights(s, c)]
            chosen = with_weights[: round(STEPS_PER_SITE * len(self.teacher.sites))]
            planned = [f"{site} {candidate}" for site, candidate in chosen]
            self.directory.store("stepped", planned)
        rest = [(s, c) for s, c in self._parse_stepped(planned) if self.library.find(s, c, steps) is None]
        with self.reporter.phase("gradient steps", len(rest)) as report:
            for done, (site, candidate) in enumerate(rest):
                self.library.make(site, candidate, steps, captured)
                report(done + 1)
        for name in self.library.library.damaged:
            self.reporter.note(f"library: {name} was damaged and has been distilled again")

    def _parse_stepped(self, planned: Sequence[str]) -> list[tuple[Any, Candidate]]:
        pairs = [text.rsplit(" ", 1) for text in planned]
        return [(self.teacher.site(site), Candidate.parse(candidate)) for site, candidate in pairs]

    def _has_weights(self, site: str, candidate: Candidate) -> bool:
        entry = self.library.find(self.teacher.site(site), candidate, 0)
        return entry is not None and entry.params > 0

    def _score(
        self, statistics: Mapping[str, Mapping[str, float]], table: LatencyTable
    ) -> tuple[AdditiveModel, Prior]:
        """Replace one site at a time and measure the loss; candidates that are clearly beaten are left out."""
        steps = self.settings.distill_steps
        guess = forecast(self.library, self.candidates, statistics, steps=steps)
        dice = np.random.default_rng(self.settings.seed)
        space = not_dominated(
            self._usable(),
            guess.damage,
            table.change_ms,
            keep_share=lambda: bool(dice.random() < UNIFORM_SHARE),
            tolerance_ms=TOLERANCE * self.teacher_ms,
        )
        scores: dict[str, dict[str, float]] = self.directory.load("scores") or {}
        todo = [
            (site, candidate)
            for site, row in space.items()
            for candidate in row
            if str(candidate) not in scores.get(site, {})
        ]
        with self.reporter.phase("scores, one site replaced", len(todo)) as report:
            for done, (site, candidate) in enumerate(todo):
                scores.setdefault(site, {})[str(candidate)] = self.evaluator.score(site, candidate)
                self.directory.store("scores", scores)
                report(done + 1)
        measured = {(site, c): scores[site][str(c)] for site, row in space.items() for c in row}
        informed = forecast(self.library, space, statistics, steps=steps, scores=measured)
        self.directory.store(
            "prior",
            {"spearman_before_scores": _agreement(guess.damage, measured), "spearman": informed.spearman},
        )
        model = self._additive(space, table, scores)
        damage = dict(informed.damage) | {
            (site, row[0]): 0.0 for site, row in zip(model.sites, model.candidates, strict=True)
        }
        prior = Prior.from_damage(damage)
        if self.settings.prior == "uniform":
            prior = prior.uniform()
        elif self.settings.prior == "shuffled":
            prior = prior.shuffled(self.settings.seed)
        return model, prior

    def _usable(self) -> Candidates:
        """Return the candidates that were distilled without failing."""
        steps = self.settings.distill_steps
        return {
            site.name: tuple(
                c for c in self.candidates[site.name] if self.library.best(site, c, steps) is not None
            )
            for site in self.teacher.sites
        }

    def _additive(
        self, space: Candidates, table: LatencyTable, scores: Mapping[str, Mapping[str, float]]
    ) -> AdditiveModel:
        rows = {
            site.name: {
                c: (scores.get(site.name, {}).get(str(c), 0.0), table.change_ms[site.name][str(c)])
                for c in space[site.name]
            }
            for site in self.teacher.sites
        }
        return AdditiveModel.from_scores(rows, base_ms=self.teacher_ms)

    def _calibrate(self, model: AdditiveModel) -> tuple[AdditiveModel, dict[str, float]]:
        """Fit the affine correction on some random plans, and measure its error on others."""
        stored = self.directory.load("latency_check")
        if stored is None:
            plans = random_plans(model, CALIBRATION_PLANS + CHECK_PLANS, seed=self.settings.seed)
            measured: list[float] = []
            with self.reporter.phase("latency of random students", len(plans)) as report:
                for first in range(0, len(plans), 6):
                    part = plans[first : first + 6]
                    students = {p.key: assemble(self.teacher.model, self.evaluator.modules(p)) for p in part}
                    times = self.evaluator.latency(students)
                    measured += [times[p.key] for p in part]
                    report(first + len(part))
            stored = [
                {"plan": plan.to_json(), "latency_ms": ms} for plan, ms in zip(plans, measured, strict=True)
            ]
            self.directory.store("latency_check", stored)
        pairs = [(Plan.from_json(row["plan"]), float(row["latency_ms"])) for row in stored]
        fit, check = pairs[:CALIBRATION_PLANS], pairs[CALIBRATION_PLANS:]
        model = model.calibrated([model.additive_ms(plan) for plan, _ in fit], [ms for _, ms in fit])
        predicted, true = [model.predict_ms(plan) for plan, _ in check], [ms for _, ms in check]
        return model, {
            "mape": mape(predicted, true),
            "max_error": max_error(predicted, true),
            "spearman": spearman(predicted, true),
            "plans": len(check),
        }

    def _exact(self, model: AdditiveModel) -> list[exact.Solution]:
        """Solve for a sweep of budgets, from the fastest plan to the teacher, and thrice for the budget itself."""
        fastest = model.predict_ms(model.fastest())
        sweep = np.linspace(fastest, self.teacher_ms, SWEEP + 1)[:-1].tolist()
        found = exact.frontier(model, [ms for ms in sweep if ms > self.budget_ms or ms < self.budget_ms])
        # The budget's own plans leave room for the error of the prediction.
        near = exact.frontier(
            model, [self.budget_ms, self.budget_ms * 0.97, self.budget_ms * 0.94], per_budget=2
        )
        plans = {solution.plan: solution for solution in [*near, *found]}
        return sorted(plans.values(), key=lambda solution: solution.ms)

    def _study(self, model: AdditiveModel, prior: Prior, seeds: Sequence[Plan]) -> list[PlanResult]:
        """Search the true loss and latency of stitched students."""
        storage = self.storage or f"sqlite:///{(self.directory.path / 'study.db').resolve()}"
        study = open_study(
            storage,
            self.directory.path.name if self.storage else "mixerzoo",
            model=model,
            prior=prior,
            budget_ms=self.budget_ms,
            seed=self.settings.seed,
        )
        for result in evaluations(study):
            self.journal.log(result)  # what a killed process had evaluated and not yet logged
        with self.reporter.phase("true evaluations", self.settings.trials) as report:

            def on_result(result: PlanResult, done: int) -> None:
                self.journal.log(result)
                report(done)

            return run_study(
                study,
                lambda plan, source: self.evaluator.evaluate(plan, model, source=source),
                model=model,
                seeds=seeds,
                budget_ms=self.budget_ms,
                trials=self.settings.trials,
                minutes=self.settings.minutes,
                on_result=on_result,
            )

    def _finish(
        self, results: Sequence[PlanResult], model: AdditiveModel
    ) -> tuple[Finalist | None, list[PlanResult]]:
        """Refit and distil the best plans, and choose the winner by its loss after that."""
        folder = self.directory.path / "finalists"
        chosen = self._chosen_finalists(results)
        tokens = self.teacher.sites[0].tokens
        enough = max(2, -(-REFIT_ROWS // (tokens * len(self.calibration_batches[0]))))
        ready: list[Finalist] = []
        with self.reporter.phase("refit of the best plans", len(chosen)) as report:
            for done, result in enumerate(chosen):
                place = folder / f"{result.plan.key}-refit"
                finalist = load_finalist(place, self.evaluator)
                if finalist is None:
                    finalist = refit_plan(result, self.evaluator, self.calibration_batches[:enough], model)
                    save_finalist(place, finalist, self.evaluator)
                ready.append(finalist)
                report(done + 1)
        finished = [f.result for f in ready if f.result.source == "refit"]
        ready.sort(key=lambda finalist: finalist.result.loss)
        tuned = ready[:TUNED] if self.settings.finetune_minutes else []
        with self.reporter.phase("distillation as a whole", len(tuned)) as report:
            for number, finalist in enumerate(tuned):
                place = folder / f"{finalist.result.plan.key}-finetuned"
                better = load_finalist(place, self.evaluator)
                if better is None:
                    better = finetune_plan(
                        finalist,
                        self.evaluator,
                        self.calibration_batches,
                        model,
                        seconds=60 * self.settings.finetune_minutes / len(tuned),
                        seed=self.settings.seed,
                        on_progress=lambda share, number=number: report(number + share),
                    )
                    save_finalist(place, better, self.evaluator)
                if better.result.source == "finetuned":
                    finished.append(better.result)
                    ready.append(better)
        for result in finished:
            self.journal.log(result)
        best = choose(
            ready,
            self.evaluator,
            budget_ms=self.budget_ms,
            on_miss=lambda r: self.reporter.note(f"measured again, {r.latency_ms:.3g} ms: over the budget"),
        )
        return best, finished

    def _chosen_finalists(self, results: Sequence[PlanResult]) -> list[PlanResult]:
        """Return the plans that are refitted; chosen once a number of trials, so that a resume takes the same."""
        stored: dict[str, list[dict[str, Any]]] = self.directory.load("finalists") or {}
        if str(len(results)) not in stored:
            chosen = finalists(results, self.evaluator, budget_ms=self.budget_ms, most=REFITTED)
            stored[str(len(results))] = [result.to_json() for result in chosen]
            self.directory.store("finalists", stored)
        return [PlanResult.from_json(row) for row in stored[str(len(results))]]

    def _write(
        self,
        results: Sequence[PlanResult],
        best: Finalist | None,
        latency_model: Mapping[str, float],
        line: Sequence[exact.Solution],
        statistics: Mapping[str, Mapping[str, float]],
        prior: Prior,
    ) -> dict[str, Any]:
        """Judge the winner on the test images, and write the summary, the model, the report and MLflow's end."""
        run = self.directory
        test = self._judge(self.data.splits.test[:TEST_IMAGES])
        teacher_test = test.teacher_evaluation()
        best_test = None if best is None else test.evaluate(best.student)
        summary = summarize(
            teacher=self.teacher,
            teacher_ms=self.teacher_ms,
            teacher_test=teacher_test,
            budget_ms=self.budget_ms,
            best=None if best is None else best.result,
            best_test=best_test,
            results=results,
            worst_loss=constant_loss(self.judge, classifier=self.teacher.classifier),
            latency_model=latency_model,
            wall_s=run.wall_s(),
            environment=environment(self.conditions),
        )
        if best is not None:
            student = Student(plan=best.result.plan, model=best.student)
            save_student(run.path / "best", student, self.teacher)
            write_text(run.path / "best" / "README.md", model_card(summary, self.teacher, self.data))
        report = make_report(
            summary=summary,
            teacher=self.teacher,
            data=self.data,
            results=results,
            best=None if best is None else best.result,
            frontier=frontier_of(results),
            line=[(solution.ms, solution.loss) for solution in line],
            statistics=statistics,
            candidates=self.candidates,
            budget_ms=self.budget_ms,
            command=run.record().get("command", ""),
        )
        write_report(run.path, report)
        write_json(run.path / "summary.json", summary)
        self.journal.conclude(summary, frontier_of(results))
        return summary


def random_plans(model: AdditiveModel, count: int, *, seed: int) -> list[Plan]:
    """Return random plans of all speeds: each replaces a share of its sites that is itself drawn at random."""
    rng = np.random.default_rng([seed, count])
    plans = []
    for _ in range(count):
        share = rng.random()
        choices = [
            int(rng.integers(1, len(row))) if len(row) > 1 and rng.random() < share else 0
            for row in model.candidates
        ]
        plans.append(model.plan(choices))
    return plans


def command_line() -> str:
    """Return the command that this process was started with, as one would type it."""
    words = [Path(sys.argv[0]).name, *sys.argv[1:]]
    return shlex.join(words)


def _agreement(
    damage: Mapping[tuple[str, Candidate], float], measured: Mapping[tuple[str, Candidate], float]
) -> float:
    keys = list(measured)
    return spearman([damage[key] for key in keys], [measured[key] for key in keys])
