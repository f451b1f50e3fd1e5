"""Names of a teacher's classes: the data's where they fit, ImageNet's where its weights say so."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from mixerzoo.compat import guard_torchvision
from mixerzoo.data import IMAGE_SUFFIXES, Dataset
from mixerzoo.errors import MixerzooError
from mixerzoo.registry import get_registry
from mixerzoo.student_source import Source
from mixerzoo.teachers import digits_vit

IMAGENET_TAG = re.compile(r"_in(?:1k|12k|21k|22k)(?:_|$)")


def class_names(source: Source, model: nn.Module, data: Dataset | None = None) -> tuple[str, ...]:
    """Return one name for each output of a student, or nothing where the names are not known.

    Args:
        source: the student on disk.
        model: the student.
        data: the data, if they are open; else the names are looked for without reading any image.
    """
    count = int(getattr(model, "num_classes", 0))
    written = source.content.get("classes")
    for names in (
        written if isinstance(written, list) else (),
        () if data is None else data.classes,
        tuple("0123456789") if source.teacher == digits_vit.NAME else (),
        _named_by(source.data) if data is None else (),
        _imagenet(source, model),
    ):
        if names and len(names) == count:
            return tuple(str(name) for name in names)
    return ()


def _named_by(data: str | None) -> tuple[str, ...]:
    """Return the names of the classes of a `--data` value; of a folder, without opening its images."""
    if data is None:
        return ()
    spec = next(spec for spec in reversed(list(get_registry().datasets)) if spec.accepts(data))
    if spec.name == "folder":
        return _folder_names(Path(data))
    try:
        return spec.open(data).classes
    except MixerzooError:  # it may have been moved, and nothing here depends on it
        return ()


def _folder_names(root: Path) -> tuple[str, ...]:
    if not root.is_dir():
        return ()
    images = (p for p in root.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    parents = [path.relative_to(root).parts[:-1] for path in images]
    return tuple(sorted({parts[0] for parts in parents})) if all(parents) else ()


def _imagenet(source: Source, model: nn.Module) -> tuple[str, ...]:
    """Return ImageNet's names for pretrained weights that were trained on it, by the tag of their name."""
    identity: Mapping[str, Any] = source.identity
    if identity.get("checkpoint") is not None or not IMAGENET_TAG.search(source.teacher.partition(".")[2]):
        return ()
    guard_torchvision()
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset(model)
    if not subset:
        return ()
    info = ImageNetInfo(subset)
    return tuple(info.index_to_description(index) for index in range(info.num_classes()))
