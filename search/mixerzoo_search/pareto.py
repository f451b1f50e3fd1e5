"""Two-dimensional Pareto fronts and their hypervolume; both coordinates are minimised."""

from __future__ import annotations

import math
from collections.abc import Sequence

Point = tuple[float, float]


def non_dominated(points: Sequence[Point]) -> list[int]:
    """Return the indices of the points that no other point beats, by increasing first coordinate.

    Of equal points the first is returned; points that are not finite are left out.
    """
    finite = [at for at, point in enumerate(points) if all(math.isfinite(value) for value in point)]
    front: list[int] = []
    lowest = math.inf
    for at in sorted(finite, key=lambda at: (*points[at], at)):
        if points[at][1] < lowest:
            front.append(at)
            lowest = points[at][1]
    return front


def hypervolume(points: Sequence[Point], reference: Point) -> float:
    """Return the area that the points dominate within `reference`; points beyond it count for nothing."""
    area, ceiling = 0.0, reference[1]
    for at in non_dominated(points):
        x, y = points[at]
        if x < reference[0] and y < ceiling:
            area += (reference[0] - x) * (ceiling - y)
            ceiling = y
    return area
