"""The search, phase by phase. Every finished part is on disk before the next begins, so that it can go on."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optuna.study import Study

from mixerzoo.files import read_json, replace_folder, write_json, write_text
from mixerzoo.latency import threads
from mixerzoo.plan import Plan
from mixerzoo.student import Student, save_student
from mixerzoo.temporary import remove_leftovers
from mixerzoo.tracking import Tracker
from mixerzoo_search import exact
from mixerzoo_search.additive import AdditiveModel
from mixerzoo_search.beginning import Opened, begin_run, demand_measured_here, elsewhere, library_of
from mixerzoo_search.candidates import Candidates
from mixerzoo_search.context import Context
from mixerzoo_search.evaluate import PlanResult
from mixerzoo_search.finish import finish
from mixerzoo_search.first_plans import first_plans
from mixerzoo_search.journal import Journal
from mixerzoo_search.opened_run import SUMMARY_FILE
from mixerzoo_search.report import write_report
from mixerzoo_search.results import make_report, model_card
from mixerzoo_search.run_directory import RunDirectory
from mixerzoo_search.scores import additive
from mixerzoo_search.scoring import Scored, distill_closed_form, score, useful
from mixerzoo_search.study import disconnect, evaluations, open_study, run_study, without_password
from mixerzoo_search.summary import Findings, frontier_of, summarize
from mixerzoo_search.taking_over import take_evaluations, take_latency_check, weights_of
from mixerzoo_search.timing import LatencyQuality, calibrate, demand_reachable, latency_table
from mixerzoo_search.turns import PoliteStopwatch, Turns
from mixerzoo_search.workers import Worker

NAMED = 3  # unreadable images that are named on the terminal; `run.json` has them all


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """What a search returns: the run directory and the content of its `summary.json`."""

    path: Path
    summary: dict[str, Any]

    @property
    def best(self) -> Path:
        """Folder of the winning student, for `mixerzoo.load`."""
        return self.path / "best"


def lead(opened: Opened) -> SearchResult:
    """Run all phases and write the results; the caller holds the run's lock.

    Raises:
        MixerzooError: for anything the user can mend.
        BudgetOutOfReachError: if even the fastest plan is over the budget.
    """
    asked, run, settings = opened.asked, opened.run, opened.asked.settings
    if asked.data.skipped:
        asked.reporter.note(
            f"data '{asked.data.name}': {len(asked.data.skipped)} images cannot be read and are left out "
            f"({', '.join(asked.data.skipped[:NAMED])}{', ...' if len(asked.data.skipped) > NAMED else ''})"
        )
    with threads(settings.threads):
        resumed = run.check(opened.identity)
        if resumed:
            finished = _finished_elsewhere(opened)
            if finished is not None:
                return finished
            demand_measured_here(opened)
            remove_leftovers(run.path)
        library = library_of(asked, run)
        tracker = Tracker(asked.tracking_uri, f"mixerzoo {asked.teacher.name}")
        if not resumed:
            begin_run(opened, library)
        run.note(
            library=run.name_of(library),
            study=run.study,
            storage=None if asked.storage is None else without_password(asked.storage),
            trials=settings.trials,
            minutes=settings.minutes,
            memory_limit=settings.memory_limit,
            phase="before the study",
        )
        context = opened.context(run, run.record()["teacher_ms"])
        journal = Journal(tracker, run, settings, asked.teacher)
        try:
            findings = _run_phases(context, opened, journal)
            summary = _write(context, findings, journal)
        except BaseException as error:
            journal.finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
            raise
        journal.finish("FINISHED")
        run.note(phase="finished")
        shutil.rmtree(worker_of(run).folder, ignore_errors=True)
    return SearchResult(path=run.path, summary=summary)


def _finished_elsewhere(opened: Opened) -> SearchResult | None:
    """Return what a search found that was finished on another machine, where nothing more is asked of it."""
    run = opened.run
    record, other = run.record(), elsewhere(opened)
    over = record.get("phase") == "finished" and opened.asked.settings.trials <= record["trials"]
    if other is None or not over:
        return None
    opened.asked.reporter.note(
        f"run '{run.path}' was finished on another machine ({other}); it is shown as it is"
    )
    return SearchResult(path=run.path, summary=read_json(run.path / SUMMARY_FILE))


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What the study goes by.

    Attributes:
        model: scores and latencies, corrected.
        quality: how well latencies are predicted.
        scored: the prior.
        line: the exact frontier, whose plans are evaluated first.
    """

    model: AdditiveModel
    quality: LatencyQuality
    scored: Scored
    line: list[exact.Solution]


def prepare(context: Context, candidates: Candidates, *, check_budget: bool = True) -> Prepared:
    """Make what comes before the study, or read what was made of it.

    Raises:
        BudgetOutOfReachError: if even the fastest plan is over the budget, where that is checked.
    """
    run = context.run
    with run.timed("latency"):
        table = latency_table(context, candidates)
        if check_budget:
            demand_reachable(context, additive(context, candidates, table, {}))
    distilled = distill_closed_form(context, useful(context, candidates, table), table)
    with run.timed("score"):
        scored = score(context, distilled, table)
    context.release_activations()
    with run.timed("latency"):
        take_latency_check(context, scored.model)
        model, quality = calibrate(context, scored.model)
    with run.timed("exact"):
        line = first_plans(context, model)
    return Prepared(model=model, quality=quality, scored=scored, line=line)


def _run_phases(context: Context, opened: Opened, journal: Journal) -> Findings:
    run, asked = context.run, opened.asked
    prepared = prepare(context, opened.candidates)
    with run.timed("study"), study_of(context, prepared, opened) as study:
        taken = take_evaluations(context, study, prepared.model)
        if taken:
            asked.reporter.note(f"{taken} plans are in the study as another run has evaluated them")
        run.note(phase="study")
        for result in evaluations(study):
            journal.log(result)  # what a killed process had evaluated and not yet logged
        results = work(context, prepared, study, worker_of(run), journal=journal)
        run.note(phase="after the study")
    with run.timed("finetune"):
        outcome = finish(context, results, prepared.model)
    for result in outcome.results:
        journal.log(result)
    return Findings(
        candidates=opened.candidates,
        line=prepared.line,
        latency_quality=prepared.quality,
        results=results,
        outcome=outcome,
        prior=prepared.scored.prior_table,
    )


@contextmanager
def study_of(context: Context, prepared: Prepared, opened: Opened) -> Iterator[Study]:
    """Open the run's study for the block; one of that name that belongs to another search is refused."""
    storage = opened.asked.storage or f"sqlite:///{(context.run.path / 'study.db').resolve()}"
    owner = json.dumps([opened.identity, context.teacher_ms])
    settings = context.settings
    study = open_study(
        storage,
        context.run.study,
        model=prepared.model,
        prior=prepared.scored.prior,
        budget_ms=context.budget_ms,
        seed=settings.seed if settings.study_seed is None else settings.study_seed,
        owner=hashlib.sha256(owner.encode()).hexdigest()[:16],
    )
    try:
        yield study
    finally:
        disconnect(study._storage)


def worker_of(run: RunDirectory) -> Worker:
    """Return this process as one of those that work on the run's study."""
    return Worker(run.path / "workers")


def work(
    context: Context, prepared: Prepared, study: Study, worker: Worker, *, journal: Journal | None
) -> list[PlanResult]:
    """Search the true loss and latency of stitched students; without a journal, take part in that."""
    settings, model = context.settings, prepared.model
    turns = Turns(worker.folder)
    assert isinstance(context.stopwatch, PoliteStopwatch)

    def evaluate(plan: Plan, source: str) -> PlanResult:
        with turns.together():
            return context.evaluator.evaluate(plan, model, source=source)

    with context.reporter.phase("true evaluations", settings.trials) as report:

        def on_result(result: PlanResult, done: int) -> None:
            if journal is not None:
                journal.log(result)
            report(done)

        context.stopwatch.turns = turns
        try:
            return run_study(
                study,
                evaluate,
                model=model,
                seeds=[solution.plan for solution in prepared.line],
                budget_ms=context.budget_ms,
                trials=settings.trials,
                minutes=settings.minutes if journal is not None else None,
                worker=worker,
                leads=journal is not None,
                weights=lambda plan: weights_of(context.library, plan),
                on_result=on_result,
            )
        finally:
            context.stopwatch.turns = None


def _write(context: Context, findings: Findings, journal: Journal) -> dict[str, Any]:
    """Judge the winner on the test images; write the model, the report and, last, the summary."""
    run, best = context.run, findings.outcome.best
    summary = summarize(context, findings)
    for damaged in context.library.files.damaged:
        context.reporter.note(f"library: {damaged} was damaged and has been distilled again")
    (run.path / SUMMARY_FILE).unlink(missing_ok=True)  # of a shorter search: its student goes away
    if best is not None:
        student, card = Student(plan=best.result.plan, model=best.student), model_card(context, summary)

        def fill(folder: Path) -> None:
            save_student(folder, student, context.teacher)
            write_text(folder / "README.md", card)

        replace_folder(run.path / "best", fill)
    write_report(run.path, make_report(context, findings, summary))
    write_json(run.path / SUMMARY_FILE, summary)
    journal.conclude(summary, frontier_of(findings.all_results))
    return summary
