"""Whether a gain is more than chance."""

from __future__ import annotations

import math

import torch

CLEAR = 2.0  # standard errors


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
