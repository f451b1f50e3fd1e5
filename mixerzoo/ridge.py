"""Closed-form readouts: ridge regression on streamed Gram matrices, the penalty chosen on held-out rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

PENALTIES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)  # relative to the mean squared feature
STRONGER = (1.0, 10.0)  # more of them for a solution that there is already: in the limit it stays as it is
# An error on so many rows that is so many times what the sums tell, and so much of the spread more,
# shows that the sums are wrong.
SAMPLE, MOST_SAMPLE, UNLIKELY, SLACK = 256, 1024, 2.0, 0.01
STRIPS = 4  # of a Gram matrix: what is below them need not be multiplied


Sums = tuple[torch.Tensor, torch.Tensor]


def column_sums(y: torch.Tensor) -> Sums:
    """Return the sum and the sum of squares of each column of y (rows, T), in float64."""
    return y.sum(0).double(), torch.linalg.vector_norm(y, dim=0).double().square()


class Gram:
    """Streams rows of features (rows, F) and targets (rows, T) into the sums that least squares needs.

    A constant feature is added for the bias. Blocks are multiplied in float32, and their sums kept in float64. What is
    multiplied is the features less their mean in the first block: pretrained transformers have channels that are
    always hundreds of times larger than the others, and the rounding errors of their squares would drown those.

    Attributes:
        yy: sum of squares of each target (T,).
        y: sum of each target (T,).
        rows: how many there were.
        sample: some rows of a block, as they were.
    """

    def __init__(self, features: int, targets: int) -> None:
        self._xx = torch.zeros(features, features, dtype=torch.float64)
        self._xy = torch.zeros(features, targets, dtype=torch.float64)
        self._x = torch.zeros(features, dtype=torch.float64)
        self._center = torch.zeros(features)
        self._moved = torch.empty(0, features)  # a block less its center: the same memory for all of them
        self._whole: tuple[torch.Tensor, torch.Tensor] | None = None
        self.yy = torch.zeros(targets, dtype=torch.float64)
        self.y = torch.zeros(targets, dtype=torch.float64)
        self.rows = 0.0
        self.sample = torch.zeros(0, features), torch.zeros(0, targets)

    def update(self, x: torch.Tensor, y: torch.Tensor, sums: Sums | None = None) -> None:
        """Add rows: x (rows, F), y (rows, T), with the sums of y if they are known."""
        self._whole = None
        if not self.rows:
            self._center = x.mean(0)
        if len(self.sample[0]) < min(len(x), MOST_SAMPLE):
            self.sample = x[:MOST_SAMPLE].clone(), y[:MOST_SAMPLE].clone()
        if len(self._moved) < len(x):
            self._moved = torch.empty_like(x)
        x = torch.sub(x, self._center, out=self._moved[: len(x)])
        features = x.shape[1]
        width = max(-(-features // STRIPS), 1)
        for first in range(0, features, width):
            last = min(first + width, features)
            strip = x[:, first:last].T @ x[:, first:]
            self._xx[first:last, first:] += strip
            self._xx[last:, first:last] += strip[:, last - first :].T
        self._xy += x.T @ y
        self._x += x.sum(0)
        total, squares = column_sums(y) if sums is None else sums
        self.y += total
        self.yy += squares
        self.rows += len(x)

    @property
    def xx(self) -> torch.Tensor:
        """Products of the features, the constant one last (F + 1, F + 1)."""
        return self._products()[0]

    @property
    def xy(self) -> torch.Tensor:
        """Products of the features, the constant one last, with the targets (F + 1, T)."""
        return self._products()[1]

    def _products(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self._whole is None:
            center = self._center.double()
            total = self._x + self.rows * center
            xx, xy = (
                torch.zeros(len(center) + 1, n, dtype=torch.float64) for n in (len(center) + 1, len(self.y))
            )
            xx[:-1, :-1] = self._xx + torch.outer(center, self._x) + torch.outer(total, center)
            xx[-1, :-1] = xx[:-1, -1] = total
            xx[-1, -1] = self.rows
            xy[:-1] = self._xy + torch.outer(center, self.y)
            xy[-1] = self.y
            self._whole = xx, xy
        return self._whole

    def fade(self, share: float) -> None:
        """Let the rows so far count for this share of what they did."""
        self._whole = None
        for total in (self._xx, self._xy, self._x, self.yy, self.y):
            total *= share
        self.rows *= share

    def error(self, solution: torch.Tensor) -> float:
        """Return the sum of squared errors of a solution (F + 1, T) on these rows."""
        quadratic = ((self.xx @ solution) * solution).sum(0)
        return float((quadratic - 2 * (self.xy * solution).sum(0) + self.yy).sum().clamp_min(0))

    def spread(self) -> float:
        """Return sum |y - mean(y)|^2, the denominator of the NMSE."""
        return float((self.yy - self.y.square() / max(self.rows, 1)).sum())

    def nmse(self, solution: torch.Tensor) -> float:
        """Return the error of a solution (F + 1, T) over the spread."""
        return self.error(solution) / max(self.spread(), 1e-30)

    def is_true(self, solution: torch.Tensor, nmse: float) -> bool:
        """Say whether the NMSE of a solution (F + 1, T) on some of the rows is about the one that the sums tell.

        Blocks are multiplied in float32. Where features hardly differ, beside a few that are far larger, a small
        penalty lets a solution fit the rounding errors of that, and the sums say that it is an excellent one.
        """
        x, y = self.sample
        if len(x) < SAMPLE:
            return True  # too few to tell
        found = (torch.addmm(solution[-1].float(), x, solution[:-1].float()) - y).square().sum()
        seen = float(found) / len(x) * self.rows / max(self.spread(), 1e-30)
        return seen <= UNLIKELY * nmse + SLACK


@dataclass(frozen=True, kw_only=True)
class Solution:
    """A linear map and how well it does: weight (T, F), bias (T,), held-out NMSE, the penalty it took."""

    weight: torch.Tensor
    bias: torch.Tensor
    nmse: float
    penalty: float


def ridge(
    gram: Gram, penalty: float, *, bias: bool = True, start: torch.Tensor | None = None
) -> torch.Tensor | None:
    """Return the ridge solution (F + 1, T) for a penalty relative to the mean squared feature; None if none is finite.

    Without `bias` the map goes through the origin, for layers that have none. With `start` (F + 1, T) the penalty
    is on the change of that solution, not on its size.
    """
    solution, missing = (
        (torch.zeros_like(gram.xy), gram.xy) if start is None else (start.clone(), gram.xy - gram.xx @ start)
    )
    used = len(gram.xx) if bias else len(gram.xx) - 1
    features = len(gram.xx) - 1
    size = float(gram.xx.diagonal()[:features].mean()) if features else 1.0
    penalized = gram.xx[:used, :used].clone()
    penalized.diagonal()[:features] += penalty * size
    penalized.diagonal()[features:] += 1e-9 * gram.rows  # the bias is not shrunk
    factor, info = torch.linalg.cholesky_ex(penalized)
    if int(info) != 0:
        return None
    solution[:used] += torch.cholesky_solve(missing[:used], factor)
    return solution if torch.isfinite(solution).all() else None


def solve(
    train: Gram, held_out: Gram, *, bias: bool = True, start: torch.Tensor | None = None
) -> Solution | None:
    """Return the ridge solution whose penalty does best on the held-out rows; None if none is finite and true.

    `bias` and `start` are those of `ridge`.
    """
    penalties = PENALTIES if start is None else PENALTIES + STRONGER

    def solution_of(number: int) -> Solution | None:
        solution = ridge(train, penalties[number], bias=bias, start=start)
        if solution is None:
            return None
        nmse = held_out.nmse(solution)
        if not held_out.is_true(solution, nmse):
            return None
        return Solution(
            weight=solution[:-1].T.float().contiguous(),
            bias=solution[-1].float().contiguous(),
            nmse=nmse,
            penalty=penalties[number],
        )

    return _lowest(solution_of, len(penalties))


def _lowest(solution_of: Callable[[int], Solution | None], count: int) -> Solution | None:
    """Return the best solution of a row in which the error falls, then rises: go downhill from the middle.

    Where the smallest penalties have no solution, the hill is taken to rise there.
    """
    tried: dict[int, Solution | None] = {}

    def error(number: int) -> float:
        if number not in range(count):
            return math.inf
        if number not in tried:
            tried[number] = solution_of(number)
        found = tried[number]
        return math.inf if found is None or math.isnan(found.nmse) else found.nmse

    at = next((n for n in range(count // 2, count) if error(n) < math.inf), None)
    if at is None:
        return None
    while True:
        lower = next((number for number in (at - 1, at + 1) if error(number) < error(at)), None)
        if lower is None:
            return tried[at]
        at = lower
