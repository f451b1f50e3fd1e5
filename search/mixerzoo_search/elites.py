"""The trials worth starting from: the Pareto front, or the best few, as far as constraints allow."""

from __future__ import annotations

import math
from collections.abc import Sequence

from optuna.study import StudyDirection
from optuna.trial import FrozenTrial


def violation(trial: FrozenTrial) -> float:
    """Return by how much a trial breaks its constraints in all; 0 if it keeps them."""
    return sum(max(0.0, value) for value in trial.constraints.values())


def elites(trials: Sequence[FrozenTrial], directions: Sequence[StudyDirection]) -> list[FrozenTrial]:
    """Return the complete trials worth starting from, best first.

    With several objectives the non-dominated ones, with one objective the best tenth (four at least).
    Where no trial keeps its constraints, the four that break them the least.
    """
    costs = {
        trial.number: tuple(
            -value if direction == StudyDirection.MAXIMIZE else value
            for value, direction in zip(trial.values, directions, strict=True)
        )
        for trial in trials
        if trial.values is not None and all(map(math.isfinite, trial.values))
    }
    usable = [trial for trial in trials if trial.number in costs]
    feasible = [trial for trial in usable if violation(trial) == 0]
    if not feasible:
        return sorted(usable, key=lambda trial: (violation(trial), trial.number))[:4]
    feasible.sort(key=lambda trial: (costs[trial.number], trial.number))
    if len(directions) == 1:
        return feasible[: max(4, math.ceil(len(feasible) / 10))]
    # Whatever dominates a trial sorts before it, so each only has to be compared with the front so far.
    front: list[FrozenTrial] = []
    for trial in feasible:
        cost = costs[trial.number]
        if not any(all(a <= b for a, b in zip(costs[t.number], cost, strict=True)) for t in front):
            front.append(trial)
    return front
