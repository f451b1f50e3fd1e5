"""From candidates to the additive model: distil, predict the damage, replace one site at a time and measure it.

Closed forms are cheap and made for every candidate that saves time. Gradient steps are spent where the scores
so far say that they can change the frontier.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mixerzoo.latency import LatencyTable
from mixerzoo.plan import Candidate
from mixerzoo.registry import get_registry
from mixerzoo.spec import KINDS
from mixerzoo_search import exact
from mixerzoo_search.additive import AdditiveModel
from mixerzoo_search.candidates import Candidates, Damage, beaten, faster_than_teacher, not_beaten
from mixerzoo_search.context import Context
from mixerzoo_search.fit_quality import spearman
from mixerzoo_search.prior import Clue, DamageForecast, Mixing, Prior, predict_damage

TOLERANCE = 0.002  # of the teacher's latency: changes below it are not told apart
UNIFORM_SHARE = 0.1  # of the candidates that the prior would leave out
PROBES = 2  # sites of a kind at which all candidates are distilled first
CLEARLY = 1.25  # times another one's held-out error, at the probes
STEPPED_PER_SITE = 1.5  # candidates that may get gradient steps
STEP_BUDGETS = (1.0, 0.9, 0.8)  # times the budget: whose exact plans say which candidates are worth steps
HARMLESS = 1e-4  # share of all damage below which a candidate needs no steps


@dataclass(frozen=True, kw_only=True)
class Scored:
    """The space with its scores.

    Attributes:
        model: scores and latencies.
        prior: which candidate is promising where.
        prior_quality: Spearman of predicted and measured damage, before any score and, left out one by one,
            with the others.
    """

    model: AdditiveModel
    prior: Prior
    prior_quality: dict[str, float]


def distill_closed_form(context: Context, candidates: Candidates, table: LatencyTable) -> Candidates:
    """Distil candidates in closed form, unless they are in the library; returns those that were distilled.

    All of them are distilled at two sites of each kind. What is clearly beaten at both, by another candidate that
    is as fast, goes no further: some mixers are too coarse, or too slow for what they give, for this teacher.
    """
    probes = _probes(context)
    first = {site: row for site, row in candidates.items() if site in probes}
    _make_closed(context, first, "closed-form candidates at a few sites")
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
    """Score the candidates that are not clearly beaten, give the best of them gradient steps, score those again."""
    context.library.stepped.clear()  # what is chosen now must not depend on an earlier start
    usable = {
        site: tuple(c for c in row if context.library.best(site, c) is not None)
        for site, row in candidates.items()
    }
    guess = forecast(context, usable)
    dice = np.random.default_rng(context.settings.seed)
    space = not_beaten(
        usable,
        guess.damage,
        table,
        keep_all_the_same=lambda: bool(dice.random() < UNIFORM_SHARE),
        tolerance_ms=TOLERANCE * context.teacher_ms,
    )
    scores = measure_scores(context, space, "scores, one site replaced")
    quality = {"before_scores": _agreement(guess.damage, scores)}
    steps = _worth_steps(context, additive(context, space, table, scores), scores)
    _make(
        context,
        [(s, c) for s, c in steps if context.library.find(s, c, stepped=True) is None],
        "gradient steps",
        stepped=True,
    )
    context.library.stepped.update(steps)
    scores = measure_scores(context, space, "scores after the steps")
    informed = forecast(context, space, scores)
    quality["left_out"] = informed.spearman
    context.run.store("prior", quality)
    model = additive(context, space, table, scores)
    return Scored(model=model, prior=_prior(context, model, informed), prior_quality=quality)


def useful(context: Context, candidates: Candidates, table: LatencyTable) -> Candidates:
    """Return the candidates that are faster than the teacher's own module."""
    return faster_than_teacher(candidates, table, tolerance_ms=TOLERANCE * context.teacher_ms)


def additive(context: Context, space: Candidates, table: LatencyTable, scores: Damage) -> AdditiveModel:
    """Return the additive model of a space; candidates without a score count as harmless."""
    return AdditiveModel.from_scores(
        {
            site: {c: (scores.get((site, c), 0.0), table.change_ms[site][str(c)]) for c in row}
            for site, row in space.items()
        },
        base_ms=context.teacher_ms,
    )


def forecast(context: Context, candidates: Candidates, scores: Damage | None = None) -> DamageForecast:
    """Predict the damage of every candidate from its site's statistics, its error, and the scores so far."""
    statistics, clues = context.statistics, []
    for site, row in candidates.items():
        for candidate in row:
            entry = context.library.best(site, candidate)
            clues.append(
                Clue(
                    site=site,
                    candidate=candidate,
                    statistics=statistics[site],
                    nmse=None if entry is None else entry.nmse,
                    kind=context.teacher.site(site).kind,
                    mixing=_mixing(candidate),
                )
            )
    return predict_damage(clues, scores)


def measure_scores(context: Context, space: Candidates, title: str) -> Damage:
    """Return the replace-one loss of every candidate with its best weights; kept by library key in `scores.json`."""
    known: dict[str, float] = context.run.load("scores") or {}
    best = {(site, c): context.library.best(site, c) for site, row in space.items() for c in row}
    entries = {pair: entry for pair, entry in best.items() if entry is not None}
    todo = [(pair, entry) for pair, entry in entries.items() if entry.key not in known]
    with context.reporter.phase(title, len(todo)) as report:
        for done, ((site, candidate), entry) in enumerate(todo):
            module = context.evaluator.module(site, candidate)
            known[entry.key] = context.score_judge.evaluate_modules({site: module}).loss
            context.run.store("scores", known)
            report(done + 1)
    return {pair: known[entry.key] for pair, entry in entries.items()}


def _worth_steps(context: Context, model: AdditiveModel, scores: Damage) -> list[tuple[str, Candidate]]:
    """Return what gets gradient steps: the candidates of the best plans near the budget, most harmful first.

    Decided once and kept in `stepped.json`, since the scores after the steps would decide differently.
    """
    if context.stepped is None:
        budgets = [context.budget_ms * share for share in STEP_BUDGETS]
        plans = [solution.plan for solution in exact.frontier(model, budgets, per_budget=2)]
        wanted = {(site, c) for plan in plans for site, c in plan.choices if not c.is_keep}
        harmful = sorted(wanted, key=lambda pair: (-scores[pair], pair[0], pair[1]))
        least = HARMLESS * sum(scores[pair] for pair in harmful)
        most = round(STEPPED_PER_SITE * len(model.sites)) if context.settings.distill_steps else 0
        chosen = [pair for pair in harmful if scores[pair] > least and _has_weights(context, *pair)][:most]
        context.run.store("stepped", [[site, str(candidate)] for site, candidate in chosen])
    return context.stepped or []


def _has_weights(context: Context, site: str, candidate: Candidate) -> bool:
    entry = context.library.best(site, candidate)
    return entry is not None and entry.params > 0


def _make(context: Context, todo: Sequence[tuple[str, Candidate]], title: str, *, stepped: bool) -> None:
    """Distil candidates. Those that another process is at come last: by then it may be done with them."""
    if not todo:
        return
    captured, done = context.captured, 0
    with context.run.timed("distill"), context.reporter.phase(title, len(todo)) as report:
        for wait in (False, True):
            others = []
            for site, candidate in todo:
                if context.library.make(site, candidate, captured, stepped=stepped, wait=wait) is None:
                    others.append((site, candidate))
                else:
                    done += 1
                    report(done)
            todo = others


def _prior(context: Context, model: AdditiveModel, informed: DamageForecast) -> Prior:
    keep = {(site, row[0]): 0.0 for site, row in zip(model.sites, model.candidates, strict=True)}
    prior = Prior.from_damage(dict(informed.damage) | keep)
    if context.settings.prior == "uniform":
        return prior.uniform()
    if context.settings.prior == "shuffled":
        return prior.shuffled(context.settings.seed)
    return prior


def _mixing(candidate: Candidate) -> Mixing:
    """Return how a mixer decides which token sees which, as far as its claims tell."""
    spec = get_registry().mixers.get(candidate.mixer)
    if spec.caps.per_token:
        return "none" if spec.readout is None else "token"
    return "content" if spec.caps.any_length else "static"


def _agreement(damage: Damage, measured: Damage) -> float:
    return spearman([damage[key] for key in measured], list(measured.values()))
