"""What a peer is told, what it gives back, and how it finds the largest student within a budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from mixerzoo.capture import Capture, capture
from mixerzoo.data import Dataset, image_batches, load_labels
from mixerzoo.hosts import Teacher
from mixerzoo.latency import Rounds, Stopwatch, Timing
from mixerzoo.pruning.targets import ATTEMPTS, CLOSE, CONFIRM, TRIES
from mixerzoo.score import Evaluation, Judge, judge, output_loss
from mixerzoo_search.evaluate import FINAL
from mixerzoo_search.finetuning.images import PreparedImages
from mixerzoo_search.image_parts import ImageParts, enough_to_refit

FEW = 64  # validation images, where many students are to be judged
MEMORY_GIB = 1.0  # of the teacher's activations; more of them are kept in files
STEP = 50  # a part of all levels that a student is made smaller by where it missed the budget when measured again


class Cannot(Exception):
    """A peer has no student within the budget; the message says why."""


class Missing(Exception):
    """What a peer needs is not installed; the message says how to get it."""


class Exam:
    """Judges students of any kind on some images: all that is asked of one is to map images to outputs."""

    def __init__(self, teacher: Teacher, data: Dataset, indices: Sequence[int]) -> None:
        self.teacher, self.labels = teacher, load_labels(data, indices)
        self.batches = list(image_batches(data, indices, teacher.image))
        self.target = self._outputs(teacher.model)

    def __len__(self) -> int:
        return len(self.target)

    @torch.inference_mode()
    def _outputs(self, model: nn.Module) -> torch.Tensor:
        return torch.cat([model(batch) for batch in self.batches])

    def losses(self, student: nn.Module) -> torch.Tensor:
        """Return a student's loss on each image, (n,)."""
        return output_loss(self._outputs(student), self.target, classifier=self.teacher.classifier)

    def evaluate(self, student: nn.Module) -> Evaluation:
        """Return a student's figures."""
        outputs = self._outputs(student)
        return judge(outputs, self.target, self.labels, classifier=self.teacher.classifier)


class Meter:
    """Says which share of its teacher's latency a student takes, measured in rounds interleaved with the teacher."""

    def __init__(
        self, stopwatch: Stopwatch, *, tries: Rounds = TRIES, confirm: Rounds = CONFIRM, final: Rounds = FINAL
    ) -> None:
        self.stopwatch, self.tries, self.confirm, self.final = stopwatch, tries, confirm, final

    def tried(self, model: nn.Module) -> float:
        """Return the share as a short measurement has it."""
        return self._timed(model, self.tries).ratio

    def confirmed(self, model: nn.Module) -> float:
        """Return the share as a longer measurement has it."""
        return self._timed(model, self.confirm).ratio

    def measured(self, model: nn.Module) -> Timing:
        """Measure for long; the result's `median` is on the scale of the teacher in this measurement."""
        return self._timed(model, self.final)

    def _timed(self, model: nn.Module, rounds: Rounds) -> Timing:
        return self.stopwatch.time({"student": model}, rounds=rounds)["student"]


@dataclass(frozen=True, kw_only=True)
class Ground:
    """What all students of one teacher are made from and judged by.

    Attributes:
        teacher: the teacher.
        data: its data.
        indices: of the calibration images that closed forms and importances see; fine-tuning sees all of them.
        validation: everything is chosen on these images.
        test: nothing is chosen on these.
        meter: measures shares of the teacher's latency.
        model: `--model` of a search with this teacher.
        source: `--data` of it.
        checkpoint: `--checkpoint` of it.
        folder: for libraries and run directories.
        search: further settings of a search.
    """

    teacher: Teacher
    data: Dataset
    indices: tuple[int, ...]
    validation: Exam
    test: Exam
    meter: Meter
    model: str
    source: str
    checkpoint: Path | None
    folder: Path
    search: dict[str, Any] = field(default_factory=dict)

    @property
    def library(self) -> Path:
        """Distilled candidates of this teacher."""
        return self.folder / "library"

    @cached_property
    def batches(self) -> list[torch.Tensor]:
        """The calibration images, prepared."""
        return list(image_batches(self.data, self.indices, self.teacher.image))

    @property
    def _parts(self) -> ImageParts:
        return ImageParts.of(self.data.splits, len(self.indices))

    @cached_property
    def further(self) -> Exam | None:
        """Validation images that nothing was chosen on before, if there are any left."""
        indices = self._parts.choice
        return Exam(self.teacher, self.data, indices) if indices else None

    def refit_batches(self) -> Iterator[torch.Tensor]:
        """Yield the images that a search refits its students on, prepared."""
        chosen = self._parts.refit[: enough_to_refit(self.teacher.sites)]
        return image_batches(self.data, chosen, self.teacher.image)

    @cached_property
    def training_images(self) -> PreparedImages:
        """All images that a search distils its finalists on, and so everybody."""
        return PreparedImages(self.data, self._parts.refit, self.teacher.image)

    @cached_property
    def captured(self) -> Capture:
        """The teacher's activations, weights and importances at all sites."""
        images = image_batches(self.data, self.indices, self.teacher.image)
        return capture(self.teacher, images, len(self.indices), memory_limit_gb=MEMORY_GIB)

    @cached_property
    def few(self) -> Judge:
        """Judges students on a few of the validation images, from their first changed stage on."""
        few = self.data.splits.validation[:FEW]
        batches = image_batches(self.data, few, self.teacher.image)
        return Judge(self.teacher, batches, load_labels(self.data, few))


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One student to make.

    Attributes:
        ground: teacher, data and tools.
        budget: the most that it may take, as a share of the teacher's latency.
        seed: of everything random.
        minutes: of fine-tuning, for a peer that does it by itself.
        again: whether what a peer has left of this very problem is to be forgotten.
    """

    ground: Ground
    budget: float
    seed: int
    minutes: float
    again: bool = False


@dataclass(frozen=True, kw_only=True)
class Made:
    """What a peer gives back.

    Attributes:
        student: before fine-tuning.
        about: what it chose.
        tuned: after fine-tuning, of a peer that does it by itself.
    """

    student: nn.Module
    about: dict[str, Any]
    tuned: nn.Module | None = None


class Peer(Protocol):
    """Makes a student within a budget; raises Cannot where it has none, Missing where it lacks a library."""

    def __call__(self, problem: Problem) -> Made:
        """Return the largest student that it has."""


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """The largest student within a budget.

    Attributes:
        level: its level.
        model: the student.
        share: of the teacher's latency, measured once more.
        tries: students that were measured.
    """

    level: int
    model: nn.Module
    share: float
    tries: int


def fit(build: Callable[[int], nn.Module], levels: int, meter: Meter, budget: float) -> Fitted:
    """Return the first level at which a student takes no more than the budget, by bisection on measured latency.

    Args:
        build: level to student: 0 is the largest, each next one takes no longer.
        levels: how many there are.
        meter: measures shares.
        budget: a share of the teacher's latency.

    Raises:
        Cannot: if even the smallest student takes more.
    """
    known: dict[int, float] = {}

    def share(level: int) -> float:
        if level not in known:
            known[level] = meter.tried(build(level))
        return known[level]

    low, high = -1, levels - 1
    if share(high) > budget:
        raise Cannot(f"its smallest student takes {share(high):.0%} of the teacher's latency")
    if share(0) <= budget:
        high = 0
    while high - low > 1 and budget - share(high) > CLOSE * budget:
        middle = (low + high) // 2
        low, high = (middle, high) if share(middle) > budget else (low, middle)
    for attempt in range(ATTEMPTS):
        model = build(high)
        again = meter.confirmed(model)
        if again <= budget:
            return Fitted(level=high, model=model, share=again, tries=len(known) + attempt + 1)
        if high == levels - 1:
            break
        high = min(levels - 1, high + max(1, levels // STEP))
    raise Cannot(f"measured again, its student takes {again:.1%} of the teacher's latency")


def fit_best(
    builds: Mapping[str, Callable[[int], nn.Module]], levels: int, ground: Ground, budget: float
) -> tuple[str, Fitted]:
    """Return the variant whose largest student within the budget has the least validation loss, and that student.

    Raises:
        Cannot: if no variant has one.
    """
    found, reasons = {}, []
    for name, build in builds.items():
        try:
            found[name] = fit(build, levels, ground.meter, budget)
        except Cannot as reason:
            reasons.append(f"{name}: {reason}")
    if not found:
        raise Cannot("; ".join(reasons))
    losses = {name: ground.validation.evaluate(fitted.model).loss for name, fitted in found.items()}
    best = min(losses, key=lambda name: losses[name])
    return best, found[best]
