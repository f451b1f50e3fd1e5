"""FAR's two stages of training, an epoch at a time, and the checkpoint between two epochs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from mixerzoo.checkpoint import load_checkpoint, moments, prefixed, save_checkpoint, unprefixed
from mixerzoo.errors import MixerzooError
from mixerzoo.hosts import Teacher
from mixerzoo.objectives import token_cosine
from mixerzoo.score import output_loss
from mixerzoo_search.far.images import TrainingImages, seeded
from mixerzoo_search.far.student import Compared, Tap, set_trainable

STAGES = (1, 2)
SECOND = 1 / 3  # of the training is stage 2; published: 100 of 300 epochs
SECOND_LR = 0.1  # times the learning rate of stage 1; published: 5e-5 after 5e-4
WARM_UP = 0.05  # of a stage; published: 5 of 200 and of 100 epochs
WARM_LR, LAST_LR = 0.02, 0.002  # times the highest learning rate 5e-4; published: 1e-5 and 1e-6
WEIGHT_DECAY = 0.05
CLIP = 1.0  # norm of the gradient


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How long a stage is: epochs or, if None, seconds of training."""

    epochs: int | None
    seconds: float

    def share(self, epochs: float, seconds: float) -> float:
        """Return which share of the stage is over after so many epochs and seconds."""
        return seconds / self.seconds if self.epochs is None else epochs / self.epochs

    @classmethod
    def of(cls, stage: int, *, epochs: int | None, minutes: float | None) -> Pace:
        """Return the pace of a stage of a training of so many epochs or minutes."""
        second = None if epochs is None else max(1, round(epochs * SECOND))
        if epochs is not None and second is not None:
            return cls(epochs=epochs - second if stage == 1 else second, seconds=math.inf)
        share = 1 - SECOND if stage == 1 else SECOND
        return cls(epochs=None, seconds=60 * (minutes or 0.0) * share)


def learning_rate(share: float, highest: float) -> float:
    """Return the rate after a share of a stage: a linear warm-up, then a cosine."""
    if share < WARM_UP:
        return highest * (WARM_LR + (1 - WARM_LR) * share / WARM_UP)
    fall = 0.5 * (1 + math.cos(math.pi * min(1.0, (share - WARM_UP) / (1 - WARM_UP))))
    return highest * (LAST_LR + (1 - LAST_LR) * fall)


@dataclass(kw_only=True)
class Standing:
    """Where a training stands, between two epochs.

    Attributes:
        stage: 1 or 2; 3 when both are over.
        epoch: epochs of this stage that are over.
        seconds: training seconds of this stage.
        curve: a row an epoch, of both stages.
        measured: `start` and `stage 1` -> figures on test images.
    """

    stage: int = 1
    epoch: int = 0
    seconds: float = 0.0
    curve: list[dict[str, Any]] = field(default_factory=list)
    measured: dict[str, dict[str, Any]] = field(default_factory=dict)


class Trainer:
    """Trains a student of a teacher.

    Args:
        teacher: the teacher.
        student: its student, changed in place.
        kept: what is compared in stage 1.
        images: what it is trained on.
        batch_size: even, and no more than there are images.
        lr: the highest learning rate of stage 1.
        seed: of the order and the augmentation of the images.
    """

    def __init__(
        self,
        teacher: Teacher,
        student: nn.Module,
        kept: Compared,
        images: TrainingImages,
        *,
        batch_size: int,
        lr: float,
        seed: int,
    ) -> None:
        self.teacher, self.student, self.kept, self.images = teacher, student, kept, images
        self.batch_size, self.lr, self.seed = batch_size, lr, seed

    def optimizer(self, stage: int) -> torch.optim.AdamW:
        """Return a fresh optimizer of what trains in a stage; vectors and position embeddings do not decay."""
        from timm.optim import param_groups_weight_decay

        set_trainable(self.student, stage, self.kept)
        spared = getattr(self.student, "no_weight_decay", set)
        groups = param_groups_weight_decay(self.student, WEIGHT_DECAY, no_weight_decay_list=spared())
        return torch.optim.AdamW(groups, lr=self.lr)

    def epoch(
        self,
        standing: Standing,
        optimizer: torch.optim.Optimizer,
        pace: Pace,
        report: Callable[[float], None],
    ) -> dict[str, Any]:
        """Train for an epoch, or for what is left of the stage's seconds; returns mean losses and advances `standing`.

        Raises:
            MixerzooError: if a loss is not finite.
        """
        stage, sums, steps = standing.stage, dict.fromkeys(("loss", "task", "tokens"), 0.0), 0
        highest = self.lr if stage == 1 else self.lr * SECOND_LR
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        began, rate, spent = time.perf_counter(), 0.0, 0.0
        self.student.train()
        with seeded(self.seed, stage, standing.epoch):
            order = torch.randperm(len(self.images)).split(self.batch_size)
            whole = [rows for rows in order if len(rows) == self.batch_size]
            for rows in whole:
                share = pace.share(standing.epoch + steps / len(whole), standing.seconds + spent)
                report(share)
                if share >= 1:
                    break
                rate = learning_rate(share, highest)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                losses = self.losses(*self.images.batch(rows.tolist()), stage=stage)
                loss = sum(losses.values(), torch.zeros(()))
                if not torch.isfinite(loss):
                    raise MixerzooError(
                        f"the loss is {loss.item()} in epoch {standing.epoch + 1} of stage {stage}; "
                        f"give a lower --lr than {self.lr:g}, and another --out"
                    )
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, CLIP)
                optimizer.step()
                steps += 1
                for name, value in (losses | {"loss": loss}).items():
                    sums[name] += float(value.detach())
                spent = time.perf_counter() - began
        self.student.eval()
        standing.epoch += 1
        standing.seconds += spent
        means = {name: value / steps for name, value in sums.items() if stage == 1 or name != "tokens"}
        return {
            "stage": stage,
            "epoch": standing.epoch,
            "steps": steps,
            "seconds": round(spent, 3),
            "lr": rate,
            **means,
        }

    def losses(
        self, images: torch.Tensor, target: torch.Tensor | None, *, stage: int
    ) -> dict[str, torch.Tensor]:
        """Return the task loss and, in stage 1, the token cosines summed over sites.

        The task loss is the cross-entropy on the soft labels `target`; without them, the loss of the output against
        the teacher's.
        """
        kept, losses = self.kept, {}
        with Tap(kept.teacher, inputs=kept.inputs) as wanted, Tap(kept.student, inputs=kept.inputs) as given:
            if stage == 1 or target is None:
                with torch.no_grad():
                    expected = self.teacher.model(images)
            output = self.student(images)
        if target is None:
            losses["task"] = output_loss(output, expected, classifier=self.teacher.classifier).mean()
        else:
            losses["task"] = F.cross_entropy(output, target)
        if stage == 1:
            losses["tokens"] = torch.stack(
                [token_cosine(given.seen[site], wanted.seen[site]) for site in kept.student]
            ).sum()
        return losses


def save_standing(
    folder: Path, standing: Standing, student: nn.Module, optimizer: torch.optim.Optimizer | None
) -> None:
    """Write where a training stands, with the student's weights and the optimizer's moments, as its checkpoint."""
    tensors = prefixed("student", student.state_dict())
    if optimizer is not None:
        tensors |= prefixed("optimizer", moments(student, optimizer))
    save_checkpoint(folder, asdict(standing), tensors)


def load_standing(folder: Path, student: nn.Module) -> tuple[Standing, dict[str, torch.Tensor]] | None:
    """Load the student's weights in place; return the standing and the moments, or None if there are none.

    Raises:
        MixerzooError: if the checkpoint is damaged.
    """
    found = load_checkpoint(folder)
    if found is None:
        return None
    content, tensors = found
    student.load_state_dict(unprefixed("student", tensors))
    return Standing(**content), unprefixed("optimizer", tensors)


def even(batch_size: int, images: int) -> int:
    """Return the batch size, less where there are fewer images, and even: mixup takes pairs."""
    return min(batch_size, images) // 2 * 2
