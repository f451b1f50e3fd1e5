"""What the gradient steps of distillation make small: functions of a mixer's outputs and the teacher's, (B, N, D)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch.nn import functional as F

Objective = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]


def squared(out: torch.Tensor, y: torch.Tensor, spread: float) -> torch.Tensor:
    """Return the mean squared error over `spread`, the targets' mean squared distance from their mean."""
    return (out - y).square().mean() / spread


def token_cosine(out: torch.Tensor, y: torch.Tensor, spread: float = 1.0) -> torch.Tensor:
    """Return 1 minus the mean cosine along the tokens, one for each sample and channel.

    The objective of FAR (arXiv 2505.21535): what matters is where in the sequence a channel is large, not how large.
    """
    return 1 - F.cosine_similarity(out, y, dim=1).mean()


OBJECTIVES: Mapping[str, Objective] = {"nmse": squared, "cosine": token_cosine}
