"""From candidates to the additive model: distil, predict the damage, replace one site at a time and measure it.

Closed forms are cheap and made for every candidate that saves time. Gradient steps are spent where the scores
so far say that they can change the frontier (`steps.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mixerzoo.latency import LatencyTable
from mixerzoo.plan import Candidate
from mixerzoo.spec import KINDS
from mixerzoo_search.additive import AdditiveModel
from mixerzoo_search.candidates import (
    Candidates,
    Damage,
    Pair,
    beaten,
    faster_than_teacher,
    not_beaten,
    wider_widths,
)
from mixerzoo_search.context import Context
from mixerzoo_search.making import make_all
from mixerzoo_search.prior import DamageForecast, Prior
from mixerzoo_search.report.content import PriorTable
from mixerzoo_search.scores import additive, forecast, measure_scores, rows_of, score_what_matters
from mixerzoo_search.steps import next_steps, trainable

TOLERANCE = 0.002  # of the teacher's latency: changes below it are not told apart
UNIFORM_SHARE = 0.1  # of the candidates that the prior would leave out
PROBES = 2  # sites of a kind at which all candidates are distilled first
CLEARLY = 1.25  # times another one's held-out error, at the probes


@dataclass(frozen=True, kw_only=True)
class Scored:
    """The space with its scores.

    Attributes:
        model: scores, or what is predicted where none was measured, and latencies.
        prior: which candidate is promising where.
        prior_table: what it predicts for every candidate, and what was measured.
    """

    model: AdditiveModel
    prior: Prior
    prior_table: PriorTable


def distill_closed_form(context: Context, candidates: Candidates, table: LatencyTable) -> Candidates:
    """Distil candidates in closed form, unless they are in the library; returns those that were distilled.

    All of them are distilled at two sites of each kind. What is clearly beaten at both, by another candidate that
    is as fast, goes no further: some mixers are too coarse, or too slow for what they give, for this teacher.
    """
    forecast(context, candidates)
    probes = _probes(context)
    first = {site: row for site, row in candidates.items() if site in probes}
    _make_closed(context, first, "closed-form candidates at a few sites")
    forecast(context, candidates)
    chosen = {**first, **_promising(context, candidates, first, table)}
    _make_closed(context, chosen, "closed-form candidates")
    return {site: chosen[site] for site in candidates}


def _make_closed(context: Context, candidates: Candidates, title: str) -> None:
    todo = [
        (site, candidate)
        for site, row in candidates.items()
        for candidate in row
        if context.library.find(site, candidate, stepped=False) is None
    ]
    _make(context, todo, title, stepped=False)


def _probes(context: Context) -> set[str]:
    """Return two sites of each kind, a third and two thirds of the way through; all of them if there are few."""
    found: set[str] = set()
    for kind in KINDS:
        sites = [site.name for site in context.teacher.sites if site.kind == kind]
        few = len(sites) <= PROBES + 1
        found.update(sites if few else (sites[len(sites) // 3], sites[2 * len(sites) // 3]))
    return found


def _promising(
    context: Context, candidates: Candidates, probed: Candidates, table: LatencyTable
) -> Candidates:
    """Return, for the other sites, what is not clearly beaten at the probes of their kind, and a random share."""
    library, teacher = context.library, context.teacher
    error = {
        (site, c): entry.nmse
        for site, row in probed.items()
        for c in row
        if (entry := library.find(site, c, stepped=False)) is not None
    }
    dice = np.random.default_rng([context.settings.seed, 1])
    tolerance_ms = TOLERANCE * context.teacher_ms
    hopeless: dict[str, set[Candidate]] = {}
    for kind in KINDS:
        rows = {site: row for site, row in probed.items() if teacher.site(site).kind == kind}
        every = sorted({c for row in rows.values() for c in row}, key=str)
        hopeless[kind] = {
            c
            for c in every
            if all(
                beaten(site, c, row, error, table, margin=CLEARLY, tolerance_ms=tolerance_ms)
                for site, row in rows.items()
                if c in row
            )
            and dice.random() >= UNIFORM_SHARE
        }
    return {
        site: tuple(c for c in row if c not in hopeless[teacher.site(site).kind])
        for site, row in candidates.items()
        if site not in probed
    }


def score(context: Context, candidates: Candidates, table: LatencyTable) -> Scored:
    """Score what could be in the best plans near the budget, give some of it gradient steps, score that again."""
    context.library.stepped.clear()  # what is chosen now must not depend on an earlier start
    usable = {
        site: tuple(c for c in row if context.library.best(site, c) is not None)
        for site, row in candidates.items()
    }
    guess, _ = forecast(context, usable)
    dice = np.random.default_rng(context.settings.seed)
    space = not_beaten(
        usable,
        guess.damage,
        table,
        keep_all_the_same=lambda: bool(dice.random() < UNIFORM_SHARE),
        tolerance_ms=TOLERANCE * context.teacher_ms,
    )
    scores = score_what_matters(context, usable, space, table)
    scores = take_steps(context, usable, space, table, scores)
    informed, prior_table = forecast(context, usable, scores)
    # Scores last: one that is not finite keeps its candidate out of every plan.
    model = additive(context, space, table, {**informed.damage, **scores})
    return Scored(model=model, prior=_prior(context, model, informed), prior_table=prior_table)


def useful(context: Context, candidates: Candidates, table: LatencyTable) -> Candidates:
    """Return the candidates that are faster than the teacher's own module."""
    return faster_than_teacher(candidates, table, tolerance_ms=TOLERANCE * context.teacher_ms)


def take_steps(
    context: Context, candidates: Candidates, space: Candidates, table: LatencyTable, closed: Damage
) -> Damage:
    """Give gradient steps to what they can bring into the best plans; return the scores after them.

    In rounds, until nothing can gain or the limit of minutes or candidates is reached. What a round chooses is kept in
    `stepped.json` before it is made, since the scores after the steps would choose differently. Where the score is
    worse after them, the closed form goes on to count.

    Args:
        context: the search.
        candidates: all that were distilled.
        space: those of them that plans may hold.
        table: latencies.
        closed: scores of closed forms.
    """
    stored = context.run.load("stepped")
    if stored is None:
        stored = {"done": not context.settings.distill_steps, "chosen": [], "worse": []}
        context.run.store("stepped", stored)
    chosen = [(site, Candidate.parse(text)) for site, text in stored["chosen"]]
    chosen = [pair for pair in chosen if pair in closed]  # an edited plugin may have left some of them behind
    finite = [pair for pair in closed if math.isfinite(closed[pair])]
    able = [] if stored["done"] else trainable(context, finite)
    while True:
        context.library.wider = wider_widths(chosen)
        _make(
            context,
            [(s, c) for s, c in chosen if context.library.find(s, c, stepped=True) is None],
            "gradient steps",
            stepped=True,
        )
        context.library.stepped.update(chosen)
        with context.reporter.phase("scores after the steps", len(chosen)) as report:
            scores = {**closed, **measure_scores(context, rows_of(chosen), report)}
        # A lower error at the site is not always a lower loss of the teacher with it.
        worse = [pair for pair in chosen if not scores[pair] <= closed[pair]]
        context.library.stepped.difference_update(worse)
        scores |= {pair: closed[pair] for pair in worse}
        if stored["done"]:
            return scores
        informed, _ = forecast(context, candidates, scores)
        model = additive(context, space, table, {**informed.damage, **scores})
        more = next_steps(context, model, able, chosen, closed, scores)
        chosen += more
        stored = {"done": not more, "chosen": _texts(chosen), "worse": _texts(worse)}
        context.run.store("stepped", stored)


def _texts(pairs: Sequence[Pair]) -> list[list[str]]:
    return [[site, str(candidate)] for site, candidate in pairs]


def _make(context: Context, todo: Sequence[tuple[str, Candidate]], title: str, *, stepped: bool) -> None:
    """Distil candidates, in several processes where that pays."""
    if not todo:
        return
    captured = context.captured
    with context.run.timed("distill"), context.reporter.phase(title, len(todo)) as report:
        make_all(context.library, todo, captured, stepped=stepped, on_made=report)


def _prior(context: Context, model: AdditiveModel, informed: DamageForecast) -> Prior:
    prior = Prior.from_damage(
        {
            (site, c): 0.0 if c.is_keep else informed.damage[site, c]
            for site, row in zip(model.sites, model.candidates, strict=True)
            for c in row
        }
    )
    if context.settings.prior == "uniform":
        return prior.uniform()
    if context.settings.prior == "shuffled":
        return prior.shuffled(context.settings.seed)
    return prior
