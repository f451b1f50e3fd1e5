"""The sparsity-aware prior: which candidate is likely to do little damage at which site, before it is scored.

A guess, and treated as one: it orders the work and biases the sampler, a uniform share is always kept, and
`uniform` and `shuffled` exist so that its worth can be measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mixerzoo.plan import KEEP, Candidate
from mixerzoo_search.fit_quality import spearman

Mixing = Literal["none", "token", "static", "content"]  # how a mixer decides which token sees which

# Values of a site whose statistics are missing: the middle of the road.
_DEFAULTS: Mapping[str, float] = {
    "entropy": 0.5,
    "tokens_90": 0.5,
    "gini": 0.5,
    "sink": 0.0,
    "locality": 0.5,
    "input_dependence": 0.5,
    "effective_rank": 0.5,
    "contribution": 1.0,
}
_FLOOR = 1e-9  # of damages and errors, so that they have a logarithm


@dataclass(frozen=True, kw_only=True)
class Clue:
    """What is known about one candidate at one site before the site is replaced in the teacher.

    Attributes:
        site: name of the site.
        candidate: the candidate.
        statistics: the site's statistics: `entropy`, `tokens_90`, `gini`, `sink`, `locality`,
            `input_dependence`, `effective_rank` in [0, 1] and `contribution`, the size of the site's output
            relative to the residual stream. Missing or non-finite ones take a middle value.
        nmse: held-out block-local error of the candidate, solved in closed form; None where there is none.
        kind: kind of the site, `attention` or `mlp`.
        mixing: how the mixer decides which token sees which.
    """

    site: str
    candidate: Candidate
    statistics: Mapping[str, float] = field(default_factory=dict)
    nmse: float | None = None
    kind: str = "attention"
    mixing: Mixing = "content"

    @property
    def key(self) -> tuple[str, Candidate]:
        """(site, candidate)."""
        return self.site, self.candidate

    def statistic(self, name: str) -> float:
        """Return a statistic of the site, or its default."""
        value = float(self.statistics.get(name, math.nan))
        return value if math.isfinite(value) else _DEFAULTS[name]

    def error(self) -> float:
        """Return the candidate's NMSE where it is known, else what the site's statistics suggest."""
        if self.nmse is not None and math.isfinite(self.nmse):
            return max(self.nmse, _FLOOR)
        return max(self._expected_error(), 1e-3)

    def _expected_error(self) -> float:
        width = self.candidate.width
        mixing = self.mixing
        if mixing == "none":
            return 1.0
        if self.kind == "mlp":
            return max(1.0 - width, 0.05) ** 2  # what is kept of the hidden units is the more important part
        # Both ends of the entropy are easy (uniform rows are a mean, sinks are next to no mixing); the middle
        # is where tokens are really compared.
        entropy = self.statistic("entropy")
        u_shape = 0.5 + 2.0 * entropy * (1.0 - entropy)
        easier = u_shape * (1.0 - 0.5 * self.statistic("sink"))
        dependence = self.statistic("input_dependence")
        base = {
            "token": 0.5 + 0.5 * dependence,
            "static": dependence,
            "content": 0.5 * self.statistic("effective_rank"),
        }[mixing]
        return base * easier / math.sqrt(min(max(width, 0.05), 2.0))

    def expected_damage(self) -> float:
        """Return contribution^2 * NMSE, the damage expected without evidence, in units of its own."""
        return max(self.statistic("contribution") ** 2 * self.error(), _FLOOR)

    def features(self) -> dict[str, float]:
        """Return what the regression corrects the expected damage by, by name."""
        entropy = self.statistic("entropy")
        shape = ("tokens_90", "gini", "sink", "locality", "input_dependence", "effective_rank")
        return {
            "log_contribution": math.log(max(self.statistic("contribution"), 1e-6)),
            "log_error": math.log(self.error()),
            "entropy": entropy,
            "entropy_in_the_middle": 4.0 * entropy * (1.0 - entropy),
            **{name: self.statistic(name) for name in shape},
            "log_width": math.log(self.candidate.width),
            "error_is_a_guess": float(self.nmse is None),
            "mlp": float(self.kind == "mlp"),
            **{f"mixes_{name}": float(self.mixing == name) for name in ("none", "token", "static")},
        }


@dataclass(frozen=True, kw_only=True)
class DamageForecast:
    """Predicted damages.

    Attributes:
        damage: for each (site, candidate), its measured score where there is one, else the prediction, in the
            unit of the scores (of its own without scores); 0 for `keep`.
        spearman: rank agreement of predicted and measured damages, each predicted without its own score; 0.0
            with under three scores.
        scores: how many scores the prediction rests on.
        expected: for each (site, candidate) but `keep`, contribution^2 * NMSE: what is predicted without any score.
        fitted: likewise, the prediction with the scores, without its own where it has one; empty without scores.
    """

    damage: Mapping[tuple[str, Candidate], float]
    spearman: float
    scores: int
    expected: Mapping[tuple[str, Candidate], float] = field(default_factory=dict)
    fitted: Mapping[tuple[str, Candidate], float] = field(default_factory=dict)


def predict_damage(
    clues: Iterable[Clue],
    scores: Mapping[tuple[str, Candidate], float] | None = None,
    *,
    ridge: float = 3.0,
) -> DamageForecast:
    """Predict the damage (loss after replacing that one site) of every candidate.

    Without scores: contribution^2 * NMSE. With scores for some: the logarithm of what that formula misses is
    regressed on the statistics, with a ridge that pulls towards the formula: few scores change it little.

    Args:
        clues: one for each (site, candidate).
        scores: measured replace-one losses, for any subset; ones that are not finite are ignored.
        ridge: strength of the pull, in scores.
    """
    known = {key: value for key, value in (scores or {}).items() if math.isfinite(value)}
    every = list(clues)
    rows = [clue for clue in every if not clue.candidate.is_keep]
    kept = {clue.key: 0.0 for clue in every if clue.candidate.is_keep}
    log_expected = np.array([math.log(clue.expected_damage()) for clue in rows])
    measured = np.array([known.get(clue.key, math.nan) for clue in rows], dtype=float)
    seen = np.isfinite(measured)
    log_damage, log_fitted, agreement = log_expected, log_expected, 0.0
    if seen.any():
        # A score at or under 0 is one too small to be told from noise, not infinitely good.
        positive = measured[seen & (measured > 0)]
        least = float(positive.min()) if positive.size else _FLOOR
        target = np.log(np.maximum(measured[seen], least)) - log_expected[seen]
        features = np.array([list(clue.features().values()) for clue in rows])
        correction, left_out = _ridge(features, seen, target, ridge)
        log_damage = log_expected + correction
        log_fitted = log_damage.copy()
        log_fitted[seen] = log_expected[seen] + left_out
        if seen.sum() >= 3:
            agreement = spearman(log_fitted[seen].tolist(), measured[seen].tolist())
    damage = _by_key(rows, log_damage)
    damage |= {clue.key: max(known[clue.key], 0.0) for clue in rows if clue.key in known}
    return DamageForecast(
        damage=damage | kept,
        spearman=agreement,
        scores=int(seen.sum()),
        expected=_by_key(rows, log_expected),
        fitted=_by_key(rows, log_fitted) if seen.any() else {},
    )


def _by_key(rows: Sequence[Clue], logs: NDArray[np.float64]) -> dict[tuple[str, Candidate], float]:
    limited = np.clip(logs, -50.0, 50.0).tolist()
    return {clue.key: math.exp(value) for clue, value in zip(rows, limited, strict=True)}


def _ridge(
    features: NDArray[np.float64], seen: NDArray[np.bool_], target: NDArray[np.float64], strength: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Fit `target` on the seen rows; predict every row, and the seen ones with themselves left out."""
    spread = features.std(axis=0)
    design = (features - features.mean(axis=0)) / np.where(spread > 1e-12, spread, np.inf)
    design = np.hstack([np.ones((len(features), 1)), design])
    penalty = strength * np.eye(design.shape[1])
    penalty[0, 0] = 1e-6  # the intercept is a change of units: free
    inverse = np.linalg.inv(design[seen].T @ design[seen] + penalty)
    weights = inverse @ design[seen].T @ target
    fitted = design[seen] @ weights
    leverage = np.minimum(np.einsum("ij,jk,ik->i", design[seen], inverse, design[seen]), 1.0 - 1e-6)
    left_out = target - (target - fitted) / (1.0 - leverage)
    return design @ weights, left_out


@dataclass(frozen=True)
class Prior:
    """For each site, a probability for each of its candidates.

    Attributes:
        weights: site -> candidate, as written in a plan -> probability; each site's sum to 1.
    """

    weights: Mapping[str, Mapping[str, float]]

    @classmethod
    def from_damage(
        cls,
        damage: Mapping[tuple[str, Candidate], float],
        *,
        temperature: float | None = None,
        uniform_share: float = 0.1,
    ) -> Prior:
        """Make prior(candidate | site) ~ exp(-damage / t), mixed with a uniform share.

        Args:
            damage: for each (site, candidate); one that is not finite gets the uniform share only.
            temperature: t, in the unit of the damages; their median unless given. One for all sites: a site
                where everything is harmless stays open, one where everything hurts keeps its module.
            uniform_share: in [0, 1].
        """
        harmful = [value for value in damage.values() if math.isfinite(value) and value > 0]
        unit = temperature or (float(np.median(harmful)) if harmful else 1.0)
        table: dict[str, dict[str, float]] = {}
        for (site, candidate), value in damage.items():
            table.setdefault(site, {})[str(candidate)] = value if math.isfinite(value) else math.inf
        weights: dict[str, dict[str, float]] = {}
        for site, row in table.items():
            least = min(row.values())
            raw = {
                name: math.exp(-(value - least) / unit) if math.isfinite(value) else 0.0
                for name, value in row.items()
            }
            total = sum(raw.values())
            uniform = 1.0 / len(row)
            weights[site] = {
                name: (1 - uniform_share) * value / total + uniform_share * uniform if total else uniform
                for name, value in raw.items()
            }
        return cls(weights)

    def probabilities(self, site: str, choices: Sequence[str]) -> NDArray[np.float64]:
        """Return a probability for each of `choices` at `site`; unknown ones count as average."""
        row = self.weights.get(site, {})
        average = sum(row.values()) / len(row) if row else 1.0
        raw = np.array([row.get(choice, average) for choice in choices], dtype=float)
        total = raw.sum()
        return raw / total if total > 0 else np.full(len(choices), 1.0 / len(choices))

    def order(self) -> list[tuple[str, str]]:
        """Return every (site, candidate) but `keep`, the most promising first."""
        pairs = [
            (-value, site, name)
            for site, row in self.weights.items()
            for name, value in row.items()
            if name != KEEP
        ]
        return [(site, name) for _, site, name in sorted(pairs)]

    def uniform(self) -> Prior:
        """Return the prior that knows nothing, for ablations."""
        return Prior({site: dict.fromkeys(row, 1.0 / len(row)) for site, row in self.weights.items()})

    def shuffled(self, seed: int) -> Prior:
        """Return the prior with each site's probabilities dealt out to random candidates, for ablations.

        As confident as this one, and wrong.
        """
        rng = np.random.default_rng(seed)
        return Prior(
            {
                site: dict(zip(row, rng.permutation(list(row.values())).tolist(), strict=True))
                for site, row in self.weights.items()
            }
        )
