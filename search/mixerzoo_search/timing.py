"""The latency phases: every candidate in place, the reach of the space, and the error of the additive model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from mixerzoo.errors import BudgetOutOfReachError, MixerzooError
from mixerzoo.hosts import Teacher, assemble
from mixerzoo.latency import LatencyTable, by_shape
from mixerzoo.latency.in_place import of_shapes
from mixerzoo.latency.reuse import Known, barred_at, know
from mixerzoo.latency.store import LatencyFile, code_of
from mixerzoo.plan import Candidate, Plan
from mixerzoo.progress import Report
from mixerzoo.spec import RuntimeSpec
from mixerzoo.student import make_replacement
from mixerzoo_search.additive import AdditiveModel
from mixerzoo_search.candidates import Candidates
from mixerzoo_search.context import Context
from mixerzoo_search.fit_quality import mape, max_error, spearman

FIT_PLANS = 12  # random plans that the affine correction is fitted on
CHECK_PLANS = 24  # further ones that its error is measured on
TOGETHER = 6  # students that are timed in the same rounds


def demand_candidates(candidates: Candidates, runtime: RuntimeSpec) -> None:
    """Raise MixerzooError if nothing of what there is can stand under a runtime."""
    barred = barred_at(runtime, candidates)
    if all(len(barred[site]) == len(row) for site, row in candidates.items()):
        names = sorted({candidate.mixer for row in candidates.values() for candidate in row})
        raise MixerzooError(
            f"no candidate for any site: runtime '{runtime.name}' needs mixers that claim 'exportable', not "
            f"{', '.join(names)}; see `mixerzoo mixers`"
        )


def latency_table(context: Context, candidates: Candidates) -> LatencyTable:
    """Return what each candidate changes, on the scale of the teacher's latency in this run.

    What the library has kept is taken if it still holds; the rest is timed in place, and so is what was timed with
    other code of its mixer. A candidate that cannot run is named with its reason in `latency.json`, and takes for ever.
    """
    stored: dict[str, Any] = context.run.load("latency") or {
        "base_ms": context.teacher_ms,
        "change_ms": {site: {} for site in candidates},
        "error_ms": {site: {} for site in candidates},
        "failed": {site: {} for site in candidates},
        "reused": 0,
        "measured": 0,
    }
    stored.setdefault("code", {site: {} for site in candidates})
    missing = _unknown(candidates, stored)
    if any(missing.values()):
        sites = context.teacher.sites
        known = know(
            context.stopwatch,
            of_shapes(sites, missing),
            LatencyFile(context.run.library, context.stopwatch),
            reporter=context.reporter,
        )
        table = LatencyTable.of(sites, known.placed, base_ms=stored["base_ms"])
        shapes = {site.name: shape for shape, group in by_shape(sites).items() for site in group}
        for site, row in missing.items():
            _forget(stored, site, row)
            failed = known.failed.get(shapes[site], {})
            ran = [str(c) for c in row if str(c) not in failed]
            stored["change_ms"][site] |= {text: table.change_ms[site][text] for text in ran}
            stored["error_ms"][site] |= {text: _finite(table.error_ms[site][text]) for text in ran}
            stored["failed"][site] |= {str(c): failed[str(c)] for c in row if str(c) in failed}
            stored["code"][site] |= {str(c): code_of(str(c)) for c in row}
        stored["reused"] += known.reused
        stored["measured"] += known.measured
        context.run.store("latency", stored)
        _tell(context, known)
    never = {site: dict.fromkeys(row, math.inf) for site, row in stored["failed"].items()}
    return LatencyTable(
        base_ms=stored["base_ms"],
        change_ms={site: row | never[site] for site, row in stored["change_ms"].items()},
        error_ms={
            site: {text: math.inf if ms is None else ms for text, ms in row.items()} | never[site]
            for site, row in stored["error_ms"].items()
        },
    )


def _unknown(candidates: Candidates, stored: Mapping[str, Any]) -> Candidates:
    return {
        site: tuple(c for c in row if stored["code"][site].get(str(c)) != code_of(str(c)))
        for site, row in candidates.items()
    }


def _forget(stored: Mapping[str, Any], site: str, row: Sequence[Candidate]) -> None:
    for part in ("change_ms", "error_ms", "failed"):
        for candidate in row:
            stored[part][site].pop(str(candidate), None)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _tell(context: Context, known: Known) -> None:
    if known.reused:
        context.reporter.note(
            f"latency: {known.reused} of {known.reused + known.measured} candidates are from the library's table, "
            "which still holds"
        )
    whose: dict[str, set[str]] = {}
    for row in known.failed.values():
        for candidate, reason in row.items():
            whose.setdefault(reason, set()).add(candidate)
    for reason, names in whose.items():
        verb = "is" if len(names) == 1 else "are"
        context.reporter.note(f"{', '.join(sorted(names))} cannot run, and {verb} left out: {reason}")


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
    timing = context.stopwatch.time({"fastest": student})["fastest"]
    ms = timing.ratio * context.teacher_ms
    if (
        ms * (1 - min(timing.error, 1.0)) <= context.budget_ms
    ):  # what is only uncertain is no reason to refuse
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

    @classmethod
    def of(cls, predicted: Sequence[float], measured: Sequence[float]) -> LatencyQuality:
        """Compare predicted and measured latencies of some plans."""
        return cls(
            mape=mape(predicted, measured),
            max_error=max_error(predicted, measured),
            spearman=spearman(predicted, measured),
            plans=len(measured),
        )


def calibrate(context: Context, model: AdditiveModel) -> tuple[AdditiveModel, LatencyQuality]:
    """Fit the affine correction on some random plans, and measure its error on others."""
    stored: list[Mapping[str, Any]] | None = context.run.load("latency_check")
    if stored is None:
        plans = random_plans(model, FIT_PLANS + CHECK_PLANS, seed=context.settings.seed)
        with context.reporter.phase("latency of random students", len(plans)) as report:
            measured = time_plans(
                plans, context.evaluator.modules, context.teacher, context.evaluator.latency, on_done=report
            )
        stored = [
            {"plan": plan.to_json(), "latency_ms": ms} for plan, ms in zip(plans, measured, strict=True)
        ]
        context.run.store("latency_check", stored)
    pairs = [(Plan.from_json(row["plan"]), float(row["latency_ms"])) for row in stored]
    fit, check = pairs[:FIT_PLANS], pairs[FIT_PLANS:]
    model = model.calibrated([model.additive_ms(plan) for plan, _ in fit], [ms for _, ms in fit])
    return model, LatencyQuality.of([model.predict_ms(plan) for plan, _ in check], [ms for _, ms in check])


def time_plans(
    plans: Sequence[Plan],
    modules: Callable[[Plan], Mapping[str, nn.Module]],
    teacher: Teacher,
    latency: Callable[[Mapping[str, nn.Module]], Mapping[str, float]],
    *,
    on_done: Report = lambda done: None,
) -> list[float]:
    """Stitch the plans' students, a few at a time, and return their latencies in ms."""
    measured: list[float] = []
    for first in range(0, len(plans), TOGETHER):
        part = plans[first : first + TOGETHER]
        times = latency({str(at): assemble(teacher.model, modules(plan)) for at, plan in enumerate(part)})
        measured += [times[str(at)] for at in range(len(part))]
        on_done(len(measured))
    return measured


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
