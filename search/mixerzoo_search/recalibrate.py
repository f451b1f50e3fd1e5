"""What measured students teach the additive model of latency: its affine correction again, and candidates that are off.

The sum over sites leaves out what stands beside a candidate: caches, and what a compiler fuses. Where enough students
were measured, a ridge regression of what is left says which candidates take more or less than when they stood alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixerzoo.latency import by_shape
from mixerzoo.plan import Candidate, Plan
from mixerzoo_search import exact
from mixerzoo_search.additive import AdditiveModel
from mixerzoo_search.context import Context
from mixerzoo_search.evaluate import PlanResult

Array = NDArray[np.float64]
PENALTIES = tuple(10.0 ** (step / 2) for step in range(-4, 7))
LEAST = 8  # measured students from which on candidates are corrected, and not only the line
BETTER = 0.97  # times the line's error, left out in turn: less is no reason to correct candidates
OUTLIER = 3.0  # times the spread of what the line leaves: students beyond count for less
NEAR = 0.25  # how far from a limit, relative to it, a student's latency may be to say how far off the model is there
FEW = 3  # such students, at least
ROOM = (1.0, 0.985, 0.97)  # times the limit: budgets that plans are solved for again


def recalibrated(
    model: AdditiveModel,
    results: Iterable[tuple[Plan, float]],
    *,
    shapes: Mapping[str, str] | None = None,
) -> AdditiveModel:
    """Return the model with its latencies corrected by measured students.

    First the line, robustly, on all of them; then a correction for each candidate, shared by the sites of one shape, by
    ridge regression of what the line leaves. The penalty is that of the lowest error when each student is left out in
    turn. Where no penalty does better than the line alone, the line it is.

    Args:
        model: the additive model.
        results: plans of its candidates, and their measured latency in ms. Of one measured more than once, the last
            counts.
        shapes: site -> what it shares corrections under; each site is on its own where it is not given.
    """
    measured = dict(results)
    plans = [plan for plan, ms in measured.items() if np.isfinite(ms)]
    truth = np.array([measured[plan] for plan in plans])
    additive = np.array([model.additive_ms(plan) for plan in plans])
    line = model.calibrated(additive.tolist(), truth.tolist())
    groups = _groups(model, shapes or {})
    if len(plans) < LEAST or not groups:
        return line
    counts = np.array([_counts(plan, groups, shapes or {}) for plan in plans], dtype=float)
    rest = truth - (line.intercept_ms + line.slope * additive)
    spread = 1.4826 * float(np.median(np.abs(rest))) or 1e-9 * model.base_ms
    weight = np.minimum(1.0, OUTLIER * spread / np.maximum(np.abs(rest), 1e-300))
    found = _ridge(counts, rest, weight)
    if found is None:
        return line
    offset, corrections = found
    change = dict(zip(groups, corrections / line.slope, strict=True))
    return replace(
        line,
        intercept_ms=line.intercept_ms + offset,
        latency_ms=tuple(
            tuple(
                ms if c.is_keep else ms + float(change[_group(site, c, shapes or {})])
                for c, ms in zip(row, latencies, strict=True)
            )
            for site, row, latencies in zip(model.sites, model.candidates, model.latency_ms, strict=True)
        ),
    )


def moved(model: AdditiveModel, results: Iterable[PlanResult], limit_ms: float) -> AdditiveModel:
    """Return the model moved by what it is off in the middle for the plans of a search that are near a limit.

    They are made of fewer kinds of parts than random plans, and need not take what those of the same sum do.
    """
    latest = {result.plan: result.latency_ms for result in results}
    off = [
        ms - model.predict_ms(plan) for plan, ms in latest.items() if abs(ms - limit_ms) <= NEAR * limit_ms
    ]
    if len(off) < FEW:
        return model
    return replace(model, intercept_ms=model.intercept_ms + float(np.median(off)))


Group = tuple[str, Candidate]


def _group(site: str, candidate: Candidate, shapes: Mapping[str, str]) -> Group:
    return shapes.get(site, site), candidate


def _groups(model: AdditiveModel, shapes: Mapping[str, str]) -> list[Group]:
    """Return what has a correction of its own, in the model's order."""
    found = {
        _group(site, c, shapes): None
        for site, row in zip(model.sites, model.candidates, strict=True)
        for c in row
        if not c.is_keep
    }
    return list(found)


def _counts(plan: Plan, groups: Sequence[Group], shapes: Mapping[str, str]) -> list[int]:
    """Return how often each candidate stands in a plan."""
    held = [_group(site, c, shapes) for site, c in plan.choices if not c.is_keep]
    return [held.count(group) for group in groups]


def _ridge(counts: Array, rest: Array, weight: Array) -> tuple[float, Array] | None:
    """Return (offset, a correction for each column), or None where the line alone predicts as well.

    The offset bears no penalty. A student left out is predicted from all the others: the residual over 1 - leverage.
    """
    root = np.sqrt(weight)
    design = np.column_stack([np.ones(len(rest)), counts]) * root[:, None]
    target = rest * root
    gram, moment = design.T @ design, design.T @ target
    scale = float(np.mean(np.diag(gram)[1:])) or 1.0
    free = np.ones(gram.shape[0])
    free[0] = 0.0
    mean = float(np.average(rest, weights=weight))
    # Leaving one out of a weighted mean moves it by its share of the weight.
    alone = (rest - mean) / np.maximum(1 - weight / weight.sum(), 1e-12)
    best, chosen = BETTER**2 * float(np.average(alone**2, weights=weight)), None
    for penalty in PENALTIES:
        inverse = np.linalg.inv(gram + penalty * scale * np.diag(free) + 1e-9 * scale * np.eye(len(free)))
        solution = inverse @ moment
        leverage = np.einsum("ij,jk,ik->i", design, inverse, design)
        left_out = (target - design @ solution) / np.maximum(1 - leverage, 1e-6)
        error = float(np.sum(left_out**2) / weight.sum())
        if error < best:
            best, chosen = error, solution
    return None if chosen is None else (float(chosen[0]), np.asarray(chosen[1:], dtype=float))


def shapes_of(context: Context) -> dict[str, str]:
    """Return site -> shape, of the teacher of a search."""
    return {site.name: shape for shape, group in by_shape(context.teacher.sites).items() for site in group}


def measured_plans(context: Context, results: Iterable[PlanResult]) -> list[tuple[Plan, float]]:
    """Return the measured students of a search that its model knows: the random ones, then the results."""
    random: list[dict[str, Any]] = context.run.load("latency_check") or []
    pairs = [(Plan.from_json(row["plan"]), float(row["latency_ms"])) for row in random]
    return pairs + [(result.plan, result.latency_ms) for result in results]


def solved_again(
    context: Context, model: AdditiveModel, results: Sequence[PlanResult], limit_ms: float
) -> tuple[AdditiveModel, list[PlanResult]]:
    """Correct the latencies by all that was measured, and evaluate the exact plans for a limit that are new.

    Decided once for a number of results and a limit, so that a resumed search takes the same.

    Args:
        context: the search.
        model: its additive model.
        results: all evaluations so far, with their latest latencies.
        limit_ms: what the plans shall take at most.

    Returns:
        the corrected model, and the evaluations of the plans that were not among the results.
    """
    model = recalibrated(model, measured_plans(context, results), shapes=shapes_of(context))
    model = moved(model, results, limit_ms)
    stored: dict[str, dict[str, Any]] = context.run.load("solved_again") or {}
    key = f"{len(results)} {limit_ms:.6g}"
    if key not in stored:
        seen = {result.plan for result in results}
        solutions = exact.frontier(model, [share * limit_ms for share in ROOM], per_budget=2)
        stored[key] = {"plans": [s.plan.to_json() for s in solutions if s.plan not in seen], "results": []}
        context.run.store("solved_again", stored)
    entry = stored[key]
    todo = [Plan.from_json(plan) for plan in entry["plans"]]
    with context.reporter.phase("plans solved again", len(todo)) as report:
        for plan in todo[len(entry["results"]) :]:
            result = context.evaluator.evaluate(plan, model, source="exact")
            entry["results"].append(result.to_json() if math.isfinite(result.loss) else None)
            context.run.store("solved_again", stored)
            report(len(entry["results"]))
    return model, [PlanResult.from_json(row) for row in entry["results"] if row is not None]
