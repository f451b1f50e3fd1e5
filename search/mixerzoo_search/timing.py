"""The latency phases: every candidate in place, the reach of the space, and the error of the additive model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mixerzoo.errors import BudgetOutOfReachError, MixerzooError
from mixerzoo.hosts import assemble
from mixerzoo.latency import TABLE, LatencyTable, by_shape, measure_table, place_many
from mixerzoo.plan import Plan
from mixerzoo.registry import get_registry
from mixerzoo.spec import RuntimeSpec
from mixerzoo.student import make_replacement
from mixerzoo_search.additive import AdditiveModel
from mixerzoo_search.candidates import Candidates
from mixerzoo_search.context import Context
from mixerzoo_search.fit_quality import mape, max_error, spearman

FIT_PLANS = 12  # random plans that the affine correction is fitted on
CHECK_PLANS = 24  # further ones that its error is measured on
TOGETHER = 6  # students that are timed in the same rounds
PREPARED = 8  # candidates that are, and so are there at once, prepared to run


def demand_candidates(candidates: Candidates, runtime: RuntimeSpec) -> None:
    """Raise MixerzooError if nothing of what there is can stand under a runtime."""
    barred = barred_by(runtime, candidates)
    if all(len(barred[site]) == len(row) for site, row in candidates.items()):
        names = sorted({candidate.mixer for row in candidates.values() for candidate in row})
        raise MixerzooError(
            f"no candidate for any site: runtime '{runtime.name}' needs mixers that claim 'exportable', not "
            f"{', '.join(names)}; see `mixerzoo mixers`"
        )


def barred_by(runtime: RuntimeSpec, candidates: Candidates) -> dict[str, dict[str, str]]:
    """Return, for each site, the candidates that do not claim what a runtime needs, with that reason.

    They are known without trying: each try can take minutes.
    """
    reason = f"it does not claim 'exportable', and runtime '{runtime.name}' needs that"
    shelf = get_registry().mixers
    return {
        site: {str(c): reason for c in row if runtime.needs_export and not shelf.get(c.mixer).caps.exportable}
        for site, row in candidates.items()
    }


def latency_table(context: Context, candidates: Candidates) -> LatencyTable:
    """Time every candidate in place, on the scale of the teacher's latency in this run.

    A candidate that cannot run is named with its reason in `latency.json`, and takes for ever. A few candidates are
    timed at once, then stored and let go of: some runtimes take seconds to prepare a student, and copy its weights.
    """
    stored: dict[str, Any] = context.run.load("latency") or {
        "base_ms": context.teacher_ms,
        "change_ms": {site: {} for site in candidates},
        "failed": barred_by(context.stopwatch.runtime, candidates),
    }
    parts = _parts(_unmeasured(candidates, stored))
    if parts:
        with context.reporter.phase("latency of every candidate", TABLE.least * len(parts)) as report:
            for number, part in enumerate(parts):

                def on_round(done: int, before: int = TABLE.least * number) -> None:
                    report(before + done)

                change_ms, failed = _measure(context, part, on_round)
                for site in part:
                    stored["change_ms"][site] |= change_ms[site]
                    stored["failed"][site] |= failed.get(site, {})
                context.run.store("latency", stored)
        _tell(context, stored["failed"])
    never = {site: dict.fromkeys(row, math.inf) for site, row in stored["failed"].items()}
    change_ms = {site: row | never[site] for site, row in stored["change_ms"].items()}
    return LatencyTable(base_ms=stored["base_ms"], change_ms=change_ms)


def _unmeasured(candidates: Candidates, stored: Mapping[str, Any]) -> Candidates:
    known = {site: {*stored["change_ms"][site], *stored["failed"][site]} for site in candidates}
    return {site: tuple(c for c in row if str(c) not in known[site]) for site, row in candidates.items()}


def _parts(candidates: Candidates) -> list[Candidates]:
    """Divide candidates into parts of a few, each at all of its sites."""
    every = list(dict.fromkeys(c for row in candidates.values() for c in row))
    parts = [every[first : first + PREPARED] for first in range(0, len(every), PREPARED)]
    return [{site: tuple(c for c in row if c in part) for site, row in candidates.items()} for part in parts]


def _measure(
    context: Context, candidates: Candidates, on_round: Callable[[int], None]
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, str]]]:
    """Return what each candidate changes, in ms, and the candidates that cannot run, with the reasons."""
    failed: dict[str, dict[str, str]] = {}
    try:
        measured = measure_table(context.stopwatch, candidates, on_round=on_round)
    except Exception:  # a plugin's mixer may raise anything: find out whose it was
        failed = _failures(context, candidates)
        if not any(failed.values()):
            raise
        rest = {site: tuple(c for c in row if str(c) not in failed[site]) for site, row in candidates.items()}
        measured = measure_table(context.stopwatch, rest, on_round=on_round)
    scale = context.teacher_ms / measured.base_ms
    return {
        site: {name: ms * scale for name, ms in row.items()} for site, row in measured.change_ms.items()
    }, failed


def _failures(context: Context, candidates: Candidates) -> dict[str, dict[str, str]]:
    """Return, for each site, the candidates that cannot run there and the reasons; a try for each shape of site."""
    failed: dict[str, dict[str, str]] = {site: {} for site in candidates}
    for sites in by_shape(context.teacher.sites).values():
        for candidate in candidates.get(sites[0].name, ()):
            try:
                student = assemble(context.teacher.model, place_many(candidate, sites))
                context.stopwatch.prepare(student)()
            except Exception as error:
                kind = "" if isinstance(error, MixerzooError) else f"{type(error).__name__}: "
                reason = " ".join(f"{kind}{error}".split())
                for site in sites:
                    failed[site.name][str(candidate)] = reason
    return failed


def _tell(context: Context, failed: Mapping[str, Mapping[str, str]]) -> None:
    whose: dict[str, set[str]] = {}
    for row in failed.values():
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
