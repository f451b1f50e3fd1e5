"""The true loss of students against the teacher, on held-out images, with the unchanged prefix cached.

KL(teacher || student) of the logits for a classifier, 1 - cosine for embeddings. Labels are never needed; where
there are some, accuracy is reported too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from mixerzoo.hosts import Teacher, assemble, run_stages
from mixerzoo.significance import change_interval

HARMLESS = 1e-4  # of the loss of a constant answer: a student that loses less is as good as its teacher

Keep = Literal["prefixes", "images", "nothing"]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How far a student is from its teacher.

    Attributes:
        loss: KL in nats, or 1 - cosine; a mean over images.
        agreement: share of images with the teacher's answer; for embeddings, the mean cosine. In [0, 1].
        accuracy: share of images with the right answer, or None without labels or classes.
        change_low: of the 95 % interval of the accuracy less the teacher's, the lower end in [-1, 1]; or None likewise.
        change_high: its upper end.
    """

    loss: float
    agreement: float
    accuracy: float | None
    change_low: float | None = None
    change_high: float | None = None

    def to_json(self) -> dict[str, float | None]:
        """Return JSON-ready figures; those that are not finite become None."""
        return {
            name: value if value is not None and math.isfinite(value) else None
            for name, value in asdict(self).items()
        }


def output_loss(output: torch.Tensor, target: torch.Tensor, *, classifier: bool) -> torch.Tensor:
    """Return the loss (B,) of outputs (B, C) against the teacher's."""
    if classifier:
        return F.kl_div(
            output.log_softmax(-1), target.log_softmax(-1), log_target=True, reduction="none"
        ).sum(-1)
    return 1 - F.cosine_similarity(output.flatten(1), target.flatten(1), dim=-1)


def judge(
    output: torch.Tensor, target: torch.Tensor, labels: torch.Tensor | None, *, classifier: bool
) -> Evaluation:
    """Compare a student's outputs (B, C) with the teacher's and, if given, with labels (B,)."""
    loss = float(output_loss(output, target, classifier=classifier).mean())
    if not classifier:
        return Evaluation(loss=loss, agreement=min(1.0, max(0.0, 1 - loss)), accuracy=None)
    answers, theirs = output.argmax(-1), target.argmax(-1)
    agreement = float((answers == theirs).float().mean())
    if labels is None:
        return Evaluation(loss=loss, agreement=agreement, accuracy=None)
    right = answers == labels
    low, high = change_interval(theirs == labels, right)
    return Evaluation(
        loss=loss,
        agreement=agreement,
        accuracy=float(right.float().mean()),
        change_low=low,
        change_high=high,
    )


class Judge:
    """Evaluates students of one teacher on one set of images.

    The teacher's hidden state before every stage is kept, in float32: a student runs from its first changed
    stage on. That is a lot of memory where few students are judged, or none that begins as the teacher does:
    with `keep="images"` only these are kept, and every student runs from the first stage on. With `keep="nothing"`
    there are as many images as one likes: `batches` is gone through anew for every student, and must allow that.
    """

    @torch.inference_mode()
    def __init__(
        self,
        teacher: Teacher,
        batches: Iterable[torch.Tensor],
        labels: torch.Tensor | None,
        *,
        keep: Keep = "prefixes",
        on_batch: Callable[[int], None] = lambda done: None,
    ) -> None:
        self.teacher = teacher
        self.labels = labels
        stages = teacher.host.stages(teacher.model)
        self._batches = batches if keep == "nothing" else None
        self._hidden: list[list[torch.Tensor]] = []  # batch -> stage -> its input
        outputs = []
        for done, batch in enumerate(batches):
            states = [batch]
            for stage in stages:
                states.append(stage(states[-1]))
            outputs.append(states.pop())
            if keep != "nothing":
                self._hidden.append(states if keep == "prefixes" else states[:1])
            on_batch(done + 1)
        self.target = torch.cat(outputs)

    @property
    def images(self) -> int:
        """Number of images."""
        return len(self.target)

    @torch.inference_mode()
    def outputs(self, student: nn.Module, *, first: int = 0) -> torch.Tensor:
        """Return the student's outputs (B, C); its stages before `first` are the teacher's."""
        stages = self.teacher.host.stages(student)
        if self._batches is not None:
            return torch.cat([run_stages(stages, batch, first=0) for batch in self._batches])
        kept = min(first, len(self._hidden[0]) - 1)
        return torch.cat([run_stages(stages, states[kept], first=kept) for states in self._hidden])

    def losses(self, student: nn.Module) -> torch.Tensor:
        """Return a student's loss on each image, (n,)."""
        return output_loss(self.outputs(student), self.target, classifier=self.teacher.classifier)

    def evaluate(self, student: nn.Module, *, first: int = 0) -> Evaluation:
        """Evaluate a student whose stages before `first` are the teacher's."""
        outputs = self.outputs(student, first=first)
        return judge(outputs, self.target, self.labels, classifier=self.teacher.classifier)

    def evaluate_modules(self, modules: Mapping[str, nn.Module]) -> Evaluation:
        """Evaluate the teacher with `modules` at the named sites."""
        first = min((self.teacher.site(name).stage for name in modules), default=0)
        return self.evaluate(assemble(self.teacher.model, modules), first=first)

    def constant_loss(self) -> float:
        """Return the loss of a student that answers the same for every image: the worst to be expected."""
        if self.teacher.classifier:
            constant = self.target.softmax(-1).mean(0, keepdim=True).clamp_min(1e-12).log()
        else:
            constant = self.target.mean(0, keepdim=True)
        answers = constant.expand_as(self.target)
        return float(output_loss(answers, self.target, classifier=self.teacher.classifier).mean())

    def harmless_loss(self) -> float:
        """Return the loss up to which a student is as good as its teacher."""
        return HARMLESS * self.constant_loss()

    def teacher_evaluation(self) -> Evaluation:
        """Return the teacher's own figures: loss 0, agreement 1."""
        return judge(self.target, self.target, self.labels, classifier=self.teacher.classifier)
