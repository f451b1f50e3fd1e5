"""The search, phase by phase. Every finished part is on disk before the next begins, so that it can go on."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mixerzoo.data import Dataset
from mixerzoo.errors import MixerzooError
from mixerzoo.files import write_json, write_text
from mixerzoo.hosts import Teacher, assemble
from mixerzoo.latency import REFERENCE, Conditions, Stopwatch, check_device, environment, threads
from mixerzoo.library import check_folder
from mixerzoo.plan import Plan
from mixerzoo.progress import Reporter
from mixerzoo.registry import get_registry
from mixerzoo.student import Student, save_student
from mixerzoo.tracking import Tracker
from mixerzoo_search import exact
from mixerzoo_search.additive import AdditiveModel
from mixerzoo_search.candidates import Candidates, list_candidates
from mixerzoo_search.context import Context
from mixerzoo_search.evaluate import FINAL, PlanResult
from mixerzoo_search.finish import finish
from mixerzoo_search.journal import Journal
from mixerzoo_search.report import write_report
from mixerzoo_search.results import make_report, model_card
from mixerzoo_search.run_directory import RunDirectory
from mixerzoo_search.scoring import Scored, additive, distill_closed_form, score, useful
from mixerzoo_search.settings import Settings
from mixerzoo_search.study import check_storage, evaluations, open_study, run_study
from mixerzoo_search.summary import Findings, frontier_of, summarize
from mixerzoo_search.timing import calibrate, demand_candidates, demand_reachable, latency_table

NAMED = 3  # unreadable images that are named on the terminal; `run.json` has them all
SWEEP = 12  # budgets of the exact frontier
NEAR = (1.0, 0.97, 0.94)  # times the budget: its own plans leave room for the error of the prediction


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """What a search returns: the run directory and the content of its `summary.json`."""

    path: Path
    summary: dict[str, Any]

    @property
    def best(self) -> Path:
        """Folder of the winning student, for `mixerzoo.load`."""
        return self.path / "best"


def run_search(
    settings: Settings,
    teacher: Teacher,
    data: Dataset,
    run: RunDirectory,
    *,
    reporter: Reporter,
    library: Path | None,
    storage: str | None,
    tracking_uri: str | None,
) -> SearchResult:
    """Check everything that can be checked, then run all phases and write the results.

    Raises:
        MixerzooError: for anything the user can mend; nothing is written then.
        BudgetOutOfReachError: if even the fastest plan is over the budget.
    """
    check_device(settings.device, settings.dtype)
    conditions = Conditions(
        batch_size=settings.batch_size,
        threads=settings.threads,
        dtype=settings.dtype,
        device=settings.device,
        runtime=settings.runtime,
    )
    stopwatch = Stopwatch(teacher, conditions)
    candidates = list_candidates(teacher.sites, mixers=settings.mixers, widths=settings.widths)
    demand_candidates(candidates, stopwatch.runtime)
    identity = settings.identity() | {
        "teacher_fingerprint": teacher.fingerprint[:16],
        "data_fingerprint": data.fingerprint[:16],
        "plugins": get_registry().versions(),
        "space": {site: [str(c) for c in row] for site, row in candidates.items()},
    }
    resumed = run.check(identity)
    library = run.library if library is None else library
    if library.resolve() == run.path.resolve():
        raise MixerzooError(f"run directory '{run.path}' is the library's; give another --out or --library")
    check_folder(library)
    if storage is not None:
        check_storage(storage)
    if data.skipped:
        reporter.note(
            f"data '{data.name}': {len(data.skipped)} images cannot be read and are left out "
            f"({', '.join(data.skipped[:NAMED])}{', ...' if len(data.skipped) > NAMED else ''})"
        )
    with threads(settings.threads):
        teacher_ms = run.record()["teacher_ms"] if resumed else _time_teacher(stopwatch)
        tracker = Tracker(tracking_uri, f"mixerzoo {teacher.name}")
        if resumed:
            run.note(library=run.name_of(library))
        else:
            run.start(
                identity,
                library=run.name_of(library),
                teacher_ms=teacher_ms,
                environment=environment(conditions),
                skipped_images=list(data.skipped),
                command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            )
        context = Context(
            settings=settings,
            teacher=teacher,
            data=data,
            run=run,
            reporter=reporter,
            stopwatch=stopwatch,
            teacher_ms=teacher_ms,
            budget_ms=settings.budget.in_ms(teacher_ms),
        )
        journal = Journal(tracker, run, settings, teacher)
        try:
            findings = _run_phases(context, candidates, journal, storage)
            summary = _write(context, findings, journal)
        except BaseException as error:
            journal.finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
            raise
        journal.finish("FINISHED")
    return SearchResult(path=run.path, summary=summary)


def _run_phases(context: Context, candidates: Candidates, journal: Journal, storage: str | None) -> Findings:
    run = context.run
    with run.timed("latency"):
        table = latency_table(context, candidates)
        demand_reachable(context, additive(context, candidates, table, {}))
    distilled = distill_closed_form(context, useful(context, candidates, table), table)
    with run.timed("score"):
        scored = score(context, distilled, table)
    context.release_activations()
    with run.timed("latency"):
        model, quality = calibrate(context, scored.model)
    with run.timed("exact"):
        line = _exact_plans(context, model)
    with run.timed("study"):
        results = _study(context, model, scored, [solution.plan for solution in line], journal, storage)
    with run.timed("finetune"):
        outcome = finish(context, results, model)
    for result in outcome.results:
        journal.log(result)
    return Findings(
        candidates=candidates,
        line=line,
        latency_quality=quality,
        results=results,
        outcome=outcome,
        prior=scored.prior_table,
    )


def _time_teacher(stopwatch: Stopwatch) -> float:
    again = {"again": assemble(stopwatch.teacher.model, {})}
    return stopwatch.time(again, rounds=FINAL)[REFERENCE].median


def _exact_plans(context: Context, model: AdditiveModel) -> list[exact.Solution]:
    """Solve for a sweep of budgets from the fastest plan to the teacher, and more plans near the budget."""
    fastest = model.predict_ms(model.fastest())
    sweep = np.linspace(fastest, context.teacher_ms, SWEEP + 1)[:-1].tolist()
    near = exact.frontier(model, [share * context.budget_ms for share in NEAR], per_budget=2)
    plans = {solution.plan: solution for solution in [*near, *exact.frontier(model, sweep)]}
    return sorted(plans.values(), key=lambda solution: solution.ms)


def _study(
    context: Context,
    model: AdditiveModel,
    scored: Scored,
    seeds: Sequence[Plan],
    journal: Journal,
    storage: str | None,
) -> list[PlanResult]:
    """Search the true loss and latency of stitched students."""
    settings = context.settings
    study = open_study(
        storage or f"sqlite:///{(context.run.path / 'study.db').resolve()}",
        context.run.path.name,
        model=model,
        prior=scored.prior,
        budget_ms=context.budget_ms,
        seed=settings.seed,
    )
    for result in evaluations(study):
        journal.log(result)  # what a killed process had evaluated and not yet logged
    with context.reporter.phase("true evaluations", settings.trials) as report:

        def on_result(result: PlanResult, done: int) -> None:
            journal.log(result)
            report(done)

        return run_study(
            study,
            lambda plan, source: context.evaluator.evaluate(plan, model, source=source),
            model=model,
            seeds=seeds,
            budget_ms=context.budget_ms,
            trials=settings.trials,
            minutes=settings.minutes,
            on_result=on_result,
        )


def _write(context: Context, findings: Findings, journal: Journal) -> dict[str, Any]:
    """Judge the winner on the test images; write the model, the report and, last, the summary."""
    run, best = context.run, findings.outcome.best
    summary = summarize(context, findings)
    for damaged in context.library.files.damaged:
        context.reporter.note(f"library: {damaged} was damaged and has been distilled again")
    if best is not None:
        save_student(run.path / "best", Student(plan=best.result.plan, model=best.student), context.teacher)
        write_text(run.path / "best" / "README.md", model_card(context, summary))
    write_report(run.path, make_report(context, findings, summary))
    write_json(run.path / "summary.json", summary)
    journal.conclude(summary, frontier_of(findings.all_results))
    return summary
