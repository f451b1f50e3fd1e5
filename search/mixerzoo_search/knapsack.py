"""The multiple-choice knapsack, exactly: Lagrangian bounds, then a dynamic program over what they leave.

One choice a row, lowest total cost, total weight within a room. The relaxation's price of weight gives a lower bound
of every plan and a reduced cost of every choice (Sinha & Zoltners, 1979): choices that no plan better than the best
known one can hold are left out, and partial plans that another one beats in both sums, or whose bound is too high, are
dropped (Pisinger, 1995). What is left is a handful of choices a row; no tolerance of a solver is involved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Row = NDArray[np.float64]
MOST_STATES = 200_000  # partial plans kept at once


class TooManyStatesError(Exception):
    """The dynamic program would grow beyond `MOST_STATES`."""


def undominated(cost: Row, weight: Row) -> NDArray[np.int64]:
    """Return the choices that no other one beats in cost at no more weight, by increasing weight.

    Of equal ones the first is returned. Some best plan holds only these.
    """
    order = np.lexsort((np.arange(cost.size), cost, weight))
    ranked = cost[order]
    before = np.concatenate([[np.inf], np.minimum.accumulate(ranked)[:-1]])
    return order[ranked < before]


def cheapest(
    costs: Sequence[Row], weights: Sequence[Row], room: float, *, known: float = np.inf
) -> list[int] | None:
    """Return the choice of each row: of all plans of total weight at most `room`, one of the lowest total cost.

    Args:
        costs: of the choices of each row; finite.
        weights: likewise.
        room: for the weights.
        known: cost of some plan within the room, where there is one: a little is saved by it.

    Returns None if nothing fits.

    Raises:
        TooManyStatesError: if the rows are so alike that the bounds leave too much to look through.
    """
    kept = [undominated(cost, weight) for cost, weight in zip(costs, weights, strict=True)]
    cost = [row[at] for row, at in zip(costs, kept, strict=True)]
    weight = [row[at] for row, at in zip(weights, kept, strict=True)]
    if sum(float(row[0]) for row in weight) > room:
        return None
    price, start = _relaxed(cost, weight, room)
    upper = _sum(cost, start)
    if known < upper:
        upper = float(np.nextafter(known, np.inf)) + 1e-9 * abs(known)
    found = _dynamic_program(cost, weight, room, price, upper)
    if found is None:  # nothing is better than the plan that the relaxation gave
        found = start
    return [int(at[choice]) for at, choice in zip(kept, found, strict=True)]


def _sum(rows: Sequence[Row], plan: Sequence[int]) -> float:
    return float(sum(float(row[at]) for row, at in zip(rows, plan, strict=True)))


def _relaxed(costs: Sequence[Row], weights: Sequence[Row], room: float) -> tuple[float, list[int]]:
    """Return the price of weight at the optimum of the linear relaxation, and a plan that fits.

    Rows are by increasing weight and decreasing cost. From the lightest plan, steps along each row's lower convex
    hull are taken by decreasing gain for their weight, until one does not fit: its gain is the price.
    """
    steps = [
        (gain, row, to)
        for row, (cost, weight) in enumerate(zip(costs, weights, strict=True))
        for gain, to in _hull_steps(cost, weight)
    ]
    steps.sort(key=lambda step: (-step[0], step[1], step[2]))
    plan = [0] * len(costs)
    left = room - _sum(weights, plan)
    price = 0.0
    for gain, row, to in steps:
        more = float(weights[row][to] - weights[row][plan[row]])
        if more <= left:
            plan[row], left = to, left - more
        elif price == 0.0:
            price = gain
    # What is left is spent on single changes, the most worth first.
    while True:
        best = (0.0, -1, -1)
        for row, (cost, weight) in enumerate(zip(costs, weights, strict=True)):
            fits = int(np.searchsorted(weight, weight[plan[row]] + left, side="right")) - 1
            gain = float(cost[plan[row]] - cost[fits])
            if fits > plan[row] and gain > best[0]:
                best = gain, row, fits
        if best[1] < 0:
            break
        left -= float(weights[best[1]][best[2]] - weights[best[1]][plan[best[1]]])
        plan[best[1]] = best[2]
    return price, plan if _sum(weights, plan) <= room else [0] * len(costs)


def _hull_steps(cost: Row, weight: Row) -> list[tuple[float, int]]:
    """Return (gain for weight, choice it leads to) of the steps along a row's lower convex hull."""
    steps: list[tuple[float, int]] = []
    at = 0
    while at < cost.size - 1:
        gains = (cost[at] - cost[at + 1 :]) / (weight[at + 1 :] - weight[at])
        best = int(gains.size - 1 - np.argmax(gains[::-1]))  # of equal ones the farthest
        steps.append((float(gains[best]), at + 1 + best))
        at += 1 + best
    return steps


@dataclass(frozen=True)
class _Layer:
    """The partial plans up to one row: each continues `parent` of the layer before with `choice`."""

    parent: NDArray[np.int64]
    choice: NDArray[np.int64]


def _dynamic_program(
    costs: Sequence[Row], weights: Sequence[Row], room: float, price: float, upper: float
) -> list[int] | None:
    """Return the best plan of cost below `upper` that fits, None if there is none."""
    priced = [cost + price * weight for cost, weight in zip(costs, weights, strict=True)]
    favourite = [int(np.argmin(row)) for row in priced]
    reduced = [row - row.min() for row in priced]  # what a choice adds to the bound of a plan
    bound = float(sum(row.min() for row in priced)) - price * room
    slack = 1e-12 * (abs(bound) + abs(upper) + price * abs(room))
    # Rows with much to choose from come last: until then there are few partial plans.
    allowed = [np.flatnonzero(bound + row <= upper + slack) for row in reduced]
    if any(not at.size for at in allowed):
        return None
    order = sorted(range(len(costs)), key=lambda row: (allowed[row].size, row))
    lightest = np.cumsum([0.0, *(float(weights[row].min()) for row in reversed(order))])[::-1]
    rest_weight = np.cumsum([0.0, *(float(weights[r][favourite[r]]) for r in reversed(order))])[::-1]
    rest_cost = np.cumsum([0.0, *(float(costs[r][favourite[r]]) for r in reversed(order))])[::-1]

    cost, weight, excess = np.zeros(1), np.zeros(1), np.zeros(1)
    layers: list[_Layer] = []
    for depth, row in enumerate(order):
        at = allowed[row]
        if cost.size * at.size > MOST_STATES:
            raise TooManyStatesError
        parent = np.repeat(np.arange(cost.size), at.size)
        choice = np.tile(at, cost.size)
        cost = (cost[:, None] + costs[row][at]).ravel()
        weight = (weight[:, None] + weights[row][at]).ravel()
        excess = (excess[:, None] + reduced[row][at]).ravel()
        # A partial plan whose favourite continuation fits is a whole plan: nothing dearer is needed any more.
        whole = (cost + rest_cost[depth + 1])[weight + rest_weight[depth + 1] <= room]
        if whole.size:
            upper = min(upper, float(whole.min()))
        keep = (weight + lightest[depth + 1] <= room + 1e-12 * abs(room)) & (bound + excess <= upper + slack)
        kept = np.flatnonzero(keep)
        kept = kept[undominated(cost[kept], weight[kept])]
        cost, weight, excess = cost[kept], weight[kept], excess[kept]
        layers.append(_Layer(parent[kept], choice[kept]))
    fits = np.flatnonzero(weight <= room)
    if not fits.size:
        return None
    state = int(fits[np.argmin(cost[fits])])
    plan = [0] * len(costs)
    for row, layer in zip(reversed(order), reversed(layers), strict=True):
        plan[row] = int(layer.choice[state])
        state = int(layer.parent[state])
    return plan
