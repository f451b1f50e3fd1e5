"""Scores: the loss of the teacher with one site replaced, measured where it matters near the budget, else predicted."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from mixerzoo.latency import LatencyTable
from mixerzoo.plan import Candidate
from mixerzoo.progress import Report, beginning_at
from mixerzoo_search import exact
from mixerzoo_search.additive import AdditiveModel
from mixerzoo_search.candidates import Candidates, Damage, Pair
from mixerzoo_search.context import Context
from mixerzoo_search.prior import DamageForecast
from mixerzoo_search.prior_table import gather, prior_table, to_json
from mixerzoo_search.report.content import PriorTable
from mixerzoo_search.steps import HOPE, STEP_BUDGETS

AT_RANDOM = 0.1  # of the candidates that are scored before anything is known
HOPEFUL = HOPE  # times the predicted damage: what it may be, as well as what gradient steps may make of it
NEAR = (1.1, *STEP_BUDGETS)  # times the budget


def forecast(
    context: Context, candidates: Candidates, scores: Damage | None = None
) -> tuple[DamageForecast, PriorTable]:
    """Predict the damage of every candidate from its site's statistics, its error, and the scores so far.

    What is known and predicted is kept in `prior.json`, unless more was known there before.
    """
    table, found = prior_table(gather(context, candidates), scores or {})
    earlier = context.run.load("prior") or {}
    if earlier.get("scores", 0) <= table.overall.scores:
        context.run.store("prior", to_json(table))
    return found, table


def additive(context: Context, space: Candidates, table: LatencyTable, damage: Damage) -> AdditiveModel:
    """Return the additive model of a space; candidates without a damage count as harmless."""
    return AdditiveModel.from_scores(
        {
            site: {c: (damage.get((site, c), 0.0), table.change_ms[site][str(c)]) for c in row}
            for site, row in space.items()
        },
        base_ms=context.teacher_ms,
    )


def score_what_matters(
    context: Context, candidates: Candidates, space: Candidates, table: LatencyTable
) -> Damage:
    """Score a random share, then whatever exact plans near the budget hold if all others do half the damage predicted.

    It ends where these plans hold nothing without a score. What the run had scores of before counts, too.

    Args:
        context: the search.
        candidates: all that were distilled.
        space: those of them that plans may hold.
        table: latencies.
    """
    pairs = [(site, candidate) for site, row in space.items() for candidate in row]
    dice = np.random.default_rng([context.settings.seed, 2])
    wanted = {pair for pair in pairs if dice.random() < AT_RANDOM}
    scores: dict[Pair, float] = {}
    with context.reporter.phase("scores, one site replaced", len(wanted)) as report:
        while True:
            rows = rows_of(pair for pair in pairs if pair in wanted)
            report(len(scores), len(scores) + len(wanted))
            scores |= measure_scores(context, rows, beginning_at(len(scores), report))
            found, _ = forecast(context, candidates, scores)
            hopeful = {pair: HOPEFUL * found.damage[pair] for pair in pairs}
            model = additive(context, space, table, {**hopeful, **scores})
            wanted = _held(model, [share * context.budget_ms for share in NEAR]) - scores.keys()
            if not wanted:
                break
    known = context.run.load("scores") or {}  # those and what was taken over: the same after a kill
    entries = {pair: context.library.best(*pair) for pair in pairs}
    return measure_scores(
        context, rows_of(pair for pair, e in entries.items() if e is not None and e.key in known)
    )


def _held(model: AdditiveModel, budgets_ms: Iterable[float]) -> set[Pair]:
    """Return what the exact plans at some budgets hold; budgets that are out of reach have none."""
    found = (exact.solve(model, budget) for budget in budgets_ms)
    return {
        (site, candidate)
        for solution in found
        if solution is not None
        for site, candidate in solution.plan.choices
        if not candidate.is_keep
    }


def measure_scores(context: Context, space: Candidates, report: Report = lambda done: None) -> Damage:
    """Return the replace-one loss of every candidate with its best weights; kept by library key in `scores.json`.

    A loss that is not finite, as of a mixer that breaks down on these images, is null there and NaN here: such a
    candidate is in no plan.

    Args:
        context: the search.
        space: the candidates.
        report: shows progress.
    """
    known: dict[str, float | None] = context.run.load("scores") or {}
    best = {(site, c): context.library.best(site, c) for site, row in space.items() for c in row}
    entries = {pair: entry for pair, entry in best.items() if entry is not None}
    todo = [(pair, entry) for pair, entry in entries.items() if entry.key not in known]
    for done, ((site, candidate), entry) in enumerate(todo):
        module = context.evaluator.module(site, candidate)
        loss = context.score_judge.evaluate_modules({site: module}).loss
        known[entry.key] = loss if math.isfinite(loss) else None
        context.run.store("scores", known)
        report(done + 1)
    return {pair: _or_nan(known[entry.key]) for pair, entry in entries.items()}


def _or_nan(score: float | None) -> float:
    """Return a score as `scores.json` has it, NaN for null."""
    return math.nan if score is None else score


def rows_of(pairs: Iterable[Pair]) -> Candidates:
    """Return pairs as site -> candidates."""
    found: dict[str, tuple[Candidate, ...]] = {}
    for site, candidate in pairs:
        found[site] = (*found.get(site, ()), candidate)
    return found
