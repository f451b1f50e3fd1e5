"""How far sums over sites predict the latency of whole students: random plans, assembled and timed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from mixerzoo.errors import MixerzooError
from mixerzoo.latency import REFERENCE, LatencyTable, Stopwatch
from mixerzoo.plan import Plan
from mixerzoo.progress import Reporter
from mixerzoo.student import make_replacement
from mixerzoo_search.additive import AdditiveModel
from mixerzoo_search.candidates import Candidates, faster_than_teacher
from mixerzoo_search.evaluate import TRIAL
from mixerzoo_search.scoring import TOLERANCE
from mixerzoo_search.timing import FIT_PLANS, LatencyQuality, random_plans, time_plans

LEAST = 3  # plans, for a rank correlation to say anything


@dataclass(frozen=True, kw_only=True)
class Check:
    """The error of the additive prediction, on plans that nothing was fitted on.

    Attributes:
        plain: as it is.
        corrected: after one affine correction, fitted on `fitted_on` other plans.
        intercept_ms: of the correction.
        slope: of the correction.
        fitted_on: number of the other plans.
        rows: each plan with its additive, corrected and measured latency in ms.
    """

    plain: LatencyQuality
    corrected: LatencyQuality
    intercept_ms: float
    slope: float
    fitted_on: int
    rows: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        return {
            "plain": self.plain.to_json(),
            "corrected": self.corrected.to_json(),
            "intercept_ms": self.intercept_ms,
            "slope": self.slope,
            "fitted_on": self.fitted_on,
            "rows": self.rows,
        }


def check_table(
    stopwatch: Stopwatch,
    candidates: Candidates,
    table: LatencyTable,
    *,
    plans: int,
    seed: int,
    reporter: Reporter,
    fit: int = FIT_PLANS,
) -> Check:
    """Measure random plans, and compare them with the sums over their sites.

    The plans hold the candidates that save time, as a search's do, with fresh weights.

    Args:
        stopwatch: the teacher and the conditions.
        candidates: site -> candidates.
        table: their latencies.
        plans: how many plans to compare on.
        seed: of the plans.
        reporter: shows progress.
        fit: how many further ones to fit the correction on.

    Raises:
        MixerzooError: for too few plans, or if no candidate saves time.
    """
    if plans < LEAST:
        raise MixerzooError(f"--check {plans}: give at least {LEAST} plans")
    ran = {site: tuple(c for c in row if str(c) in table.change_ms[site]) for site, row in candidates.items()}
    useful = faster_than_teacher(ran, table, tolerance_ms=TOLERANCE * table.base_ms)
    if not any(useful.values()):
        raise MixerzooError(
            "--check: no candidate is faster than the teacher's own module; give other --mixers"
        )
    model = AdditiveModel.from_scores(
        {site: {c: (0.0, table.change_ms[site][str(c)]) for c in row} for site, row in useful.items()},
        base_ms=table.base_ms,
    )
    teacher = stopwatch.teacher
    drawn = random_plans(model, fit + plans, seed=seed)

    def modules(plan: Plan) -> dict[str, nn.Module]:
        return {
            site: make_replacement(candidate, teacher.site(site))
            for site, candidate in plan.choices
            if not candidate.is_keep
        }

    def latency(students: Mapping[str, nn.Module]) -> dict[str, float]:
        timings = stopwatch.time(students, rounds=TRIAL)
        return {name: table.base_ms * t.ratio for name, t in timings.items() if name != REFERENCE}

    with reporter.phase("latency of random students", len(drawn)) as report:
        measured = time_plans(drawn, modules, teacher, latency, on_done=report)
    additive = [model.additive_ms(plan) for plan in drawn]
    model = model.calibrated(additive[:fit], measured[:fit])
    corrected = [model.predict_ms(plan) for plan in drawn]
    return Check(
        plain=LatencyQuality.of(additive[fit:], measured[fit:]),
        corrected=LatencyQuality.of(corrected[fit:], measured[fit:]),
        intercept_ms=model.intercept_ms,
        slope=model.slope,
        fitted_on=fit,
        rows=[
            {"plan": plan.to_json(), "additive_ms": plain, "corrected_ms": better, "measured_ms": ms}
            for plan, plain, better, ms in list(zip(drawn, additive, corrected, measured, strict=True))[fit:]
        ],
    )
