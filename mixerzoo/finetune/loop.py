"""The steps of a global distillation, and what it goes on from when it was stopped."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mixerzoo.checkpoint import (
    load_checkpoint,
    moments,
    prefixed,
    restore_moments,
    save_checkpoint,
    unprefixed,
)
from mixerzoo.errors import MixerzooError
from mixerzoo.finetune.loss import shared_stages, whole_loss
from mixerzoo.finetune.rates import highest_rates, parameter_groups, set_rates
from mixerzoo.finetune.recipe import Images, Recipe, Tuned
from mixerzoo.hosts import Teacher, fingerprint

CLIP = 1.0  # norm of the gradient
CHECKS = 16  # held-out losses
EARLY = 4  # further ones before the first of them: a rate that is far too high shows at once
LOST = 2.0  # times the lowest held-out loss: steps that lead there are taken back
SLOWER = 0.2  # times the rate: how it goes on from there
CHECK_SHARE = 0.2  # most of the time that goes to them, where the budget is time
ROWS = 100  # of the curve
SAVE_SECONDS = 1.0  # between two checkpoints, at least
SAVE_SHARE = 0.05  # most of the time that goes to them


@dataclass(kw_only=True)
class Standing:
    """Where a training stands between two steps, beside its tensors.

    Attributes:
        step: steps taken.
        seconds: wall time spent.
        best: lowest held-out loss; not finite if there was none.
        better: whether the best state is another one than that of the student given.
        checked: seconds when the last held-out loss was known.
        slowed: what the learning rate is multiplied by, since steps were taken back.
        most: parameter -> the highest learning rate that its gradients allow; none for those without.
        losses: sum of the training losses since the last row.
        counted: how many these are.
        curve: rows.
    """

    step: int = 0
    seconds: float = 0.0
    best: float = math.inf
    better: bool = False
    checked: float = 0.0
    slowed: float = 1.0
    most: dict[str, float] = field(default_factory=dict)
    losses: float = 0.0
    counted: int = 0
    curve: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready data; JSON has no infinity."""
        return asdict(self) | {"best": _finite(self.best)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Standing:
        """Rebuild a standing."""
        return cls(**data | {"best": math.inf if data["best"] is None else data["best"]})


class Training:
    """One training: model, optimizer, order of images and standing, taken from the checkpoint if there is one."""

    def __init__(
        self,
        teacher: Teacher,
        student: nn.Module,
        images: Images,
        recipe: Recipe,
        labels: torch.Tensor | None,
        evaluate: Callable[[nn.Module], float],
        folder: Path | None,
        penalty: Callable[[nn.Module], torch.Tensor] | None = None,
    ) -> None:
        self.penalty = penalty
        self.recipe, self.images, self.evaluate, self.folder = recipe, images, evaluate, folder
        self.device = torch.device(recipe.device)
        self.teacher, self.given = _moved(teacher, self.device), student
        self.labels = labels if recipe.label_weight else None
        self.model = _trainable(copy.deepcopy(student).to(self.device))
        self.stages = teacher.host.stages(self.teacher.model), teacher.host.stages(self.model)
        self.first = self._first()
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model), lr=recipe.lr, weight_decay=0.0)
        self.generator = torch.Generator().manual_seed(recipe.seed)
        self.order = torch.empty(0, dtype=torch.int64)  # what is left of this pass over the images
        self.best: dict[str, torch.Tensor] = {}
        self.stopped: str | None = None
        self.save_cost = self.check_cost = 0.0
        self.standing = Standing()
        if not self._resume():
            began = time.perf_counter()
            self.standing.best = float(evaluate(self.model))
            self.check_cost = time.perf_counter() - began
            began = time.perf_counter()
            # A penalty wants changes beyond what the loss can promise.
            if penalty is None:
                self.standing.most = highest_rates(self.model, lambda: self._loss(self._rows()))
            self.standing.seconds = time.perf_counter() - began  # as long as a few steps: of the budget, too

    def run(self, on_progress: Callable[[float], None], on_row: Callable[[dict[str, Any]], None]) -> Tuned:
        """Go through what is left of the budget."""
        standing, recipe = self.standing, self.recipe
        saved = time.perf_counter()
        began = saved - standing.seconds
        share = recipe.share(standing.step, standing.seconds)
        while share < 1 and self._step(share):
            before = share
            now = time.perf_counter()
            standing.step, standing.seconds = standing.step + 1, now - began
            share = recipe.share(standing.step, standing.seconds)
            on_progress(min(share, 1.0))
            check = self._check_due(before, share)
            if check or _crossed(before, share, ROWS):
                on_row(self._row(self._rate(before), check=check))
                standing.seconds = time.perf_counter() - began
                standing.checked = standing.seconds if check else standing.checked
            now = time.perf_counter()
            if self.folder is not None and now - saved >= max(SAVE_SECONDS, self.save_cost / SAVE_SHARE):
                self._save(self.folder)
                saved = time.perf_counter()
                self.save_cost = saved - now
        if self.stopped is not None and standing.counted:
            on_row(self._row(self._rate(share), check=True))
        student = self.given
        if standing.better:
            student = copy.deepcopy(self.given)
            student.load_state_dict(self.best)
            student.eval().requires_grad_(False)
        return Tuned(
            student=student,
            loss=standing.best,
            steps=standing.step,
            seconds=standing.seconds,
            stopped=self.stopped,
            curve=standing.curve,
        )

    def _first(self) -> int:
        """Return the first stage that is trained.

        What the student shares with the teacher before its first change has nothing to learn, and errors at the
        embedding are the ones that all later stages make larger. A penalty may be on any site's weights.
        """
        first = shared_stages(*self.stages, self.images.batch([0]).to(self.device))
        if self.penalty is not None:
            first = min([first, *(site.stage for site in self.teacher.sites)])
        return first

    def _loss(self, rows: list[int]) -> torch.Tensor:
        batch = self.images.batch(rows).to(self.device)
        labels = None if self.labels is None else self.labels[rows].to(self.device)
        dtype = self.recipe.autocast
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            return whole_loss(
                self.teacher, *self.stages, batch, labels, self.recipe.label_weight, first=self.first
            )

    def _step(self, share: float) -> bool:
        """Take a step; False, and nothing is changed, where the loss or its gradient is not finite."""
        set_rates(self.optimizer, self.model, self.standing.most, self._rate(share), top=self.recipe.lr)
        loss = self._loss(self._rows())
        if self.penalty is not None:
            loss = loss + self.penalty(self.model)
        what, value = "loss", loss.detach()
        if torch.isfinite(value):
            self.optimizer.zero_grad()
            loss.backward()
            what, value = "norm of its gradient", nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        if not torch.isfinite(value):
            self.stopped = f"the {what} was {float(value)} at step {self.standing.step + 1}"
            return False
        self.optimizer.step()
        self.standing.losses += float(loss.detach())
        self.standing.counted += 1
        return True

    def _rate(self, share: float) -> float:
        return self.recipe.rate(share) * self.standing.slowed

    def _rows(self) -> list[int]:
        """Return the next images: without replacement, a new order each pass; the last few of a pass are left out."""
        size = min(self.recipe.batch_size, len(self.images))
        if len(self.order) < size:
            self.order = torch.randperm(len(self.images), generator=self.generator)
        rows, self.order = self.order[:size], self.order[size:]
        return [int(row) for row in rows]

    def _check_due(self, before: float, share: float) -> bool:
        """Whether to measure the held-out loss: so many times in all, the last time at the end."""
        early = share < 1 / CHECKS and _crossed(before, share, CHECKS * (EARLY + 1))
        if not early and not _crossed(before, share, CHECKS):
            return False
        spent = self.standing.seconds - self.standing.checked
        # How many steps lie between two checks must not depend on a clock where the budget does not.
        return share >= 1 or self.recipe.seconds is None or spent >= self.check_cost / CHECK_SHARE

    def _row(self, rate: float, *, check: bool) -> dict[str, Any]:
        """Add a row to the curve; with a `check`, also the held-out loss, and keep the state if that is the lowest."""
        standing = self.standing
        value: float | None = None
        lost = False
        if check:
            began = time.perf_counter()
            value = float(self.evaluate(self.model))
            self.check_cost = time.perf_counter() - began
            if value < standing.best or (math.isfinite(value) and not math.isfinite(standing.best)):
                standing.best, standing.better = value, True
                state = self.model.state_dict()
                self.best = {name: tensor.detach().cpu().clone() for name, tensor in state.items()}
            elif not value <= LOST * standing.best:
                lost = True
        row = {
            "step": standing.step,
            "seconds": round(standing.seconds, 3),
            "lr": rate,
            "loss": standing.losses / standing.counted,
            "held_out": None if value is None else _finite(value),
        }
        standing.losses, standing.counted = 0.0, 0
        standing.curve.append(row)
        if lost:
            self._take_back()
        return row

    def _take_back(self) -> None:
        """Go on from the best state, with nothing kept of the steps that led away from it, at a lower rate."""
        self.model.load_state_dict(self.best if self.standing.better else self.given.state_dict())
        self.optimizer.state.clear()
        self.standing.slowed *= SLOWER

    def _save(self, folder: Path) -> None:
        tensors = prefixed("student", self.model.state_dict()) | prefixed("best", self.best)
        tensors |= prefixed("optimizer", moments(self.model, self.optimizer))
        tensors |= {"order": self.order, "generator": self.generator.get_state()}
        save_checkpoint(folder, {"of": self._identity(), **self.standing.to_json()}, tensors)

    def _resume(self) -> bool:
        """Take up the checkpoint; False if there is none."""
        found = None if self.folder is None else load_checkpoint(self.folder)
        if found is None:
            return False
        content, tensors = found
        there, here = content.pop("of", None), self._identity()
        for name, value in here.items():
            old = there.get(name) if isinstance(there, dict) else None
            if old != value:
                raise MixerzooError(
                    f"checkpoint in '{self.folder}' is of another training ({name} is {old} there, {value} here); "
                    "give another folder, or remove it"
                )
        try:
            self.standing = Standing.from_json(content)
            self.model.load_state_dict(unprefixed("student", tensors))
            self.order = tensors["order"]
            self.generator.set_state(tensors["generator"])
        except (LookupError, TypeError, RuntimeError) as error:
            reason = (str(error).splitlines() or [repr(error)])[0]
            raise MixerzooError(
                f"checkpoint in '{self.folder}' is not one of this training ({reason}); remove it"
            ) from None
        self.best = unprefixed("best", tensors)
        restore_moments(self.model, self.optimizer, unprefixed("optimizer", tensors))
        return True

    def _identity(self) -> dict[str, Any]:
        """Return what must be the same for a training to go on."""
        recipe = asdict(self.recipe) | {"dtype": str(self.recipe.dtype)}  # as asked: devices differ in theirs
        del recipe["device"]
        return recipe | {
            "teacher": self.teacher.fingerprint[:16],
            "student": fingerprint(self.given)[:16],
            "images": len(self.images),
        }


def _trainable(model: nn.Module) -> nn.Module:
    """Return a model as it computes when it is used, with gradients.

    cuDNN has no gradients for recurrent layers in eval mode. Those without dropout compute the same in both.
    """
    model.eval().requires_grad_(True)
    for module in model.modules():
        if isinstance(module, nn.RNNBase) and not module.dropout:
            module.train()
    return model


def _moved(teacher: Teacher, device: torch.device) -> Teacher:
    """Return the teacher with its model on a device: itself on the CPU, else a copy."""
    if device.type == "cpu":
        return teacher
    return replace(teacher, model=copy.deepcopy(teacher.model).to(device))


def _crossed(before: float, after: float, parts: int) -> bool:
    """Whether one more of so many equal parts is over."""
    return int(min(after, 1.0) * parts) > int(before * parts)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
