"""What the finished trials of a study say, as targets to learn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from mixerzoo_search.elites import elites
from mixerzoo_search.sampler.residual import Target, Vector, shares
from mixerzoo_search.sampler.space import Indices, Plans, Space

MOST = 160  # trials that are learned from: the best and the latest
_WIDE = 10.0  # times the lowest, from which on positive values are compared by their ratio
_HARMLESS = 0.02  # of the median value: losses below it are alike
_SURPRISE = 0.3  # expected residual of a logarithm of the loss
_FAR = 0.5  # relative difference to the predicted latency above which a constraint cannot be about that


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Finished trials that hold a whole plan and finite values.

    Attributes:
        plans: (n, S).
        costs: (n, K) objectives, all to be minimised.
        constraints: name -> (n,), kept where at most 0.
        elite: the plans worth starting from, best first.
    """

    plans: Plans
    costs: NDArray[np.float64]
    constraints: Mapping[str, Vector]
    elite: tuple[Indices, ...]

    def __len__(self) -> int:
        return len(self.plans)

    @property
    def feasible(self) -> NDArray[np.bool_]:
        """Which plans keep all constraints."""
        kept = np.ones(len(self), dtype=bool)
        for values in self.constraints.values():
            kept &= values <= 0
        return kept


def gather(space: Space, trials: Sequence[FrozenTrial], directions: Sequence[StudyDirection]) -> Evidence:
    """Collect what there is to learn from."""
    usable = [
        (plan, trial)
        for trial in trials
        if trial.state == TrialState.COMPLETE
        and trial.values is not None
        and all(map(math.isfinite, trial.values))
        and (plan := space.encode(trial.params)) is not None
    ]
    best = elites([trial for _, trial in usable], directions)
    elite = {trial.number: at for at, trial in enumerate(best)}
    if len(usable) > MOST:
        first = sorted(usable, key=lambda pair: (elite.get(pair[1].number, MOST), -pair[1].number))
        usable = sorted(first[:MOST], key=lambda pair: pair[1].number)
    found = [trial for _, trial in usable]
    signs = [-1.0 if direction == StudyDirection.MAXIMIZE else 1.0 for direction in directions]
    names = sorted(set.intersection(*(set(trial.constraints) for trial in found))) if found else []
    constraints = {name: np.array([trial.constraints[name] for trial in found]) for name in names}
    if len(constraints) > 2:
        constraints = {"worst": np.max(list(constraints.values()), axis=0)}
    by_number = {trial.number: plan for plan, trial in usable}
    return Evidence(
        plans=np.array([plan for plan, _ in usable], dtype=np.int64).reshape(-1, len(space.names)),
        costs=np.array([trial.values for trial in found]).reshape(-1, len(directions)) * signs,
        constraints=constraints,
        elite=tuple(by_number[trial.number] for trial in best if trial.number in by_number),
    )


def value_target(space: Space, seen: Plans, values: Vector, *, loss: bool, signed: bool = False) -> Target:
    """Return how an objective or a constraint is learned.

    Args:
        space: the plans.
        seen: (n, S) evaluated plans.
        values: (n,) of them.
        loss: whether it is what the model's scores are of.
        signed: whether values of the other sign matter, as of a constraint.
    """
    least, most = float(values.min()), float(values.max())
    predicted = loss and space.modelled and least >= 0 and most > 0
    by_ratio = predicted or (not signed and least > 0 and most > _WIDE * least)
    floor = _HARMLESS * float(np.median(values[values > 0])) if predicted else 0.0

    def scale(value: float) -> float:
        return math.log(max(value + floor, 1e-300)) if by_ratio else value

    scaled = np.array([scale(value) for value in values.tolist()])

    def log_damage(plans: Plans) -> Vector:
        assert space.damage is not None
        total = np.maximum(space.of(space.damage, plans).sum(1), 0.0)
        return np.asarray(np.log(total + (floor if predicted else 0.1)))

    centre = 0.0 if space.damage is None else float(log_damage(seen).mean())

    def trends(plans: Plans) -> NDArray[np.float64]:
        one = np.ones(len(plans))
        if space.damage is None or not loss:
            return one[:, None]
        mixed = np.maximum((shares(space, plans).sum(1) ** 2 - 1) / 2, 0.0)
        slope = log_damage(plans) - centre
        if predicted:
            return np.stack([0.7 * one, 0.5 * slope, 0.5 * mixed, 0.25 * mixed * slope], 1)
        return np.stack([one, slope, 0.5 * mixed], 1)

    if predicted:
        return Target(values=scaled, expected=log_damage, trends=trends, unit=_SURPRISE, scale=scale)
    middle, spread = float(scaled.mean()), float(scaled.std())
    return Target(
        values=scaled,
        expected=lambda plans: np.full(len(plans), middle),
        trends=trends,
        unit=spread if spread > 0 else 1.0,
        scale=scale,
    )


def latency_target(space: Space, seen: Plans, measured_ms: Vector) -> Target:
    """Return how the latency is learned: its ratio to the predicted one."""

    def predicted(plans: Plans) -> Vector:
        return np.asarray(np.log(np.maximum(space.predicted_ms(plans), 1e-9)))

    scaled = np.log(measured_ms)
    off = scaled - predicted(seen)
    middle, centre = float(np.median(off)), float(predicted(seen).mean())
    return Target(
        values=scaled,
        expected=lambda plans: predicted(plans) + middle,
        trends=lambda plans: np.stack([np.ones(len(plans)), predicted(plans) - centre], 1),
        unit=max(float(off.std()), 1e-7) if len(seen) > 2 else 0.01,
        scale=lambda value: math.log(max(value, 1e-300)),
    )


def measured_latency(space: Space, evidence: Evidence, budget_ms: float) -> tuple[str, Vector] | None:
    """Return which constraint is the latency over the budget, and the latencies; None if none can be."""
    if not space.modelled or not math.isfinite(budget_ms):
        return None
    predicted = space.predicted_ms(evidence.plans)
    for name, over in evidence.constraints.items():
        measured = np.asarray(over + budget_ms)
        if (np.abs(measured - predicted) <= _FAR * predicted).all() and (measured > 0).all():
            return name, measured
    return None
