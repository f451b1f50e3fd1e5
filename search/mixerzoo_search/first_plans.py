"""The plans that a study begins with: exact ones near the budget, and a sweep of the frontier where it is of use."""

from __future__ import annotations

import numpy as np

from mixerzoo_search import exact
from mixerzoo_search.additive import AdditiveModel
from mixerzoo_search.context import Context

SWEEP = 12  # budgets of the exact frontier
NEAR = (1.0, 0.97, 0.94)  # times the budget: its own plans leave room for the error of the prediction
# Of the loss of a constant answer. Stitched students lose more than the sum that is predicted: on DINOv2-S, those of a
# third of it were no better than that answer.
HOPEFUL = 1 / 3
HALVINGS = 6  # of the span of latencies, until the first hopeful budget is known


def first_plans(context: Context, model: AdditiveModel) -> list[exact.Solution]:
    """Solve for budgets near the one asked for, and for a sweep up to the teacher; the fastest plan first.

    The sweep begins where plans are predicted to do better than a constant answer. Faster ones would be measured for
    long, since their predictions are poor, and lead the study to others like them.
    """
    worst = context.study_judge.constant_loss()
    begin = min(context.budget_ms, fastest_hopeful(model, context.teacher_ms, HOPEFUL * worst))
    sweep = np.linspace(begin, context.teacher_ms, SWEEP + 1)[:-1].tolist()
    near = exact.frontier(model, [share * context.budget_ms for share in NEAR], per_budget=2)
    plans = {solution.plan: solution for solution in [*near, *exact.frontier(model, sweep)]}
    return sorted(plans.values(), key=lambda solution: solution.ms)


def fastest_hopeful(model: AdditiveModel, slowest_ms: float, most_loss: float) -> float:
    """Return the lowest budget whose exact plan is predicted to lose no more than that; `slowest_ms` if none is."""

    def hopeful(budget_ms: float) -> bool:
        solution = exact.solve(model, budget_ms)
        return solution is not None and solution.loss <= most_loss

    low, high = model.predict_ms(model.fastest()), slowest_ms
    if hopeful(low):
        return low
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if hopeful(middle) else (middle, high)
    return high
