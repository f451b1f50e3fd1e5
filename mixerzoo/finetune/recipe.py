"""What a global distillation is told, and what it gives back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

BATCH = 16
LR = 1e-4
WARM_UP, WARM_LR = 0.05, 0.1  # share of the budget, and where the rate begins, times the highest


class Images(Protocol):
    """Prepared images by number."""

    def __len__(self) -> int: ...

    def batch(self, rows: Sequence[int]) -> torch.Tensor:
        """Return the images (B, C, H, W) of these numbers."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a student is distilled as a whole.

    Attributes:
        steps: gradient steps; or None for `seconds`.
        seconds: wall time, over all starts; or None for `steps`.
        lr: highest learning rate of AdamW: a linear warm-up, then a cosine down to 0. Tensors whose steps would promise
            more than their share of the loss have a lower one.
        batch_size: images in a step.
        label_weight: of the cross-entropy on labels.
        seed: of the order of images.
        device: where it is trained.
        dtype: of autocast; bfloat16 where the device is a GPU that has it, else none, unless given.
    """

    steps: int | None = None
    seconds: float | None = None
    lr: float = LR
    batch_size: int = BATCH
    label_weight: float = 0.0
    seed: int = 0
    device: str = "cpu"
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.seconds is None):
            raise ValueError("give one of steps and seconds")

    def share(self, step: int, seconds: float) -> float:
        """Return which share of the budget is spent after so many steps and seconds."""
        spent, whole = (step, self.steps) if self.seconds is None else (seconds, self.seconds)
        return spent / whole if whole is not None and whole > 0 else 1.0

    def rate(self, share: float) -> float:
        """Return the learning rate after a share of the budget."""
        if share < WARM_UP:
            return self.lr * (WARM_LR + (1 - WARM_LR) * share / WARM_UP)
        return self.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, (share - WARM_UP) / (1 - WARM_UP))))

    @property
    def autocast(self) -> torch.dtype | None:
        """What autocast computes in; None for no autocast."""
        dtype = self.dtype
        if dtype is None and torch.device(self.device).type == "cuda" and torch.cuda.is_bf16_supported():
            dtype = torch.bfloat16
        return None if dtype == torch.float32 else dtype


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What came of it.

    Attributes:
        student: the best state by held-out loss, on the CPU; the student given, if none was better than that.
        loss: its held-out loss.
        steps: gradient steps that were taken.
        seconds: wall time of them, over all starts.
        stopped: why it ended before its budget was spent, or None.
        curve: rows of `step`, `seconds`, `lr`, `loss` (mean since the row before) and `held_out` (None between checks).
    """

    student: nn.Module
    loss: float
    steps: int
    seconds: float
    stopped: str | None
    curve: list[dict[str, Any]]


class Pool:
    """Images (n, C, H, W) in memory."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, rows: Sequence[int]) -> torch.Tensor:
        """Return some of them."""
        return self.images[list(rows)]
