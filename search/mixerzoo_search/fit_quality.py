"""How well predictions agree with measurements: relative error, worst error, rank agreement."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def _pairs(predicted: Sequence[float], measured: Sequence[float]) -> tuple[Array, Array]:
    """Return both as arrays, without the pairs in which either is not finite."""
    left, right = np.asarray(predicted, dtype=float), np.asarray(measured, dtype=float)
    if left.shape != right.shape:
        raise ValueError(f"{left.size} predictions for {right.size} measurements")
    finite = np.isfinite(left) & np.isfinite(right)
    return left[finite], right[finite]


def _relative_errors(predicted: Sequence[float], measured: Sequence[float]) -> Array:
    left, right = _pairs(predicted, measured)
    usable = right != 0
    errors: Array = np.abs(left[usable] - right[usable]) / np.abs(right[usable])
    return errors


def mape(predicted: Sequence[float], measured: Sequence[float]) -> float:
    """Return the mean absolute error relative to the measurement, as a fraction; 0.0 without usable pairs."""
    errors = _relative_errors(predicted, measured)
    return float(errors.mean()) if errors.size else 0.0


def max_error(predicted: Sequence[float], measured: Sequence[float]) -> float:
    """Return the largest error relative to the measurement, as a fraction; 0.0 without usable pairs."""
    errors = _relative_errors(predicted, measured)
    return float(errors.max()) if errors.size else 0.0


def spearman(predicted: Sequence[float], measured: Sequence[float]) -> float:
    """Return Spearman's rank correlation in [-1, 1]; 0.0 where a side is constant or has under 2 points."""
    left, right = _pairs(predicted, measured)
    if left.size < 2 or np.ptp(left) == 0 or np.ptp(right) == 0:
        return 0.0  # SciPy would warn and return nan
    from scipy.stats import spearmanr

    return float(np.clip(spearmanr(left, right).statistic, -1.0, 1.0))
