"""Which candidates get gradient steps: those that could enter the best plans near the budget if steps went well.

Steps lower a candidate's damage by a factor that is not known before. If even a hopeful one leaves the exact plans
near the budget as they are, they are spent for nothing. Candidates are chosen in rounds: what steps did in one says
what to hope for in the next.
"""

from __future__ import annotations

import heapq
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mixerzoo.plan import Candidate
from mixerzoo.registry import get_registry
from mixerzoo_search import exact
from mixerzoo_search.additive import AdditiveModel
from mixerzoo_search.candidates import Damage, Pair
from mixerzoo_search.context import Context

STEPPED_PER_SITE = 1.5  # candidates that may get steps, unless there is a limit of minutes
ROUND = 0.25  # candidates a site that get steps in one round, before what they did is looked at
STEP_BUDGETS = (1.0, 0.9, 0.8)  # times the budget: what is near it, since latencies are predictions
# In four searches on the embedded teacher and on DINOv2-S, 60 steps multiplied scores by .41 to 1.5, by .62 to .93 in
# the median; one candidate in fifteen came below .5. Readouts were solved at five checks only then.
HOPE = 0.5
ENOUGH = 3  # measured effects on candidates of a mixer after which they alone say what to hope for
LEAST_GAIN = 1e-3  # of a plan's loss, below which the predictions of plans are not worth steps
STEPS_PER_SOLVE = 10.0  # seconds of steps for a second of the closed form, until there are measured ones
PRICES = 384  # of a millisecond, at which the bound on what a candidate could gain is computed


@dataclass(frozen=True, kw_only=True)
class Effect:
    """What steps did to one candidate.

    Attributes:
        candidate: the candidate.
        before: its score as it was solved in closed form.
        after: its score with the better weights.
        solve_s: seconds of the closed form.
        steps_s: seconds of the steps.
    """

    candidate: Candidate
    before: float
    after: float
    solve_s: float
    steps_s: float

    @property
    def factor(self) -> float:
        """What its damage was multiplied by."""
        return self.after / self.before if self.before > 0 else 1.0


def trainable(context: Context, pairs: Iterable[Pair]) -> list[Pair]:
    """Return the candidates that have something for steps to train: more than the readout, which is solved."""
    shelf, found = get_registry().mixers, []
    for site, candidate in pairs:
        spec = shelf.get(candidate.mixer)
        mixer = spec.outline(context.teacher.site(site), candidate.width)
        solved = set() if spec.readout is None else set(mixer.get_submodule(spec.readout).parameters())
        if any(parameter not in solved for parameter in mixer.parameters()):
            found.append((site, candidate))
    return found


def next_steps(
    context: Context,
    model: AdditiveModel,
    able: Sequence[Pair],
    chosen: Sequence[Pair],
    closed: Damage,
    scores: Damage,
) -> list[Pair]:
    """Return what gets gradient steps next.

    Seconds count as they are in the library, also where another search has spent them: what is chosen must not depend
    on that. They only decide where minutes are limited, since they are never the same twice.

    Args:
        context: the search.
        model: the scores so far, and latencies.
        able: what may get steps.
        chosen: what has got steps.
        closed: scores of the closed forms.
        scores: scores so far.
    """
    solve_s = {pair: _seconds(context, pair, stepped=False) for pair in able}
    steps_s = {pair: _seconds(context, pair, stepped=True) for pair in chosen}
    effects = [
        Effect(
            candidate=pair[1],
            before=closed[pair],
            after=scores[pair],
            solve_s=solve_s[pair],
            steps_s=steps_s[pair],
        )
        for pair in chosen
    ]
    factors = {pair: hope(effects, pair[1].mixer) for pair in able if pair not in steps_s}
    most = max(2, round(ROUND * len(model.sites)))
    minutes = context.settings.distill_minutes
    budgets = [context.budget_ms * share for share in STEP_BUDGETS]
    harmless = context.score_judge.harmless_loss()
    if minutes is None:
        most = min(most, round(STEPPED_PER_SITE * len(model.sites)) - len(chosen))
        return [] if most <= 0 else next_round(model, budgets, factors, None, most=most, harmless=harmless)
    left_s = 60 * minutes - sum(steps_s.values())
    if left_s <= 0:
        return []
    seconds = {pair: seconds_of_steps(effects, pair[1], solve_s[pair]) for pair in factors}
    more = next_round(model, budgets, factors, seconds, most=most, harmless=harmless)
    while len(more) > 1 and sum(seconds[pair] for pair in more) > left_s:
        more.pop()
    return more


def _seconds(context: Context, pair: Pair, *, stepped: bool) -> float:
    entry = context.library.find(*pair, stepped=stepped)
    return 0.0 if entry is None else entry.seconds


def hope(effects: Sequence[Effect], mixer: str) -> float:
    """Return the factor, in [0, 1], by which steps may lower the damage of a mixer's candidates.

    The lowest that was measured for this mixer; with few such measurements `HOPE`, if that is lower.
    """
    seen = [effect.factor for effect in effects if effect.candidate.mixer == mixer]
    if len(seen) < ENOUGH:
        seen.append(HOPE)
    return min(1.0, max(0.0, min(seen)))


def seconds_of_steps(effects: Sequence[Effect], candidate: Candidate, solve_s: float) -> float:
    """Predict the seconds of a candidate's steps.

    The median of those of the same candidate at other sites; else the seconds of its closed form, times what steps
    took for each of these so far.
    """
    same = [effect.steps_s for effect in effects if effect.candidate == candidate]
    if same:
        return statistics.median(same)
    ratios = [effect.steps_s / effect.solve_s for effect in effects if effect.solve_s > 0]
    return solve_s * (statistics.median(ratios) if ratios else STEPS_PER_SOLVE)


def next_round(
    model: AdditiveModel,
    budgets_ms: Sequence[float],
    factors: Mapping[Pair, float],
    seconds: Mapping[Pair, float] | None,
    *,
    most: int,
    harmless: float = 0.0,
) -> list[Pair]:
    """Return up to `most` candidates that steps could bring into the exact plans, at most one a site.

    A candidate's gain is the share of loss that the exact plan would lose if its damage were multiplied by its
    factor, averaged over the budgets. It has to be `LEAST_GAIN` at least.

    Args:
        model: scores and latencies.
        budgets_ms: budgets near the one asked for.
        factors: the candidates that may get steps.
        seconds: of their steps, to have the highest gain for a second first; None for the highest gain first.
        most: how many at most.
        harmless: loss at which nothing is gained any more; budgets whose exact plan loses no more do not count.
    """
    problems = [
        problem for budget in budgets_ms if (problem := _Problem.of(model, budget, harmless)) is not None
    ]
    if not problems:
        return []
    order = {pair: at for at, pair in enumerate(factors)}

    def priority(pair: Pair, gain: float) -> float:
        return gain if seconds is None else gain / max(seconds[pair], 1e-3)

    # Bounds are cheap and gains take an integer program each: a gain is only computed when its bound comes first.
    heap: list[tuple[float, int, bool, Pair]] = []
    for pair, factor in factors.items():
        bound = statistics.fmean(problem.bound(pair, factor) for problem in problems)
        if bound >= LEAST_GAIN:
            heapq.heappush(heap, (-priority(pair, bound), order[pair], False, pair))
    chosen: list[Pair] = []
    while heap and len(chosen) < most:
        _, _, exactly, pair = heapq.heappop(heap)
        if pair[0] in {site for site, _ in chosen}:
            continue  # what it could gain depends on what the other one's steps will have done
        if exactly:
            chosen.append(pair)
            continue
        gain = statistics.fmean(problem.gain(pair, factors[pair]) for problem in problems)
        if gain >= LEAST_GAIN:
            heapq.heappush(heap, (-priority(pair, gain), order[pair], True, pair))
    return chosen


@dataclass(frozen=True, kw_only=True)
class _Problem:
    """The additive model at one budget, with its exact plan, and bounds for plans that hold a given candidate."""

    model: AdditiveModel
    budget_ms: float
    best: exact.Solution
    least: Mapping[Pair, float]  # lower bound on the loss of any plan that holds the candidate
    score: Mapping[Pair, float]

    @classmethod
    def of(cls, model: AdditiveModel, budget_ms: float, harmless: float = 0.0) -> _Problem | None:
        """Solve for a budget; None if it is out of reach, or nothing is lost that could be gained."""
        best = exact.solve(model, budget_ms)
        if best is None or not best.loss > harmless:
            return None
        pairs = [(site, c) for site, row in zip(model.sites, model.candidates, strict=True) for c in row]
        score = dict(zip(pairs, (loss for row in model.loss for loss in row), strict=True))
        least = dict(zip(pairs, _lower_bounds(model, budget_ms).tolist(), strict=True))
        return cls(model=model, budget_ms=budget_ms, best=best, least=least, score=score)

    def _fall(self, pair: Pair, factor: float) -> float:
        return max(0.0, (1.0 - factor) * self.score[pair])

    def bound(self, pair: Pair, factor: float) -> float:
        """Return at least the gain."""
        fall = self._fall(pair, factor)
        if pair in self.best.plan.choices:
            return fall / self.best.loss
        return max(0.0, min(fall, self.best.loss - self.least[pair] + fall)) / self.best.loss

    def gain(self, pair: Pair, factor: float) -> float:
        """Return the share of loss that the exact plan loses if the candidate's damage is multiplied by a factor."""
        bound = self.bound(pair, factor)
        if bound == 0 or pair in self.best.plan.choices:
            return bound  # of all plans that hold it, the best one stays the best
        found = exact.solve(_lowered(self.model, pair, factor), self.budget_ms)
        return 0.0 if found is None else max(0.0, self.best.loss - found.loss) / self.best.loss


def _lowered(model: AdditiveModel, pair: Pair, factor: float) -> AdditiveModel:
    """Return the model with one candidate's damage multiplied by a factor."""
    site, chosen = pair
    loss = tuple(
        tuple(
            factor * one if name == site and c == chosen else one for c, one in zip(row, losses, strict=True)
        )
        for name, row, losses in zip(model.sites, model.candidates, model.loss, strict=True)
    )
    return replace(model, loss=loss)


def _lower_bounds(model: AdditiveModel, budget_ms: float) -> NDArray[np.float64]:
    """Return, for each candidate of each site, a lower bound on the loss of the plans within the budget that hold it.

    Lagrange: for any price of a millisecond, the cheapest choice at each other site, plus the candidate itself, less
    the price of the room there is. The highest bound of many prices is returned.
    """
    room = (budget_ms - model.intercept_ms) / model.slope - model.base_ms
    losses = [np.asarray(row, dtype=float) for row in model.loss]
    latencies = [np.asarray(row, dtype=float) for row in model.latency_ms]
    spans = [float(np.ptp(row)) for row in latencies if np.ptp(row) > 0]
    highest = max(float(np.abs(row).max()) for row in losses)
    if not spans or highest == 0:
        prices = np.zeros(1)
    else:
        unit = highest / max(spans)
        prices = np.concatenate([[0.0], np.geomspace(1e-6 * unit, 1e3 * unit, PRICES)])
    costs = [loss[None] + prices[:, None] * ms[None] for loss, ms in zip(losses, latencies, strict=True)]
    cheapest = [cost.min(1) for cost in costs]
    whole = np.sum(cheapest, axis=0) - prices * room
    return np.concatenate(
        [(whole[:, None] - low[:, None] + cost).max(0) for cost, low in zip(costs, cheapest, strict=True)]
    )
