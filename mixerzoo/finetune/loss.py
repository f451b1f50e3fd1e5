"""What a global distillation makes small."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from mixerzoo.hosts import Stage, Teacher, run_stages
from mixerzoo.score import output_loss


def whole_loss(
    teacher: Teacher,
    teacher_stages: Sequence[Stage],
    student_stages: Sequence[Stage],
    batch: torch.Tensor,
    labels: torch.Tensor | None = None,
    label_weight: float = 0.0,
    *,
    first: int = 0,
) -> torch.Tensor:
    """Return the loss of a batch (B, C, H, W): outputs, hidden states and, with a weight, labels (B,).

    The hidden state of each stage is compared as a whole, so that tokens and channels count as their size does. The
    student's stages before `first` are the teacher's, and get no gradient.
    """
    with torch.no_grad():  # the student's too: what it merges or drops later on may be settled there
        wanted, given = (run_stages(stages[:first], batch) for stages in (teacher_stages, student_stages))
    hidden = torch.zeros((), device=batch.device)
    for t, s in zip(teacher_stages[first:-1], student_stages[first:-1], strict=True):
        with torch.no_grad():
            wanted = t(wanted)
        given = s(given)
        cosine = F.cosine_similarity(given.float().flatten(1), wanted.float().flatten(1), dim=-1)
        hidden = hidden + (1 - cosine).mean()
    with torch.no_grad():
        wanted = teacher_stages[-1](wanted).float()
    given = student_stages[-1](given).float()
    loss = output_loss(given, wanted, classifier=teacher.classifier).mean()
    loss = loss + hidden / max(len(teacher_stages) - 1, 1)
    return loss if labels is None else loss + label_weight * F.cross_entropy(given, labels)


@torch.no_grad()
def shared_stages(
    teacher_stages: Sequence[Stage], student_stages: Sequence[Stage], batch: torch.Tensor
) -> int:
    """Return how many stages the student shares with the teacher, from the first on, by what they make of a batch.

    The last one is never counted: something has to be left to train.
    """
    hidden = batch
    for number, (t, s) in enumerate(zip(teacher_stages[:-1], student_stages[:-1], strict=True)):
        wanted = t(hidden)
        if not torch.equal(wanted, s(hidden)):
            return number
        hidden = wanted
    return len(teacher_stages) - 1
