"""Which hidden units of an MLP can go: one after the other, each time those whose loss the others can make up for best.

What a unit adds alone says little where others add much the same. Here the second layer is solved again, in closed
form, after every step, from the covariance of the hidden units: the optimal brain surgeon's criterion (Hassibi and
Stork, 1993; for layers, Frantar and Alistarh, arXiv 2208.11580), for whole units.
"""

from __future__ import annotations

import torch
from torch import Tensor

DAMPING = 1e-3  # of the mean variance of a unit: what of a covariance is rounding, or chance
STEPS = 96  # units go in so many groups at most


class Covariance:
    """Covariance of hidden units (rows, U), taken in part by part."""

    def __init__(self, units: int) -> None:
        self.rows = 0
        self._products = torch.zeros(units, units, dtype=torch.float64)
        self._sums = torch.zeros(units, dtype=torch.float64)

    def update(self, hidden: Tensor) -> None:
        """Take in further rows."""
        self.rows += len(hidden)
        self._products += (hidden.T @ hidden).double()
        self._sums += hidden.sum(0).double()

    def result(self) -> Tensor:
        """Return the covariance (U, U): a unit that is always the same is worth no more than a bias."""
        rows = max(self.rows, 1)
        mean = self._sums / rows
        return self._products / rows - torch.outer(mean, mean)


def importance(covariance: Tensor, out: Tensor) -> Tensor:
    """Return the importance of each unit (U,): the larger, the later it goes.

    It is the squared error of the output, a mean over tokens and summed over channels, once the unit and all of less
    importance are gone and the second layer is solved again for what is left.

    Args:
        covariance: (U, U) of the units.
        out: (D, U), weights of the second layer.
    """
    count = len(covariance)
    damping = DAMPING * covariance.diagonal().mean().clamp(min=1e-12)
    inverse = torch.linalg.inv(covariance.double() + damping * torch.eye(count, dtype=torch.float64))
    weights = out.T.double().clone()  # (U, D), solved again for what is left
    found = torch.zeros(count, dtype=torch.float64)
    numbers = torch.arange(count)  # of the units that the rows stand for
    alive = torch.ones(count, dtype=torch.bool)
    group, total = -(-count // STEPS), torch.zeros((), dtype=torch.float64)
    while alive.any():
        if 2 * int(alive.sum()) <= len(alive):  # rows of what is gone only cost time
            inverse, weights, numbers = inverse[alive][:, alive], weights[alive], numbers[alive]
            alive = alive[alive]
        cost = weights.square().sum(1) / inverse.diagonal()
        cost[~alive] = torch.inf
        worst, gone = cost.topk(min(group, int(alive.sum())), largest=False)
        found[numbers[gone]] = total + worst.cumsum(0)
        total = found[numbers[gone[-1]]]
        alive[gone] = False
        columns = inverse[:, gone]
        left = torch.linalg.solve(inverse[gone][:, gone], torch.cat((columns.T, weights[gone]), dim=1))
        inverse.addmm_(columns, left[:, : len(alive)], alpha=-1)
        weights.addmm_(columns, left[:, len(alive) :], alpha=-1)
        inverse.diagonal()[gone] = 1.0  # of rows that are zero now
    return found.float()
