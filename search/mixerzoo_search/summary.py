"""`summary.json`, the machine-readable result of a search. Latencies in ms, fractions in [0, 1]."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mixerzoo.hosts import Teacher
from mixerzoo.score import Evaluation, Judge, output_loss
from mixerzoo_search.evaluate import PlanResult
from mixerzoo_search.fit_quality import spearman
from mixerzoo_search.pareto import hypervolume, non_dominated

SCHEMA = 1


def frontier_of(results: Sequence[PlanResult]) -> list[PlanResult]:
    """Return the results that no other one beats in both latency and loss, fastest first."""
    return [results[at] for at in non_dominated([(r.latency_ms, r.loss) for r in results])]


def constant_loss(judge: Judge, *, classifier: bool) -> float:
    """Return the loss of a student that answers the same for every image: the worst to be expected."""
    target = judge.target
    if classifier:
        constant = target.softmax(-1).mean(0, keepdim=True).clamp_min(1e-12).log()
    else:
        constant = target.mean(0, keepdim=True)
    return float(output_loss(constant.expand_as(target), target, classifier=classifier).mean())


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


def summarize(
    *,
    teacher: Teacher,
    teacher_ms: float,
    teacher_test: Evaluation,
    budget_ms: float,
    best: PlanResult | None,
    best_test: Evaluation | None,
    results: Sequence[PlanResult],
    worst_loss: float,
    latency_model: Mapping[str, float],
    wall_s: Mapping[str, float],
    environment: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the summary.

    Args:
        teacher: the teacher.
        teacher_ms: its latency.
        teacher_test: its figures on the test images.
        budget_ms: the budget.
        best: the winner, or None if none met the budget when measured again.
        best_test: its figures on the test images.
        results: every true evaluation, on the validation images.
        worst_loss: of a constant answer; with the teacher's latency, the reference of the hypervolume.
        latency_model: error of the predicted latency on random plans.
        wall_s: phase -> seconds.
        environment: of the measurements.
    """
    points = [(r.latency_ms / teacher_ms, r.loss / worst_loss) for r in results]
    stitched = [r for r in results if r.source in ("exact", "sampler")]
    return {
        "schema": SCHEMA,
        "teacher": {
            "name": teacher.name,
            "sites": len(teacher.sites),
            "params": teacher.params,
            "latency_ms": teacher_ms,
            "accuracy": teacher_test.accuracy,
        },
        "budget_ms": budget_ms,
        "met": best is not None,
        "best": None if best is None else plan_row(best, best_test),
        "pareto": [plan_row(result) for result in frontier_of(results)],
        "hypervolume": hypervolume(points, (1.0, 1.0)),
        "evaluations": len(results),
        "latency_model": dict(latency_model),
        "score_model": {
            "spearman": spearman([r.predicted_loss for r in stitched], [r.loss for r in stitched]),
            "plans": len(stitched),
        },
        "wall_s": dict(wall_s) | {"total": sum(wall_s.values())},
        "environment": dict(environment),
    }


def labels_tensor(labels: torch.Tensor | None, *, classifier: bool) -> torch.Tensor | None:
    """Return the labels if they can be compared with the teacher's answers."""
    return labels if classifier else None
