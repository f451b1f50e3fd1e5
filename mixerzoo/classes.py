"""A teacher's classes: their names, and whether labels are of them."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import nn

from mixerzoo.compat import guard_torchvision
from mixerzoo.data import Dataset, load_labels
from mixerzoo.hosts import Teacher
from mixerzoo.student_source import Source
from mixerzoo.teachers import digits_vit

IMAGENET_TAG = re.compile(r"_in(?:1k|12k|21k|22k)(?:_|$)")


def fitting_labels(teacher: Teacher, data: Dataset, indices: Sequence[int]) -> torch.Tensor | None:
    """Return labels (n,) int64 of images, or None where there are none, or none that can be the teacher's classes.

    All labels of the data decide, not only those of `indices`: where the classes have names, there must be as many
    as outputs, else no label may be beyond the outputs.
    """
    labels = load_labels(data, indices)
    if labels is None or data.labels is None or not teacher.classifier:
        return None
    classes = int(getattr(teacher.model, "num_classes", 0))
    if data.classes:
        return labels if len(data.classes) == classes else None
    return labels if int(data.labels.min()) >= 0 and int(data.labels.max()) < classes else None


def class_names(source: Source, model: nn.Module) -> tuple[str, ...]:
    """Return one name for each output of a student, or nothing where the names are not known.

    They are those that the student or its run was written with, else those of the teacher's own weights. Data that
    are only there to compare on, or that are now where the run's once were, name nothing.

    Args:
        source: the student on disk.
        model: the student.
    """
    count = int(getattr(model, "num_classes", 0))
    for names in (
        source.content.get("classes"),
        source.record.get("classes"),
        _of_weights(source, model),
    ):
        if names and isinstance(names, list | tuple) and len(names) == count:
            return tuple(str(name) for name in names)
    return ()


def _of_weights(source: Source, model: nn.Module) -> tuple[str, ...]:
    """Return the names of the classes that the teacher's weights, by their name, were trained on."""
    if source.identity.get("checkpoint") is not None:
        return ()
    if source.teacher == digits_vit.NAME:
        return tuple("0123456789")
    if not IMAGENET_TAG.search(source.teacher.partition(".")[2]):
        return ()
    guard_torchvision()
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset(model)
    if not subset:
        return ()
    info = ImageNetInfo(subset)
    return tuple(info.index_to_description(index) for index in range(info.num_classes()))
