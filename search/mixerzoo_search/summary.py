"""`summary.json`, the machine-readable result of a search. Latencies in ms, fractions in [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mixerzoo.latency import environment
from mixerzoo.score import Evaluation
from mixerzoo_search import exact
from mixerzoo_search.candidates import Candidates
from mixerzoo_search.context import Context
from mixerzoo_search.evaluate import PlanResult
from mixerzoo_search.finish import Outcome
from mixerzoo_search.fit_quality import spearman
from mixerzoo_search.pareto import hypervolume, non_dominated
from mixerzoo_search.report.content import PriorTable
from mixerzoo_search.timing import LatencyQuality

SCHEMA = 1
ROUNDING = 1e-6  # what a loss may be for equal answers, in float32


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What the phases found, for the summary and the report."""

    candidates: Candidates
    line: list[exact.Solution]
    latency_quality: LatencyQuality
    results: list[PlanResult]
    outcome: Outcome
    prior: PriorTable | None = None

    @property
    def all_results(self) -> list[PlanResult]:
        """Every true evaluation, the finalists' later forms too."""
        return [*self.results, *self.outcome.results]


def frontier_of(results: Sequence[PlanResult]) -> list[PlanResult]:
    """Return the results that no other one beats in both latency and loss, fastest first."""
    return [results[at] for at in non_dominated([(r.latency_ms, r.loss) for r in results])]


def plan_row(result: PlanResult, test: Evaluation | None = None) -> dict[str, Any]:
    """Return a result under the keys of the summary; with `test`, the figures on the test images."""
    judged: PlanResult | Evaluation = result if test is None else test
    return {
        "plan": result.plan.to_json(),
        "latency_ms": result.latency_ms,
        "predicted_ms": result.predicted_ms,
        "params": result.params,
        "accuracy": judged.accuracy,
        "agreement": judged.agreement,
        "loss": judged.loss,
    }


def _hypervolume(context: Context, results: Sequence[PlanResult]) -> float:
    """Return the area under the teacher's latency and the loss of a constant answer that the results dominate."""
    worst = context.study_judge.constant_loss()
    if worst < ROUNDING:  # the teacher answers the same for all study images: nothing can be told apart
        return 0.0
    return hypervolume([(r.latency_ms / context.teacher_ms, r.loss / worst) for r in results], (1.0, 1.0))


def summarize(context: Context, findings: Findings) -> dict[str, Any]:
    """Return the summary: the teacher and the winner on test images, the frontier on study images."""
    teacher, best, results = context.teacher, findings.outcome.best, findings.all_results
    tested, judged = None, None
    with context.reporter.phase("teacher and winner, on test images", 2) as report:
        judge = context.test_judge
        report(1)
        if best is not None:
            judged = judge.evaluate(best.student)
            tested = plan_row(best.result, judged)
        report(2)
    wall_s = context.run.wall_s()
    return {
        "schema": SCHEMA,
        "teacher": {
            "name": teacher.name,
            "sites": len(teacher.sites),
            "params": teacher.params,
            "latency_ms": context.teacher_ms,
            "accuracy": judge.teacher_evaluation().accuracy,
        },
        "budget_ms": context.budget_ms,
        "met": best is not None,
        "best": tested,
        "test": {
            "images": judge.images,
            "accuracy_interval": None
            if judged is None or judged.change_low is None
            else [judged.change_low, judged.change_high],
        },
        "pareto": [plan_row(result) for result in frontier_of(results)],
        "hypervolume": _hypervolume(context, results),
        "evaluations": len(results),
        "latency_model": findings.latency_quality.to_json(),
        "score_model": {
            "spearman": spearman(
                [r.predicted_loss for r in findings.results], [r.loss for r in findings.results]
            ),
            "plans": len(findings.results),
        },
        "finetuning": findings.outcome.finetuning,
        "wall_s": wall_s | {"total": sum(wall_s.values())},
        "environment": environment(context.stopwatch.conditions),
    }
