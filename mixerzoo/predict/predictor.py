"""A student or an exported ONNX file as a function of images."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mixerzoo.classes import class_names
from mixerzoo.data import Dataset, ImageConfig, Splits, load_images
from mixerzoo.errors import MixerzooError
from mixerzoo.export.onnx import RUNTIME_ONLY, onnx_call, onnx_packages, open_session
from mixerzoo.export.preprocess import Preprocess
from mixerzoo.files import read_json
from mixerzoo.hosts import Host
from mixerzoo.images import open_image
from mixerzoo.registry import get_registry
from mixerzoo.student import image_config, load_student
from mixerzoo.student_source import find_student

BATCH = 32
WAY_OUT = "give a run directory, a student's folder, its .safetensors file, or an exported .onnx file"


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """What gives images classes.

    Attributes:
        prepare: images to the model's input (B, C, H, W).
        run: that to logits (B, classes).
        classes: their names; empty where they are not known, and then they go by number.
    """

    prepare: Callable[[Sequence[Image.Image]], torch.Tensor]
    run: Callable[[torch.Tensor], torch.Tensor]
    classes: tuple[str, ...]

    def name(self, index: int) -> str:
        """Return the name of a class."""
        return self.classes[index] if self.classes else str(index)


@dataclass(frozen=True, kw_only=True)
class Guess:
    """A class that an image may be of, and how probable the model finds it."""

    index: int
    name: str
    probability: float


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """Image -> its most probable classes, and unreadable image -> why."""

    found: dict[Path, list[Guess]]
    unreadable: dict[Path, str]

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        return {
            "images": [
                {
                    "file": str(path),
                    "classes": [
                        {"class": g.name, "index": g.index, "probability": round(g.probability, 6)}
                        for g in row
                    ],
                }
                for path, row in self.found.items()
            ],
            "unreadable": [{"file": str(path), "reason": why} for path, why in self.unreadable.items()],
        }


def open_predictor(path: Path) -> Predictor:
    """Open a run directory, a student, or an exported `.onnx` file.

    Raises:
        MixerzooError: if it is none of these, or gives no classes.
    """
    if path.suffix == ".onnx":
        return _open_onnx(path)
    if path.is_file() and path.suffix != ".safetensors":
        raise MixerzooError(f"'{path}': {WAY_OUT}")
    source = find_student(path)
    model = load_student(source.path).model
    host: Host = get_registry().hosts.get(str(source.content["host"]))
    if not host.is_classifier(model):
        raise MixerzooError(_no_classes(path, "in Python, mixerzoo.load(path) is a function of images"))
    config = image_config(source.content)

    def run(images: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            logits: torch.Tensor = model(images)
        return logits

    return Predictor(
        prepare=lambda images: _prepared(images, config), run=run, classes=class_names(source, model)
    )


def predict(predictor: Predictor, paths: Sequence[Path], *, top: int) -> Predictions:
    """Return the `top` most probable classes of each image; those that cannot be read are named, and others go on."""
    if top < 1:
        raise MixerzooError(f"--top {top}: give at least 1")
    found: dict[Path, list[Guess]] = {}
    unreadable: dict[Path, str] = {}
    for first in range(0, len(paths), BATCH):
        images: dict[Path, Image.Image] = {}
        for path in dict.fromkeys(paths[first : first + BATCH]):
            try:
                images[path] = open_image(path)
            except OSError as error:
                unreadable[path] = str(error)
        if not images:
            continue
        logits = predictor.run(predictor.prepare(list(images.values())))
        if predictor.classes and logits.shape[-1] != len(predictor.classes):
            raise MixerzooError(
                f"the model has {logits.shape[-1]} classes, and names for {len(predictor.classes)}"
            )
        best = logits.double().softmax(-1).topk(min(top, logits.shape[-1]))
        for path, shares, indices in zip(images, best.values.tolist(), best.indices.tolist(), strict=True):
            found[path] = [
                Guess(index=index, name=predictor.name(index), probability=share)
                for share, index in zip(shares, indices, strict=True)
            ]
    return Predictions(found=found, unreadable=unreadable)


def _prepared(images: Sequence[Image.Image], config: ImageConfig) -> torch.Tensor:
    """Prepare images by timm's own transform, as those of the teacher were."""
    nothing = Splits(calibration=(), validation=(), test=())
    data = Dataset(name="", fingerprint="", image=lambda index: images[index], labels=None, splits=nothing)
    return load_images(data, range(len(images)), config)


def _open_onnx(path: Path) -> Predictor:
    ort = onnx_packages("mixerzoo predict", RUNTIME_ONLY)
    if not path.is_file():
        raise MixerzooError(f"'{path}': no such file")
    try:
        session = open_session(ort, path, torch.get_num_threads())
    except Exception as error:  # onnxruntime raises types of its own
        said = " ".join(str(error).split())[:200]
        raise MixerzooError(f"'{path}': not a model that ONNX Runtime takes ({said})") from None
    about = _about(path, session)
    try:
        steps = Preprocess.from_json(about["preprocess"])
        classes = tuple(str(name) for name in about["classes"])
        output = about["output"]["name"]
    except (LookupError, TypeError, ValueError) as error:
        raise MixerzooError(
            f"'{path}': how its images are prepared is not known ({error!r}); export it with mixerzoo export"
        ) from None
    if output != "logits":
        raise MixerzooError(
            _no_classes(path, "onnxruntime gives them, for images prepared as its JSON file says")
        )
    return Predictor(
        prepare=lambda images: torch.from_numpy(np.stack([steps(image) for image in images])),
        run=onnx_call(session),
        classes=classes,
    )


def _about(path: Path, session: Any) -> Mapping[str, Any]:
    """Return the content of the JSON file beside an ONNX file; without it, what the file itself says."""
    beside = path.with_name(f"{path.name}.json")
    if beside.is_file():
        content = read_json(beside)
        if not isinstance(content, dict):
            raise MixerzooError(f"'{beside}': not what mixerzoo export writes")
        return content
    found: dict[str, Any] = {}
    for name, text in session.get_modelmeta().custom_metadata_map.items():
        try:
            found[name] = json.loads(text)
        except ValueError:
            found[name] = text
    return found


def _no_classes(path: Path, way_out: str) -> str:
    return f"'{path}' gives embeddings, not classes; {way_out}"
