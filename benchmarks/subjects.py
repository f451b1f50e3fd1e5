"""What `distill.py` measures on: a teacher, its data, and the images that are captured; digits placed at random."""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import dinov2
import numpy as np
import torch
from PIL import Image

from mixerzoo.capture import Capture, capture
from mixerzoo.data import Dataset, image_batches, load_labels, open_npz
from mixerzoo.hosts import Teacher
from mixerzoo.opening import open_data, open_teacher
from mixerzoo.plan import Candidate
from mixerzoo.registry import get_registry
from mixerzoo.score import Judge
from mixerzoo.spec import Site

TEACHERS = ("dinov2", "digits_vit")
# Digits placed at random: their sides in a frame of 112 pixels, ranges of red, green and blue, images for the probe.
FRAME, SMALLEST, LARGEST = 112, 44, 84
INK, GROUND = (150, 256), (0, 100)
SCATTERED_PROBE_IMAGES = 1500


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A teacher and the images that its students are distilled on.

    Attributes:
        teacher: the teacher.
        data: its data.
        indices: of the captured images; the last fifth of them is held out.
    """

    teacher: Teacher
    data: Dataset
    indices: tuple[int, ...]

    @property
    def attention(self) -> tuple[Site, ...]:
        """The attention sites."""
        return tuple(site for site in self.teacher.sites if site.kind == "attention")

    @cached_property
    def batches(self) -> list[torch.Tensor]:
        """The images, prepared."""
        return list(image_batches(self.data, self.indices, self.teacher.image))

    def pass_seconds(self) -> float:
        """Return the time of one pass of the teacher over the images; they are prepared before."""
        batches = self.batches
        with torch.inference_mode():
            self.teacher.model(batches[0])
            began = time.perf_counter()
            for batch in batches:
                self.teacher.model(batch)
            return time.perf_counter() - began

    def capture(
        self, sites: tuple[Site, ...] | None = None, on_batch: Callable[[int], None] = lambda done: None
    ) -> Capture:
        """Capture the teacher at all sites, or only at these; `on_batch` is called after each batch."""
        teacher = self.teacher if sites is None else replace(self.teacher, sites=sites)
        return capture(teacher, self.batches, len(self.indices), on_batch=on_batch)

    def judge(self, indices: tuple[int, ...]) -> Judge:
        """Return a judge of students on other images."""
        batches = image_batches(self.data, indices, self.teacher.image)
        return Judge(self.teacher, batches, load_labels(self.data, indices))


def spread_sites(sites: tuple[Site, ...], shares: tuple[float, ...]) -> tuple[Site, ...]:
    """Return the sites at these shares of the depth."""
    return tuple(sites[int(share * len(sites))] for share in shares)


def widest(mixer: str) -> Candidate:
    """Return a mixer at the width nearest to 1: one candidate a mixer.

    Raises:
        MixerzooError: for an unknown mixer, with a suggestion.
    """
    spec = get_registry().mixers.get(mixer)
    return Candidate(mixer, min(spec.widths, key=lambda width: abs(width - 1)))


def open_subject(
    name: str, *, images: int, cache: Path, data: Path | None, scattered: bool = False
) -> Subject:
    """Open a teacher and its data.

    Args:
        name: one of `TEACHERS`.
        images: to capture; fewer where there are not so many.
        cache: where what is fetched and made for DINOv2 is kept.
        data: MNIST as an .npz; fetched if not given.
        scattered: digits placed at random, with a probe of their own; DINOv2 only.
    """
    if name == "digits_vit":
        teacher, dataset = open_teacher(name), open_data("digits")
    else:
        dataset = open_npz(str(data or dinov2.fetch_mnist(cache)))
        if scattered:
            dataset = scatter(dataset)
            label = f"scattered-{dataset.fingerprint[:8]}"
            checkpoint, _ = dinov2.prepare_teacher(
                cache, dataset, name=label, probe_images=SCATTERED_PROBE_IMAGES
            )
        else:
            checkpoint, _ = dinov2.prepare_teacher(cache, dataset)
        teacher = open_teacher(dinov2.MODEL, checkpoint)
    return Subject(teacher=teacher, data=dataset, indices=dataset.splits.calibration[:images])


def scatter(data: Dataset) -> Dataset:
    """Return the digits at a random size and place, in a random light colour on a plain dark one."""

    def image(index: int) -> Image.Image:
        draw = np.random.default_rng([index, 112])
        side = int(draw.integers(SMALLEST, LARGEST + 1))
        left, top = (int(place) for place in draw.integers(0, FRAME - side + 1, size=2))
        ink, ground = (draw.integers(*span, size=3).astype(float) for span in (INK, GROUND))
        digit = data.image(index).convert("L").resize((side, side), Image.Resampling.BICUBIC)
        share = np.zeros((FRAME, FRAME, 1))
        share[top : top + side, left : left + side, 0] = np.asarray(digit) / 255
        return Image.fromarray(np.round(ground + share * (ink - ground)).astype(np.uint8))

    mark = f"{data.fingerprint} scattered {FRAME} {SMALLEST} {LARGEST} {INK} {GROUND}"
    return replace(
        data,
        name=f"{data.name}, scattered",
        fingerprint=hashlib.sha256(mark.encode()).hexdigest(),
        image=image,
    )


def median(values: list[float]) -> float:
    """Return the median, rounded to be read."""
    return round(statistics.median(values), 4)
