"""The latency phases: every candidate in place, the reach of the space, and the error of the additive model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mixerzoo.errors import BudgetOutOfReachError
from mixerzoo.hosts import assemble
from mixerzoo.latency import TABLE, LatencyTable, measure_table
from mixerzoo.plan import Plan
from mixerzoo.student import make_replacement
from mixerzoo_search.additive import AdditiveModel
from mixerzoo_search.candidates import Candidates
from mixerzoo_search.context import Context
from mixerzoo_search.fit_quality import mape, max_error, spearman

FIT_PLANS = 12  # random plans that the affine correction is fitted on
CHECK_PLANS = 24  # further ones that its error is measured on
TOGETHER = 6  # students that are timed in the same rounds


def latency_table(context: Context, candidates: Candidates) -> LatencyTable:
    """Time every candidate in place, on the scale of the teacher's latency in this run.

    A candidate that cannot run is named with its reason in `latency.json`, and takes for ever.
    """
    stored = context.run.load("latency")
    if stored is None:
        failed: dict[str, dict[str, str]] = {}
        with context.reporter.phase("latency of every candidate", TABLE.least) as report:
            try:
                measured = measure_table(context.stopwatch, candidates, on_round=report)
            except Exception:  # a plugin's mixer may raise anything: find out whose it was
                failed = _failures(context, candidates)
                if not any(failed.values()):
                    raise
                rest = {
                    site: tuple(c for c in row if str(c) not in failed[site])
                    for site, row in candidates.items()
                }
                measured = measure_table(context.stopwatch, rest, on_round=report)
        for candidate, reason in sorted({pair for row in failed.values() for pair in row.items()}):
            context.reporter.note(f"{candidate} cannot run, and is left out: {reason}")
        scale = context.teacher_ms / measured.base_ms
        stored = {
            "base_ms": context.teacher_ms,
            "change_ms": {
                site: {name: ms * scale for name, ms in row.items()}
                for site, row in measured.change_ms.items()
            },
            "failed": failed,
        }
        context.run.store("latency", stored)
    never = {site: dict.fromkeys(row, math.inf) for site, row in stored.get("failed", {}).items()}
    change_ms = {site: row | never.get(site, {}) for site, row in stored["change_ms"].items()}
    return LatencyTable(base_ms=stored["base_ms"], change_ms=change_ms)


def _failures(context: Context, candidates: Candidates) -> dict[str, dict[str, str]]:
    """Return, for each site, the candidates that cannot run there and the reasons."""
    failed: dict[str, dict[str, str]] = {site: {} for site in candidates}
    for site, row in candidates.items():
        for candidate in row:
            try:
                module = make_replacement(candidate, context.teacher.site(site))
                context.stopwatch.prepare(assemble(context.teacher.model, {site: module}))()
            except Exception as error:
                failed[site][str(candidate)] = " ".join(f"{type(error).__name__}: {error}".split())
    return failed


def demand_reachable(context: Context, model: AdditiveModel) -> None:
    """Build the plan that is fastest at every site, whatever its loss, and time it.

    Raises:
        BudgetOutOfReachError: if even it is over the budget; with its latency and what bounds it.
    """
    fastest = model.fastest()
    modules = {
        site: make_replacement(candidate, context.teacher.site(site))
        for site, candidate in fastest.choices
        if not candidate.is_keep
    }
    student = assemble(context.teacher.model, modules)
    ms = context.stopwatch.time({"fastest": student})["fastest"].ratio * context.teacher_ms
    if ms <= context.budget_ms:
        return
    kept = len(fastest.choices) - fastest.replaced()
    bound = (
        f"{kept} of the {len(fastest.choices)} sites have no candidate that is faster than the teacher's own module"
        if kept
        else "the rest is outside the sites (embedding, norms, head) and in the fastest mixers there are"
    )
    raise BudgetOutOfReachError(
        f"budget {context.settings.budget.label} ({context.budget_ms:.3g} ms) is out of reach: the fastest plan, "
        f"{fastest.short_name(context.teacher.sites, context.letters)}, takes {ms:.3g} ms of the teacher's "
        f"{context.teacher_ms:.3g} ms; {bound}; give at least --budget-ms {float(f'{ms * 1.1:.2g}'):g}"
    )


@dataclass(frozen=True, kw_only=True)
class LatencyQuality:
    """How well latencies are predicted on random plans that the prediction was not fitted on."""

    mape: float
    max_error: float
    spearman: float
    plans: int

    def to_json(self) -> dict[str, float]:
        """Return JSON-ready data."""
        return dict(vars(self))


def calibrate(context: Context, model: AdditiveModel) -> tuple[AdditiveModel, LatencyQuality]:
    """Fit the affine correction on some random plans, and measure its error on others."""
    stored: list[Mapping[str, object]] | None = context.run.load("latency_check")
    if stored is None:
        plans = random_plans(model, FIT_PLANS + CHECK_PLANS, seed=context.settings.seed)
        measured: list[float] = []
        with context.reporter.phase("latency of random students", len(plans)) as report:
            for first in range(0, len(plans), TOGETHER):
                part = plans[first : first + TOGETHER]
                evaluator = context.evaluator
                students = {
                    str(at): assemble(context.teacher.model, evaluator.modules(plan))
                    for at, plan in enumerate(part)
                }
                times = evaluator.latency(students)
                measured += [times[str(at)] for at in range(len(part))]
                report(first + len(part))
        stored = [
            {"plan": plan.to_json(), "latency_ms": ms} for plan, ms in zip(plans, measured, strict=True)
        ]
        context.run.store("latency_check", stored)
    pairs = [(Plan.from_json(row["plan"]), float(row["latency_ms"])) for row in stored]  # type: ignore[arg-type]
    fit, check = pairs[:FIT_PLANS], pairs[FIT_PLANS:]
    model = model.calibrated([model.additive_ms(plan) for plan, _ in fit], [ms for _, ms in fit])
    predicted, true = [model.predict_ms(plan) for plan, _ in check], [ms for _, ms in check]
    quality = LatencyQuality(
        mape=mape(predicted, true),
        max_error=max_error(predicted, true),
        spearman=spearman(predicted, true),
        plans=len(check),
    )
    return model, quality


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
