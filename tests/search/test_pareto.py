from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna._hypervolume import compute_hypervolume

from mixerzoo_search.pareto import hypervolume, non_dominated

points = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=30)


@given(points)
def test_non_dominated_is_what_the_definition_says(points: list[tuple[int, int]]) -> None:
    front = [points[at] for at in non_dominated(points)]
    expected = {p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)}
    assert set(front) == expected
    assert len(front) == len(expected)
    assert front == sorted(front)


@given(points)
def test_hypervolume_agrees_with_optuna(points: list[tuple[int, int]]) -> None:
    inside = [p for p in points if p[0] <= 15 and p[1] <= 15]
    reference = compute_hypervolume(np.array(inside, dtype=float), np.array([15.0, 15.0])) if inside else 0.0
    assert hypervolume(points, (15, 15)) == pytest.approx(reference)


def test_values_that_are_not_finite_are_left_out() -> None:
    nan, inf = float("nan"), float("inf")
    assert non_dominated([(nan, 0), (1, 1), (inf, 0), (0, -inf)]) == [1]
    assert hypervolume([(nan, 0), (1, 1)], (2, 3)) == 2.0
    assert hypervolume([], (1, 1)) == 0.0
