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
