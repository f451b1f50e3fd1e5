"""The exact frontier of the additive model: a multiple-choice knapsack.

Solved by bounds and a dynamic program (`knapsack.py`). With plans to differ from it is solved as a MILP by HiGHS.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from mixerzoo.plan import Plan
from mixerzoo_search.additive import AdditiveModel
from mixerzoo_search.knapsack import TooManyStatesError, cheapest

TOLERANCE = 1e-9  # relative; HiGHS alone would accept a budget missed by 1e-6
OPTIMAL_GAP = 1e-6
_MAX_ROUNDS = 50


@dataclass(frozen=True, kw_only=True)
class Solution:
    """A plan that meets its budget according to the model.

    Attributes:
        plan: the plan.
        loss: its predicted loss.
        ms: its predicted latency in ms.
        optimal: whether no other allowed plan has a lower predicted loss (proven, up to `gap`).
        gap: bound on how much lower the best loss could be, relative to `loss`.
    """

    plan: Plan
    loss: float
    ms: float
    optimal: bool
    gap: float


def shared_limit(sites: int, overlap: float) -> int:
    """Return how many identical choices an overlap in [0, 1] allows."""
    return math.floor(overlap * sites + 1e-9)


def shared(one: Plan, other: Plan) -> int:
    """Return at how many sites two plans make the same choice."""
    return sum(a == b for a, b in zip(one.choices, other.choices, strict=True))


class _Program:
    """One knapsack: a binary variable for each (site, candidate), `cost` as its objective."""

    def __init__(self, model: AdditiveModel, budget_ms: float) -> None:
        self.model = model
        self.starts = np.cumsum([0, *(len(row) for row in model.candidates)])
        self.latency = np.concatenate([np.asarray(row, dtype=float) for row in model.latency_ms])
        # Every plan takes one candidate a site: subtracting a site's lowest loss changes no comparison.
        self.lowest = sum(min(row) for row in model.loss)
        self.cost = np.concatenate([np.asarray(row, dtype=float) - min(row) for row in model.loss])
        self.room_ms = (budget_ms - model.intercept_ms) / model.slope - model.base_ms
        self.tolerance = TOLERANCE * max(1.0, abs(budget_ms))
        self.cuts: list[tuple[NDArray[np.int64], int]] = []  # (variables, most of them that may be taken)

    def out_of_reach(self) -> bool:
        """Return whether not even the fastest plan meets the budget."""
        return sum(min(row) for row in self.model.latency_ms) > self.room_ms + self.tolerance

    def variables(self, plan: Plan) -> NDArray[np.int64]:
        """Return the variables that the plan takes."""
        return self.starts[:-1] + np.asarray(self.model.indices(plan), dtype=np.int64)

    def solve(
        self, allowed: NDArray[np.bool_], scale: float, seconds: float
    ) -> tuple[NDArray[np.int64], float, bool] | None:
        """Return the taken variables, a lower bound of the cost and whether HiGHS proved them optimal."""
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import coo_array

        sites = len(self.model.sites)
        owner = np.repeat(np.arange(sites), np.diff(self.starts))
        # One row a site, one for the latency, one a cut.
        unit = float(np.abs(self.latency).max()) or 1.0
        rows = [owner, np.full(self.latency.size, sites)]
        columns = [np.arange(owner.size), np.arange(owner.size)]
        values = [np.ones(owner.size), self.latency / unit]
        for at, (taken, _) in enumerate(self.cuts):
            rows.append(np.full(taken.size, sites + 1 + at))
            columns.append(taken)
            values.append(np.ones(taken.size))
        upper = np.array([1.0] * sites + [self.room_ms / unit] + [float(limit) for _, limit in self.cuts])
        lower = np.array([1.0] * sites + [-np.inf] * (1 + len(self.cuts)))
        matrix = coo_array(
            (np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))),
            shape=(upper.size, owner.size),
        ).tocsr()
        with _hushed():
            result = milp(
                np.where(allowed, self.cost / scale, 0.0),
                integrality=np.ones(owner.size),
                bounds=Bounds(0, allowed.astype(float)),
                constraints=LinearConstraint(matrix, lower, upper),
                options={"time_limit": seconds, "mip_rel_gap": OPTIMAL_GAP / 10},
            )
        if result.x is None:
            return None
        taken = np.array(
            [
                start + int(np.argmax(result.x[start:stop]))
                for start, stop in zip(self.starts[:-1], self.starts[1:], strict=True)
            ]
        )
        bound = result.mip_dual_bound
        return taken, -np.inf if bound is None else float(bound) * scale, result.status == 0


@contextmanager
def _hushed() -> Iterator[None]:
    """Keep a trace that HiGHS prints now and then, whatever its options, off standard output: JSON may go there."""
    try:
        kept = os.dup(1)
    except OSError:  # there is no standard output
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def solve(
    model: AdditiveModel,
    budget_ms: float,
    *,
    avoid: Sequence[Plan] = (),
    overlap: float = 1.0,
    seconds: float = 60.0,
) -> Solution | None:
    """Return the plan of lowest predicted loss whose predicted latency is at most `budget_ms`, or None.

    Args:
        model: scores and latencies.
        budget_ms: latency budget.
        avoid: plans from which the solution must differ.
        overlap: the solution shares at most this fraction of its choices with each plan in `avoid`.
        seconds: most time for one call of HiGHS; a plan found by then is returned with `optimal` False.
    """
    if not avoid or shared_limit(len(model.sites), overlap) >= len(model.sites):
        program = _Program(model, budget_ms)
        if program.out_of_reach():
            return None
        exact = _without_cuts(program, budget_ms)
        if exact is not None:
            return exact
    return by_highs(model, budget_ms, avoid=avoid, overlap=overlap, seconds=seconds)


def by_highs(
    model: AdditiveModel,
    budget_ms: float,
    *,
    avoid: Sequence[Plan] = (),
    overlap: float = 1.0,
    seconds: float = 60.0,
) -> Solution | None:
    """Do what `solve` does, as a MILP whatever it is asked."""
    program = _Program(model, budget_ms)
    if program.out_of_reach():
        return None
    limit = shared_limit(len(model.sites), overlap)
    if limit < len(model.sites):
        program.cuts += [(program.variables(plan), limit) for plan in avoid]

    allowed = np.ones(program.cost.size, dtype=bool)
    scale = float(program.cost.max()) or 1.0
    for _ in range(_MAX_ROUNDS):
        found = program.solve(allowed, scale, seconds)
        if found is None:
            return None
        taken, bound, proven = found
        plan = model.plan((taken - program.starts[:-1]).tolist())
        if not _holds(model, plan, budget_ms, avoid, limit):
            # Within the solver's tolerance but not within ours: forbid exactly this plan.
            program.cuts.append((taken, len(model.sites) - 1))
            continue
        cost = float(program.cost[taken].sum())
        if proven and 0 < cost < 1e-2 * scale:
            # The solver's absolute tolerances were coarse for a cost this small. No candidate that costs more
            # on its own can be part of a better plan: leave those out and look again at the right scale.
            allowed = program.cost <= cost
            scale = cost
            continue
        return _solution(model, plan, program.lowest + min(bound, cost), proven)
    return None


def _without_cuts(program: _Program, budget_ms: float) -> Solution | None:
    """Return the best plan, by a dynamic program; None where that would grow too large, or rounding decides."""
    model, starts = program.model, program.starts
    spans = [slice(start, stop) for start, stop in pairwise(starts)]
    room = program.room_ms + 0.5 * program.tolerance / model.slope
    try:
        found = cheapest([program.cost[s] for s in spans], [program.latency[s] for s in spans], room)
    except TooManyStatesError:
        return None
    plan = None if found is None else model.plan(found)
    if plan is None or not _holds(model, plan, budget_ms, (), len(spans)):
        return None
    return _solution(model, plan, model.predict_loss(plan), True)


def _solution(model: AdditiveModel, plan: Plan, bound: float, proven: bool) -> Solution:
    loss = model.predict_loss(plan)
    slack = max(0.0, loss - bound)
    gap = slack / abs(loss) if loss else 0.0
    return Solution(
        plan=plan, loss=loss, ms=model.predict_ms(plan), optimal=proven and gap <= 10 * OPTIMAL_GAP, gap=gap
    )


def _holds(model: AdditiveModel, plan: Plan, budget_ms: float, avoid: Sequence[Plan], limit: int) -> bool:
    """Verify a plan against every constraint, in the model's own arithmetic: trust the solver, but check."""
    if model.predict_ms(plan) > budget_ms + TOLERANCE * max(1.0, abs(budget_ms)):
        return False
    return limit >= len(model.sites) or all(shared(plan, other) <= limit for other in avoid)


def frontier(
    model: AdditiveModel, budgets: Sequence[float], *, per_budget: int = 1, overlap: float = 0.8
) -> list[Solution]:
    """Return the best plans of each budget (ms), each plan once, by increasing latency.

    With `per_budget` above 1, a budget's further plans share at most `overlap` of their choices with those
    found for it before.
    """
    sites = len(model.sites)
    fraction = min(overlap, (sites - 1) / sites)  # at least one choice differs
    found: dict[Plan, Solution] = {}
    for budget in sorted(set(budgets), reverse=True):
        avoid: list[Plan] = []
        for _ in range(per_budget):
            solution = solve(model, budget, avoid=avoid, overlap=fraction)
            if solution is None:
                break
            avoid.append(solution.plan)
            found.setdefault(solution.plan, solution)
    return sorted(found.values(), key=lambda solution: (solution.ms, solution.loss))
