"""Whether a gain is more than chance."""

from __future__ import annotations

import math

import torch

CLEAR = 2.0  # standard errors
QUANTILE = 1.96  # of the standard normal distribution, for an interval of 95 %
CHANGE = (
    "less the teacher's, 95 %"  # what tables call the interval of an accuracy less the teacher's, in points
)


def is_clear(gains: torch.Tensor) -> bool:
    """Say whether the mean of gains (n,), one an image, is more than twice its standard error; not where it is NaN."""
    if len(gains) < 2:
        return False
    return float(gains.mean()) > CLEAR * float(gains.std()) / math.sqrt(len(gains))


def has_helped(gains: torch.Tensor, further: torch.Tensor) -> bool:
    """Say whether a training has helped, by its gains, one an image; not where they are NaN.

    Args:
        gains: (n,), on images that its best state was chosen on, so that it looks better there than it is.
        further: (m,), on others, which alone decide; where there are none, it must be clearly better on the former.
    """
    return float(further.mean()) > 0 if len(further) else is_clear(gains)


def change_interval(before: torch.Tensor, after: torch.Tensor) -> tuple[float, float]:
    """Return the 95 % interval of a change of accuracy, in [-1, 1], by which answers of the same images were right.

    Half an image is added to each of the four cases, so that few images without any change do not look like certainty
    (Agresti and Min 2005, Simple improved confidence intervals for comparing matched proportions).

    Args:
        before: (n,), whether the one model's answers are right.
        after: (n,), whether the other one's are.
    """
    n = len(before) + 2
    gained = (int((after & ~before).sum()) + 0.5) / n
    lost = (int((before & ~after).sum()) + 0.5) / n
    change = gained - lost
    reach = QUANTILE * math.sqrt((gained + lost - change**2) / n)
    return max(-1.0, change - reach), min(1.0, change + reach)


def change_text(low: float | None, high: float | None) -> str:
    """Return the interval of a change of accuracy in points, such as "-0.8 to +0.3"; nothing where it is not known."""
    return "" if low is None or high is None else f"{100 * low:+.1f} to {100 * high:+.1f}"
