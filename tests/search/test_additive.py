from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixerzoo.errors import MixerzooError
from mixerzoo.plan import KEEP_CANDIDATE, Candidate, Plan
from mixerzoo_search.additive import AdditiveModel
from mixerzoo_search.fit_quality import mape, max_error, spearman

FAST, GOOD = Candidate("none"), Candidate("static", 0.5)


def model(**changes: object) -> AdditiveModel:
    fields: dict[str, object] = {
        "sites": ("a", "b"),
        "candidates": ((KEEP_CANDIDATE, FAST), (KEEP_CANDIDATE, FAST, GOOD)),
        "loss": ((0.0, 0.5), (0.0, 1.0, 0.1)),
        "latency_ms": ((0.0, -2.0), (0.0, -3.0, -3.0)),
        "base_ms": 10.0,
    }
    return AdditiveModel(**(fields | changes))  # type: ignore[arg-type]


def plan(a: Candidate, b: Candidate) -> Plan:
    return Plan((("a", a), ("b", b)))


def test_loss_and_latency_are_sums() -> None:
    both = plan(FAST, GOOD)
    assert model().predict_loss(both) == pytest.approx(0.6)
    assert model().additive_ms(both) == pytest.approx(5.0)
    assert model(intercept_ms=1.0, slope=2.0).predict_ms(both) == pytest.approx(11.0)
    assert model().predict_ms(plan(KEEP_CANDIDATE, KEEP_CANDIDATE)) == 10.0


def test_the_fastest_plan_prefers_the_better_of_equally_fast_candidates() -> None:
    assert model().fastest() == plan(FAST, GOOD)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": ((0.0, float("nan")), (0.0, 1.0, 0.1))}, r"'none@1' at 'a' has loss nan"),
        ({"latency_ms": ((0.0, -2.0), (0.0, float("inf"), -3.0))}, r"'none@1' at 'b'"),
        ({"candidates": ((FAST, KEEP_CANDIDATE), (KEEP_CANDIDATE, FAST, GOOD))}, "`keep` first"),
        ({"loss": ((0.1, 0.5), (0.0, 1.0, 0.1))}, "`keep` at 'a' must cost nothing"),
        ({"loss": ((0.0, 0.5),)}, "one row for each of 2 sites"),
        ({"loss": ((0.0, 0.5, 1.0), (0.0, 1.0, 0.1))}, "one loss and one latency per candidate"),
        ({"slope": 0.0}, "slope positive"),
        ({"sites": ("a", "a")}, "named twice"),
    ],
)
def test_tables_that_do_not_fit_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(MixerzooError, match=message):
        model(**changes)


def test_from_scores_adds_keep_and_drops_failed_candidates() -> None:
    built = AdditiveModel.from_scores(
        {"a": {FAST: (0.5, -2.0), GOOD: (float("nan"), -1.0)}, "b": {KEEP_CANDIDATE: (0.0, 0.0)}},
        base_ms=10.0,
    )
    assert built.candidates == ((KEEP_CANDIDATE, FAST), (KEEP_CANDIDATE,))
    assert built.predict_ms(plan(FAST, KEEP_CANDIDATE)) == 8.0


def test_unknown_plans_are_named() -> None:
    with pytest.raises(MixerzooError, match=r"no score for 'static@0.5' at 'a'"):
        model().predict_loss(plan(GOOD, GOOD))
    with pytest.raises(MixerzooError, match="sites are not the model's"):
        model().predict_loss(Plan((("a", FAST),)))


@settings(deadline=None)
@given(
    slope=st.floats(0.5, 2.0),
    intercept=st.floats(-3, 3),
    additive=st.lists(st.floats(1, 20), min_size=8, max_size=30),
    outlier=st.integers(0, 7),
)
def test_calibration_recovers_a_line_in_spite_of_one_outlier(
    slope: float, intercept: float, additive: list[float], outlier: int
) -> None:
    x = np.linspace(1, 20, 20).tolist() + additive
    y = [intercept + slope * value for value in x]
    y[outlier] += 10
    fitted = model().calibrated(x, y)
    assert fitted.slope == pytest.approx(slope, abs=0.1)
    assert fitted.intercept_ms + fitted.slope * 10 == pytest.approx(intercept + slope * 10, abs=0.6)


@pytest.mark.parametrize(
    ("additive", "measured"),
    [([5.0, 6.0], [6.0, 7.0]), ([5.0] * 4, [6.0] * 4), ([5.0, 6.0, 7.0], [8.0, 7.0, 6.0])],
)
def test_a_degenerate_calibration_fits_the_offset_only(additive: list[float], measured: list[float]) -> None:
    fitted = model().calibrated(additive, measured)
    assert fitted.slope == 1.0
    assert fitted.intercept_ms == pytest.approx(1.0)


def test_calibration_without_students_changes_nothing() -> None:
    assert model().calibrated([], []) == model()
    assert model().calibrated([5.0], [float("nan")]) == model()


def test_fit_quality() -> None:
    assert mape([11, 9], [10, 10]) == pytest.approx(0.1)
    assert max_error([11, 8], [10, 10]) == pytest.approx(0.2)
    assert spearman([1, 2, 3], [10, 20, 30]) == pytest.approx(1.0)
    assert spearman([3, 2, 1], [10, 20, 30]) == pytest.approx(-1.0)


def test_fit_quality_survives_what_cannot_be_ranked() -> None:
    assert spearman([1, 1, 1], [1, 2, 3]) == 0.0
    assert spearman([1], [2]) == 0.0
    assert spearman([1, float("nan"), 2, 3], [1, 5, 2, 3]) == pytest.approx(1.0)
    assert mape([], []) == 0.0
    assert max_error([1.0], [0.0]) == 0.0
    with pytest.raises(ValueError, match="2 predictions for 1"):
        mape([1, 2], [1])
