"""The next plan: of many that keep the budget, the one that promises the most after all that was measured."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import erfcx, log_ndtr

from mixerzoo_search.sampler.evidence import Evidence, latency_target, measured_latency, value_target
from mixerzoo_search.sampler.moves import Moves
from mixerzoo_search.sampler.residual import Compared, Forecast, Kernels, Target, Vector
from mixerzoo_search.sampler.space import Indices, Plans, Space

_EVERY = 2048  # plans of a space that are all looked at
_STARTS = 8  # finished trials before anything is learned, where there is no model
_EXPLORED = 0.05  # share of the proposals that are drawn from the prior, whatever was learned
_PRIOR = 0.1  # weight of the prior's logarithm beside that of the expected improvement, at first
_AT_BUDGET = 0.5  # share of the proposals, with several objectives, that seek the best first objective
_PARENTS, _LEADERS = 6, 3  # plans whose surroundings are looked at: evaluated ones, and promising ones
_ROUNDS = 2  # of looking at the surroundings of promising ones
_MEASURED = 4  # latencies after which a prediction over the budget can be doubted
_CHANCE = 0.16  # of keeping the budget, from which on such a doubt counts: a standard deviation
_HOPELESS = 0.02  # chance of keeping the budget under which a plan is not evaluated


@dataclass(frozen=True)
class _Limit:
    """A value that must not be exceeded."""

    forecast: Forecast
    most: float  # on the target's scale

    def log_chance(self, compared: Compared) -> Vector:
        mean, spread = self.forecast.predict(compared)
        return np.asarray(log_ndtr((self.most - mean) / spread))


class Proposer:
    """Makes one plan.

    Args:
        space: the plans.
        evidence: what was evaluated.
        known: plans that must not be proposed.
        budget_ms: of the latency; infinite without one.
        limit_ms: predicted latency up to which a plan keeps it.
        trust: n0 / (n0 + finished trials), the weight of the prior.
        rng: random numbers.
    """

    def __init__(
        self,
        *,
        space: Space,
        evidence: Evidence,
        known: set[Indices],
        budget_ms: float,
        limit_ms: float,
        trust: float,
        rng: np.random.Generator,
    ) -> None:
        self.space, self.evidence, self.known, self.rng, self.trust = space, evidence, known, rng, trust
        self.budget_ms = budget_ms if space.modelled else math.inf
        self.moves = Moves(space, limit_ms if space.modelled else math.inf, rng)
        self.over: _Limit | None = None  # the budget, as measured latencies tell of it

    def propose(self) -> Indices:
        """Return a plan that is not known, within the budget if there is one."""
        plan: Indices | None = None
        if self.space.total > len(self.known):
            if len(self.evidence) < (1 if self.space.modelled else _STARTS):
                exact = None if len(self.evidence) else self.moves.exact()
                plan = self.moves.drawn(self.known) if exact is None or exact in self.known else exact
            elif self.rng.random() < _EXPLORED:
                plan = self.moves.drawn(self.known)
            else:
                plan = self._promising()
        return self.moves.last_resort(self.known) if plan is None else plan

    def _promising(self) -> Indices | None:
        """Return the plan of the highest expected improvement times the chance that it keeps its limits."""
        evidence, kernels = self.evidence, Kernels(self.space, self.evidence.plans)

        def learn(target: Target) -> Forecast:
            return Forecast(target, kernels, evidence.plans)

        checks = self._constraints(learn)
        main, others = self._goal()
        kept = evidence.feasible
        for objective, most in others.items():
            target = self._objective(objective)
            checks.append(_Limit(learn(target), target.scale(most)))
            kept &= evidence.costs[:, objective] <= most
        target = self._objective(main)
        forecast, costs = learn(target), evidence.costs[:, main]
        # Where nothing keeps the limits yet, whatever does is an improvement.
        best = target.scale(float(costs[kept].min() if kept.any() else costs.max()))

        def rated(plans: Plans) -> tuple[Plans, Vector]:
            """Return the plans that may keep the budget, and what they promise."""
            compared = kernels.compare(plans)
            compared, total = self._within(compared)
            mean, spread = forecast.predict(compared)
            total = total + log_improvement((best - mean) / spread) + np.log(spread)
            for check in checks:
                total = total + check.log_chance(compared)
            likely = np.log(np.maximum(self.space.of(self.space.guide, compared.plans), 1e-12)).sum(1)
            return compared.plans, np.asarray(total + _PRIOR * self.trust * likely)

        return self._best(self._parents(costs, kept), rated)

    def _best(self, parents: Plans, rated: Callable[[Plans], tuple[Plans, Vector]]) -> Indices | None:
        small = self.space.total <= _EVERY
        seen: set[bytes] = set()
        plans, values = rated(self._fresh(self.space.every() if small else self.moves.pool(parents), seen))
        for _ in range(0 if small or not len(plans) else _ROUNDS):
            leaders = plans[np.argsort(-values, kind="stable")[:_LEADERS]]
            around = np.concatenate([self.moves.around(plan) for plan in leaders])
            more, theirs = rated(self._fresh(around, seen))
            plans, values = np.concatenate([plans, more]), np.concatenate([values, theirs])
        return tuple(plans[int(np.argmax(values))].tolist()) if len(plans) else None

    def _fresh(self, plans: Plans, seen: set[bytes]) -> Plans:
        """Return the plans that are not known, each once, those already `seen` left out."""
        fresh = np.zeros(len(plans), dtype=bool)
        for at, row in enumerate(plans):
            key = row.tobytes()
            fresh[at] = key not in seen and tuple(row.tolist()) not in self.known
            seen.add(key)
        return plans[fresh]

    def _within(self, compared: Compared) -> tuple[Compared, Vector]:
        """Return the plans that may keep the budget, and the logarithms of their chances."""
        fits = self.moves.fits(compared.plans)
        if self.over is None:
            return compared[fits], np.zeros(int(fits.sum()))
        log_chance = self.over.log_chance(compared)
        if len(self.evidence) >= _MEASURED:
            fits |= log_chance >= math.log(_CHANCE)
        hopeful = fits & (log_chance >= math.log(_HOPELESS))
        fits = hopeful if hopeful.any() else fits
        return compared[fits], log_chance[fits]

    def _parents(self, costs: Vector, kept: NDArray[np.bool_]) -> Plans:
        """Return the best evaluated plans that keep the limits, and others worth starting from."""
        order = np.lexsort((np.arange(len(costs)), costs, ~kept))[:_PARENTS]
        elite = np.array(self.evidence.elite, dtype=np.int64).reshape(-1, len(self.space.names))
        more = elite[self.rng.permutation(len(elite))[: _PARENTS // 2]]
        return np.concatenate([self.evidence.plans[order], more])

    def _constraints(self, learn: Callable[[Target], Forecast]) -> list[_Limit]:
        """Return what keeps the constraints but the one on the latency, which is remembered."""
        evidence, found = self.evidence, []
        latency = measured_latency(self.space, evidence, self.budget_ms)
        for name, values in evidence.constraints.items():
            if latency is not None and name == latency[0]:
                target = latency_target(self.space, evidence.plans, latency[1])
                self.over = _Limit(learn(target), target.scale(self.budget_ms))
            elif values.any():
                target = value_target(self.space, evidence.plans, values, loss=False, signed=True)
                found.append(_Limit(learn(target), target.scale(0.0)))
        return found

    def _objective(self, objective: int) -> Target:
        evidence, costs = self.evidence, self.evidence.costs[:, objective]
        if objective == 1 and costs.size and self.space.modelled and (costs > 0).all():
            return latency_target(self.space, evidence.plans, costs)
        return value_target(self.space, evidence.plans, costs, loss=objective == 0)

    def _goal(self) -> tuple[int, dict[int, float]]:
        """Return the objective to improve, and limits for the others.

        With several objectives the limits are drawn anew each time, so that all of the front is improved. Half of
        the proposals are for what the constraints alone leave open, if there are some.
        """
        count = self.evidence.costs.shape[1]
        if count == 1:
            return 0, {}
        if self.evidence.constraints and self.rng.random() < _AT_BUDGET:
            return 0, {}
        main = 0 if self.space.modelled else int(self.rng.integers(count))
        kept = self.evidence.feasible
        front = self.evidence.costs[kept] if kept.any() else self.evidence.costs
        most = front.min(0) + self.rng.random(count) * np.ptp(front, axis=0)
        return main, {at: float(most[at]) for at in range(count) if at != main}


def log_improvement(gain: Vector) -> Vector:
    """Return log(pdf(z) + z cdf(z)), the expected improvement of a unit normal by z, without underflow.

    After Ament et al. (2023, arXiv:2310.20708).
    """
    z = np.asarray(gain, dtype=float)
    found = np.empty_like(z)
    high = z > -1
    found[high] = np.log(
        np.exp(-0.5 * z[high] ** 2) / math.sqrt(2 * math.pi) + z[high] * np.exp(log_ndtr(z[high]))
    )
    low = z[~high]
    tail = np.where(
        low > -1e3,
        np.log1p(-math.sqrt(math.pi / 2) * np.abs(low) * erfcx(np.abs(low) / math.sqrt(2))),
        -2 * np.log(np.abs(low)),
    )
    found[~high] = -0.5 * low**2 - 0.5 * math.log(2 * math.pi) + tail
    return found
