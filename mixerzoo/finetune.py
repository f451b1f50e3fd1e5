"""Short global distillation of a student: the teacher's output and hidden states, no labels.

loss = output loss + mean over stages of (1 - cosine of the hidden states) (Puzzle, arXiv 2411.19146: adding a
language-modelling or label loss hurts).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from mixerzoo.hosts import Teacher
from mixerzoo.score import output_loss

BATCH = 16


def finetune(
    teacher: Teacher,
    student: nn.Module,
    images: Sequence[torch.Tensor],
    *,
    seconds: float,
    evaluate: Callable[[nn.Module], float],
    lr: float = 1e-4,
    seed: int = 0,
    on_progress: Callable[[float], None] = lambda share: None,
) -> tuple[nn.Module, float]:
    """Distil for about `seconds`; return the best state seen by `evaluate` (lower is better) and its value.

    The learning rate follows a cosine over the time. A loss that is not finite ends the training. The student
    given is left alone; it is what comes back if nothing is better.

    Args:
        teacher: the teacher.
        student: a student of it.
        images: calibration batches (B, C, H, W), prepared.
        seconds: wall time to spend.
        evaluate: student to its held-out loss.
        lr: the highest learning rate of AdamW.
        seed: of the order of images.
        on_progress: called with the share of the time that is gone, in [0, 1].
    """
    model = _own_copy(student)
    best, best_loss = student, evaluate(student)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    pool = torch.cat(list(images))
    generator = torch.Generator().manual_seed(seed)
    teacher_stages, student_stages = teacher.host.stages(teacher.model), teacher.host.stages(model)
    began = checked = time.perf_counter()
    share = 0.0 if seconds > 0 else 1.0
    while share < 1:
        batch = pool[torch.randint(len(pool), (BATCH,), generator=generator)]
        optimizer.param_groups[0]["lr"] = lr * min(1.0, share / 0.05 + 0.1) * _cosine(share)
        loss = _loss(teacher, teacher_stages, student_stages, batch)
        if not torch.isfinite(loss):
            break
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        now = time.perf_counter()
        share = (now - began) / seconds
        on_progress(min(share, 1.0))
        if now - checked > seconds / 8 or share >= 1:
            value = evaluate(model)
            checked = time.perf_counter()
            if value < best_loss:
                best, best_loss = _own_copy(model), value
    return best.eval().requires_grad_(False), best_loss


def _loss(
    teacher: Teacher,
    teacher_stages: Sequence[Callable[[torch.Tensor], torch.Tensor]],
    student_stages: Sequence[Callable[[torch.Tensor], torch.Tensor]],
    batch: torch.Tensor,
) -> torch.Tensor:
    wanted = given = batch
    hidden = torch.zeros(())
    for t, s in zip(teacher_stages[:-1], student_stages[:-1], strict=True):
        with torch.no_grad():
            wanted = t(wanted)
        given = s(given)
        hidden = hidden + (1 - F.cosine_similarity(given.flatten(1), wanted.flatten(1), dim=-1)).mean()
    with torch.no_grad():
        wanted = teacher_stages[-1](wanted)
    given = student_stages[-1](given)
    output = output_loss(given, wanted, classifier=teacher.classifier).mean()
    return output + hidden / max(len(teacher_stages) - 1, 1)


def _own_copy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).eval().requires_grad_(True)


def _cosine(share: float) -> float:
    return float(0.5 * (1 + torch.cos(torch.tensor(min(share, 1.0) * torch.pi))))
