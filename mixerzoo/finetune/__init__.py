"""Global distillation of a student: the teacher's output and hidden states, all weights together.

loss = output loss + mean over stages of (1 - cosine of the hidden states) + weight * cross-entropy on labels.
The weight is 0 unless asked for, also where there are labels: a loss on the data's own targets made students worse
(Puzzle, arXiv 2411.19146), and calibration images are few enough for their labels to be learnt by heart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mixerzoo.denormals import tiny_as_zero
from mixerzoo.finetune.loop import Training
from mixerzoo.finetune.recipe import LR, Images, Pool, Recipe, Tuned
from mixerzoo.hosts import Teacher

__all__ = ["Images", "Recipe", "Tuned", "finetune", "train"]


def finetune(
    teacher: Teacher,
    student: nn.Module,
    images: Sequence[torch.Tensor] | Images,
    *,
    seconds: float | None = None,
    steps: int | None = None,
    evaluate: Callable[[nn.Module], float],
    lr: float = LR,
    seed: int = 0,
    device: str = "cpu",
    checkpoint: Path | None = None,
    on_progress: Callable[[float], None] = lambda share: None,
) -> tuple[nn.Module, float]:
    """Distil for about `seconds`, or for `steps`; return the best state by held-out loss, and that loss.

    The short form of `train`, which explains the arguments.
    """
    recipe = Recipe(steps=steps, seconds=seconds, lr=lr, seed=seed, device=device)
    tuned = train(
        teacher, student, images, recipe, evaluate=evaluate, checkpoint=checkpoint, on_progress=on_progress
    )
    return tuned.student, tuned.loss


def train(
    teacher: Teacher,
    student: nn.Module,
    images: Sequence[torch.Tensor] | Images,
    recipe: Recipe,
    *,
    evaluate: Callable[[nn.Module], float],
    labels: torch.Tensor | None = None,
    penalty: Callable[[nn.Module], torch.Tensor] | None = None,
    checkpoint: Path | None = None,
    on_progress: Callable[[float], None] = lambda share: None,
    on_row: Callable[[dict[str, Any]], None] = lambda row: None,
) -> Tuned:
    """Distil a student as a whole. Both models given are left alone.

    A loss or a gradient that is not finite ends it. With a budget of steps, a seed and a number of threads settle
    the result, however often it was stopped and gone on with in between; with more threads than one, up to rounding.

    Args:
        teacher: the teacher.
        student: a student of it.
        images: to train on, prepared: batches (B, C, H, W), or something that hands them out by number.
        recipe: for how long, and how.
        evaluate: student, on the recipe's device, to its held-out loss: lower is better.
        labels: (n,) of all images, for a recipe with a weight for them.
        penalty: student, in training, to what is added to its loss; whoever resumes must give the same.
        checkpoint: folder for what it goes on from when it was stopped; the caller removes that
            (`remove_checkpoint`) when the result is safe.
        on_progress: called with the share of the budget that is spent, in [0, 1].
        on_row: called with every new row of the curve.

    Raises:
        MixerzooError: if the checkpoint is damaged or of another training.
    """
    if recipe.label_weight and labels is None:
        raise ValueError("a weight for labels, and no labels")
    pool = images if not isinstance(images, Sequence) else Pool(torch.cat(list(images)))
    with tiny_as_zero():
        return Training(teacher, student, pool, recipe, labels, evaluate, checkpoint, penalty).run(
            on_progress, on_row
        )
