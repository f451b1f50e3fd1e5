"""Where plans come from: the model's own best, draws from the prior, and the surroundings of good plans."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from mixerzoo_search.knapsack import TooManyStatesError, cheapest
from mixerzoo_search.sampler.space import Indices, Plans, Space

_UNGUIDED = 0.3  # share of the draws that are uniform
_DRAWS = 16  # that may turn out to be known
_DISTURBED = 0.5  # spread of the logarithm of the factor by which damages are disturbed
_DISTURBANCES, _PRICES = 8, 24
_NEAR = 80  # plans around one: so many with one choice changed, and so many with two


class Moves:
    """Makes plans of one space that are predicted within a limit."""

    def __init__(self, space: Space, limit_ms: float, rng: np.random.Generator) -> None:
        self.space, self.limit_ms, self.rng = space, limit_ms, rng

    def fits(self, plans: Plans) -> NDArray[np.bool_]:
        """Return which plans are predicted within the limit."""
        return np.asarray(self.space.predicted_ms(plans) <= self.limit_ms)

    def exact(self) -> Indices | None:
        """Return the plan of least damage, by the model alone; None if there is none, or no limit."""
        space = self.space
        if space.damage is None or not math.isfinite(self.limit_ms):
            return None
        rows = [slice(0, int(size)) for size in space.sizes]
        costs = [space.damage[at, row] for at, row in enumerate(rows)]
        weights = [space.ms[at, row] for at, row in enumerate(rows)]
        try:
            found = cheapest(costs, weights, self.limit_ms - space.base_ms)
        except TooManyStatesError:
            return None
        return None if found is None else tuple(found)

    def drawn(self, known: set[Indices]) -> Indices | None:
        """Return a plan from the prior, or at random, brought within the limit; None if all draws are known."""
        guided = bool(self.rng.random() >= _UNGUIDED)
        for plan in self.space.draw(self.rng, _DRAWS, guided=guided):
            repaired = self.repaired(plan)
            found = tuple(repaired.tolist())
            if found not in known and self.fits(repaired[None])[0]:
                return found
        return None

    def repaired(self, plan: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the plan with changes, each the cheapest in damage per millisecond, until it meets the limit."""
        space, plan = self.space, plan.copy()
        if space.damage is None or not math.isfinite(self.limit_ms):
            return plan
        sites = np.arange(len(plan))
        while space.predicted_ms(plan[None])[0] > self.limit_ms:
            saved = space.ms[sites, plan][:, None] - space.ms
            harm = space.damage - space.damage[sites, plan][:, None]
            useful = space.offered & (saved > 1e-12)
            if not useful.any():
                break  # as fast as it gets
            price = np.where(useful, harm / np.where(useful, saved, 1.0), np.inf)
            site, to = np.unravel_index(int(np.argmin(price)), price.shape)
            plan[site] = to
        return plan

    def pool(self, parents: Plans) -> Plans:
        """Return plans that may be good: the model's best under disturbed damages, draws, and what is near parents."""
        space, rng = self.space, self.rng
        found = [parents, space.draw(rng, 60), space.draw(rng, 30, guided=False)]
        if space.modelled:
            found.append(self._disturbed())
        if len(parents):
            found += [self.around(plan) for plan in parents]
            one, other = parents[rng.integers(len(parents), size=(2, 60))]
            found.append(np.where(rng.random(one.shape) < 0.5, one, other))
        return np.concatenate(found)

    def _disturbed(self) -> Plans:
        """Return the best plans at many prices of a millisecond, each with its own random factors on the damages."""
        space, shape = self.space, (_DISTURBANCES, *self.space.offered.shape)
        assert space.damage is not None
        damage = space.damage * np.exp(_DISTURBED * self.rng.standard_normal(shape))
        spread = np.ptp(np.where(space.offered, space.ms, 0.0), axis=1).max()
        unit = float(np.abs(space.damage).max()) / max(float(spread), 1e-12)
        prices = np.geomspace(1e-5, 1e2, _PRICES) * (unit or 1.0) * np.exp(self.rng.uniform(-0.3, 0.3))
        cost = damage[:, None] + prices[None, :, None, None] * space.ms
        cost = np.where(space.offered, cost, np.inf)
        return np.asarray(cost.argmin(-1).reshape(-1, len(space.names)))

    def around(self, plan: NDArray[np.int64]) -> Plans:
        """Return plans with one choice changed, all of them or some, and some with two."""
        singles = self.space.singles(plan)
        if not len(singles):
            return singles
        some = singles
        if len(singles) > _NEAR:
            some = singles[self.rng.choice(len(singles), _NEAR, replace=False)]
        one, other = singles[self.rng.integers(len(singles), size=(2, _NEAR))]
        doubles = np.where(one != plan, one, other)
        return np.concatenate([some, doubles])

    def last_resort(self, known: set[Indices]) -> Indices:
        """Return a plan that is not known: one that meets the limit, else the fastest; a known one if all are."""
        space = self.space
        rows = zip(space.ms, space.sizes, strict=True)
        fastest = np.array([int(np.argmin(row[:size])) for row, size in rows])
        start = int(self.rng.random() * space.total) % space.total
        walked = space.unknown_from(start, known)
        near = [
            row
            for row in np.concatenate([fastest[None], space.singles(fastest)])
            if tuple(row.tolist()) not in known
        ]
        plans = np.concatenate([np.array(near, dtype=np.int64).reshape(-1, len(space.names)), walked])
        if not len(plans):
            return tuple(self.repaired(space.draw(self.rng, 1)[0]).tolist())
        fits = np.flatnonzero(self.fits(plans))
        chosen = (
            fits[int(self.rng.integers(fits.size))] if fits.size else np.argmin(space.predicted_ms(plans))
        )
        return tuple(plans[int(chosen)].tolist())
