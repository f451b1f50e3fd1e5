"""What the model gets wrong, learned from the plans that were evaluated: a Gaussian process over plans.

A plan's candidates disturb the outputs by vectors e_s, and a divergence is about quadratic in their sum:

    loss ~ |sum of e_s|^2 = sum of |e_s|^2 + 2 sum over pairs of <e_s, e_t>

The additive model has the first sum, the scores. The cosines in the second are not known, but alike for alike pairs:
with v_s = sqrt(score_s / sum of scores), the residual is 2 sum over pairs of cos_st v_s v_t. Hence the kernels:

    choices     sum over sites of [same choice]
    weighted    sum over sites of v_s v'_s [same choice]
    pairs       sum over pairs of sites of v_s v_t v'_s v'_t (1 + [same choice at s]) (1 + [same at t]) / 4
    plans       exp(-share of sites that differ / .25)

Which mixture of them holds, and how much is left to chance, is decided by the marginal likelihood, with the amplitude
integrated out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve, solve_triangular

from mixerzoo_search.sampler.space import Plans, Space

Vector = NDArray[np.float64]

_REACH = 0.25  # share of differing sites at which plans have little to do with each other
_MIXES = (  # of choices, weighted, pairs, plans
    (0.5, 0.0, 0.0, 0.5),
    (0.1, 0.9, 0.0, 0.0),
    (0.1, 0.5, 0.4, 0.0),
    (0.1, 0.2, 0.7, 0.0),
    (0.1, 0.4, 0.3, 0.2),
    (0.9, 0.0, 0.0, 0.1),
)
_NOISES = (0.02, 0.1, 0.4)  # of the amplitude's square
_TRUST = 3.0  # values that the expected amplitude is worth
_KEPT = 0.1  # least weight of a mixture, relative to the best, for it to count


@dataclass(frozen=True, kw_only=True)
class Compared:
    """P plans beside the n that were seen.

    Attributes:
        plans: (P, S).
        with_seen: (4, P, n) each kernel between plans and those that were seen.
        alone: (4, P) each kernel between a plan and itself.
    """

    plans: Plans
    with_seen: NDArray[np.float64]
    alone: NDArray[np.float64]

    def __getitem__(self, kept: NDArray[np.bool_]) -> Compared:
        """Return some of the plans."""
        return Compared(plans=self.plans[kept], with_seen=self.with_seen[:, kept], alone=self.alone[:, kept])


class Kernels:
    """Similarities of plans to those that were seen."""

    def __init__(self, space: Space, seen: Plans) -> None:
        self._space = space
        self._seen = seen
        # One column for each choice of a site that was seen; others are like nothing that was.
        taken = np.zeros(space.offered.shape, dtype=bool)
        np.logical_or.at(taken, (np.arange(len(space.names))[None], seen), True)
        self._columns = int(taken.sum())
        self._column = np.full(taken.shape, self._columns)
        self._column[taken] = np.arange(self._columns)
        self._one_hot = self._spread(seen, np.ones(seen.shape))
        self._share = shares(space, seen)
        self._weighted = self._spread(seen, self._share)
        self._squared = self._spread(seen, self._share**2)

    def _spread(self, plans: Plans, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return (P, columns): each plan's value of a site in the column of its choice."""
        spread = np.zeros((len(plans), self._columns + 1))
        columns = self._space.of(self._column, plans)
        spread[np.arange(len(plans))[:, None], columns] = values
        return spread[:, :-1]

    def compare(self, plans: Plans) -> Compared:
        """Return what every forecast needs to know of plans."""
        v = shares(self._space, plans)
        one_hot = self._spread(plans, np.ones(plans.shape))
        same = one_hot @ self._one_hot.T / plans.shape[1]
        weighted = self._spread(plans, v) @ self._weighted.T
        squared = self._spread(plans, v**2) @ self._squared.T
        summed = 0.5 * (v @ self._share.T + weighted)
        pairs = summed**2 - (0.25 * (v**2 @ (self._share**2).T) + 0.75 * squared)
        total, ones = (v**2).sum(1), np.ones(len(plans))
        return Compared(
            plans=plans,
            with_seen=np.stack([same, weighted, np.maximum(pairs, 0.0), np.exp((same - 1) / _REACH)]),
            alone=np.stack([ones, total, np.maximum(total**2 - (v**4).sum(1), 0.0), ones]),
        )


def shares(space: Space, plans: Plans) -> NDArray[np.float64]:
    """Return (P, S): the root of each site's share in a plan's predicted damage; equal ones where none is known."""
    if space.damage is None:
        return np.full(plans.shape, plans.shape[1] ** -0.5)
    damage = np.maximum(space.of(space.damage, plans), 0.0)
    total = damage.sum(1, keepdims=True)
    share = np.divide(damage, total, out=np.zeros_like(damage), where=total > 0)
    return np.asarray(np.sqrt(share))


@dataclass(frozen=True, kw_only=True)
class Target:
    """Something that was measured of each plan seen, on the scale on which it is predicted.

    Attributes:
        values: (n,) of the plans seen.
        expected: (P,) what is expected of plans before anything is seen.
        trends: (P, k) by what else it may differ, linearly; times the size that a coefficient may have.
        unit: size that the differences are expected to have.
        scale: a measured value on this scale.
    """

    values: Vector
    expected: Callable[[Plans], Vector]
    trends: Callable[[Plans], NDArray[np.float64]]
    unit: float
    scale: Callable[[float], float]


@dataclass(frozen=True)
class _Fit:
    weight: float
    mix: Vector
    noise: float
    amplitude2: float
    lower: NDArray[np.float64]
    solved: Vector


class Forecast:
    """Predicts a target for any plan, from those seen."""

    def __init__(self, target: Target, kernels: Kernels, seen: Plans) -> None:
        self._target = target
        self._trends = target.trends(seen)
        residual = target.values - target.expected(seen)
        similar = kernels.compare(seen).with_seen
        linear = self._trends @ self._trends.T
        fits: list[_Fit] = []
        for mix in map(np.array, _MIXES):
            fixed = _mixed(mix, similar) + linear
            for noise in _NOISES:
                covariance = fixed + noise * np.eye(len(seen))
                lower, _ = cho_factor(covariance, lower=True)
                solved = cho_solve((lower, True), residual)
                misfit = _TRUST * target.unit**2 + float(residual @ solved)
                freedom = _TRUST + len(seen)
                likelihood = -np.log(np.diag(lower)).sum() - freedom / 2 * np.log(misfit)
                fits.append(_Fit(float(likelihood), mix, noise, misfit / freedom, lower, solved))
        best = max(fit.weight for fit in fits)
        self._fits = [fit for fit in fits if fit.weight > best + np.log(_KEPT)]
        raw = np.exp([fit.weight - best for fit in self._fits])
        self._weights = raw / raw.sum()

    def predict(self, compared: Compared) -> tuple[Vector, Vector]:
        """Return (P,) means and standard deviations, on the target's scale."""
        similar, own = compared.with_seen, compared.alone
        trends = self._target.trends(compared.plans)
        linear, linear_own = trends @ self._trends.T, (trends**2).sum(1)
        means, variances = [], []
        for fit in self._fits:
            cross = _mixed(fit.mix, similar) + linear
            means.append(cross @ fit.solved)
            half = solve_triangular(fit.lower, cross.T, lower=True, check_finite=False)
            left = fit.mix @ own + linear_own + fit.noise - (half**2).sum(0)
            variances.append(fit.amplitude2 * np.maximum(left, 0.5 * fit.noise))
        mean = self._weights @ np.array(means)
        spread = self._weights @ (np.array(variances) + (np.array(means) - mean) ** 2)
        return self._target.expected(compared.plans) + mean, np.sqrt(np.maximum(spread, 1e-24))


def _mixed(mix: Vector, kernels: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the weighted sum of kernels; faster than tensordot, which copies."""
    total = np.zeros(kernels.shape[1:])
    for weight, kernel in zip(mix, kernels, strict=True):
        if weight:
            total += weight * kernel
    return total
