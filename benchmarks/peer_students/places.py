"""The teachers of `peers.py`, and what of them a search is told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import dinov2

from mixerzoo.data import Dataset, open_npz
from mixerzoo.hosts import Teacher
from mixerzoo.opening import open_data, open_teacher

DIGITS = "digits_vit"
TEACHERS = (DIGITS, "dinov2-112", "dinov2-224")


@dataclass(frozen=True, kw_only=True)
class Place:
    """A teacher and its data, opened, and as a command line names them."""

    teacher: Teacher
    data: Dataset
    model: str
    source: str
    checkpoint: Path | None = None


def open_place(name: str, cache: Path, data: Path | None) -> Place:
    """Open a teacher and its data.

    Args:
        name: one of `TEACHERS`; a number in it is that of pixels.
        cache: where what is fetched and made for DINOv2 is kept.
        data: MNIST as an .npz; fetched if not given.
    """
    if name == DIGITS:
        return Place(teacher=open_teacher(name), data=open_data("digits"), model=name, source="digits")
    source = data or dinov2.fetch_mnist(cache)
    dataset = open_npz(str(source))
    with patch.object(dinov2, "PIXELS", int(name.rpartition("-")[2])):  # it is in the names of its files, too
        checkpoint, _ = dinov2.prepare_teacher(cache, dataset)
    teacher = open_teacher(dinov2.MODEL, checkpoint)
    return Place(teacher=teacher, data=dataset, model=dinov2.MODEL, source=str(source), checkpoint=checkpoint)
