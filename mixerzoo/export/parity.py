"""Whether an exported file computes what the student does, on real images and at several batch sizes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from mixerzoo.data import Dataset, ImageConfig, load_images
from mixerzoo.errors import MixerzooError

TOLERANCE = 1e-4
# Where a student itself is further than that from its outputs in float64, as DINOv2 is, a file may be so many times
# as far from them, and no further from the student than a share of the outputs' range.
TIMES, COARSE = 3.0, 1e-4
LEAST_IMAGES = 4  # one alone, and three together
BATCH = 16

Call = Callable[[torch.Tensor], torch.Tensor]


class ParityError(MixerzooError):
    """The exported file computes something else than the student."""

    exit_code = 1


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How far an exported file is from its student.

    Attributes:
        images: that both were given.
        batch_sizes: that they came in.
        difference: the largest of any output; not finite where one of them is not.
        relative: the same, relative to the range of the student's outputs.
        agreement: share of images with the same top class, or None without classes.
        tolerance: the difference that counts as rounding.
        rounding: the largest distance of the student's outputs from those that it has in float64; only measured where
            the difference is above the tolerance, and that was not given.
        exact: the same of the file's outputs.
    """

    images: int
    batch_sizes: tuple[int, ...]
    difference: float
    relative: float
    agreement: float | None
    tolerance: float
    rounding: float | None = None
    exact: float | None = None

    @property
    def passed(self) -> bool:
        """Whether the difference can be rounding."""
        if self.rounding is None or self.exact is None:
            return self.difference <= self.tolerance
        return self.exact <= TIMES * self.rounding and self.relative <= COARSE

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready data; numbers that are not finite become null."""
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(self).items()
        }

    def text(self) -> str:
        """Return it in words."""
        words = f"{self.difference:.2g} at most, {self.relative:.2g} of the outputs' range, on {self.images} images"
        if self.agreement is not None:
            words += f"; same top class on {self.agreement:.2%}"
        if self.rounding is not None:
            words += f"; from float64 the student is {self.rounding:.2g} away, the file {self.exact:.2g}"
        return words


def batches_of(count: int) -> Iterator[range]:
    """Yield ranges of at least four image numbers: one image, three, then sixteen at a time."""
    yield range(1)
    yield range(1, LEAST_IMAGES)
    for first in range(LEAST_IMAGES, count, BATCH):
        yield range(first, min(first + BATCH, count))


def chosen_images(data: Dataset, count: int) -> list[int]:
    """Return the images to compare on, those first that nothing was trained or chosen on."""
    splits = data.splits
    return [*splits.test, *splits.validation, *splits.calibration][:count]


@torch.inference_mode()
def compare_outputs(
    student: nn.Module,
    exported: Call,
    data: Dataset,
    config: ImageConfig,
    *,
    images: int,
    classifier: bool,
    tolerance: float | None = None,
    on_images: Callable[[int], None] = lambda done: None,
) -> Parity:
    """Run the student and the exported file on the same images.

    Args:
        student: the student.
        exported: the file, as a function of images.
        data: what the images are taken from.
        config: how they are prepared.
        images: how many.
        classifier: whether outputs are those of classes.
        tolerance: largest difference that counts as rounding. Unless given 1e-4, and where it is more than that, what
            is no further from the student's outputs in float64 than a few times the student itself.
        on_images: called with the number of images that were compared.

    Raises:
        ParityError: if the exported file does not take a batch, or gives another shape.
    """
    chosen = chosen_images(data, images)
    difference, agreeing = 0.0, 0
    low, high = math.inf, -math.inf
    sizes = []
    outputs: list[tuple[torch.Tensor, torch.Tensor]] = []
    for numbers in batches_of(len(chosen)):
        batch = load_images(data, [chosen[number] for number in numbers], config)
        expected = student(batch)
        try:
            found = exported(batch)
        except Exception as error:  # runtimes raise types of their own
            said = " ".join(str(error).split())[:200]
            raise ParityError(
                f"it does not run on a batch of {len(batch)} ({type(error).__name__}: {said})"
            ) from error
        if found.shape != expected.shape:
            raise ParityError(
                f"for a batch of {len(batch)} it gives {tuple(found.shape)} where the student gives "
                f"{tuple(expected.shape)}"
            )
        gap = float((found - expected).abs().max())
        difference = gap if not gap <= difference else difference  # NaN stays
        low, high = min(low, float(expected.min())), max(high, float(expected.max()))
        agreeing += int((found.argmax(-1) == expected.argmax(-1)).sum()) if classifier else 0
        sizes.append(len(batch))
        outputs.append((expected, found))
        on_images(numbers.stop)
        if not math.isfinite(difference):
            break
    rounding = exact = None
    if tolerance is None and TOLERANCE < difference < math.inf:
        rounding, exact = _from_float64(student, data, chosen, config, outputs)
    return Parity(
        images=sum(sizes),
        batch_sizes=tuple(sorted(set(sizes))),
        difference=difference,
        relative=difference / max(high - low, 1e-12),
        agreement=agreeing / sum(sizes) if classifier else None,
        tolerance=TOLERANCE if tolerance is None else tolerance,
        rounding=rounding,
        exact=exact,
    )


def _from_float64(
    student: nn.Module,
    data: Dataset,
    chosen: Sequence[int],
    config: ImageConfig,
    outputs: Sequence[tuple[torch.Tensor, torch.Tensor]],
) -> tuple[float, float] | tuple[None, None]:
    """Return how far the outputs of the student and of the file, batch by batch, are from the student's in float64."""
    precise = copy.deepcopy(student).double()
    far = [0.0, 0.0]
    for numbers, pair in zip(batches_of(len(chosen)), outputs, strict=True):
        batch = load_images(data, [chosen[number] for number in numbers], config)
        try:
            right = precise(batch.double())
        except Exception:  # a module may insist on float32
            return None, None
        far = [max(most, float((output - right).abs().max())) for most, output in zip(far, pair, strict=True)]
    return far[0], far[1]
