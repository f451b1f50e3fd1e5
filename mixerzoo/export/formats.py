"""The formats: how each is written, and how what was written is run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from mixerzoo import __version__
from mixerzoo.data import ImageConfig
from mixerzoo.errors import MixerzooError, did_you_mean
from mixerzoo.export.hub import write_hub
from mixerzoo.export.onnx import export_onnx, onnx_call, onnx_packages, open_session
from mixerzoo.export.parity import Call
from mixerzoo.export.preprocess import Preprocess
from mixerzoo.export.quiet import quietly
from mixerzoo.figures import Figures
from mixerzoo.files import write_bytes, write_json
from mixerzoo.student import PLAN_KEY, load_student

SIDECAR_SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """What is exported, and what is said of it.

    Attributes:
        model: the student (or, to be timed beside it, its teacher).
        blank: the teacher's architecture, where no name builds it; else None.
        image: how images are prepared.
        classifier: whether the outputs are logits.
        outputs: shape of the output of one image.
        content: of `plan.json`, with the names of the classes.
        figures: what was measured of the student.
        base: the hub's name of its teacher, or None where it has none.
    """

    model: nn.Module
    blank: nn.Module | None
    image: ImageConfig
    classifier: bool
    outputs: tuple[int, ...]
    content: Mapping[str, Any]
    figures: Figures
    base: str | None = None

    @property
    def output(self) -> str:
        """Name of the output."""
        return "logits" if self.classifier else "embedding"

    def example(self, batch: int = 2) -> torch.Tensor:
        """Return an input (B, C, H, W)."""
        return torch.randn(batch, *self.image.size, generator=torch.Generator().manual_seed(0))

    def about(self) -> dict[str, Any]:
        """Return the content of the sidecar: all that serving the file takes."""
        return {
            "schema": SIDECAR_SCHEMA,
            "made_by": f"mixerzoo {__version__}",
            "teacher": self.content.get("teacher"),
            "plan": self.content["plan"],
            "input": {"name": "images", "shape": ["batch", *self.image.size], "dtype": "float32"},
            "output": {"name": self.output, "shape": ["batch", *self.outputs], "dtype": "float32"},
            "preprocess": Preprocess.of(self.image).to_json(),
            "classes": list(self.content.get("classes", ())),
        }


@dataclass(frozen=True, kw_only=True)
class Format:
    """A format.

    Attributes:
        name: as `--format` has it.
        file: default name of the file or folder.
        runtime: what runs it.
        traced: whether it takes mixers that claim `exportable` only.
        write: (bundle, path) writes it, and what belongs beside it.
        open: (bundle, path, threads) to a function of images (B, C, H, W).
        need: raises MixerzooError where a package is missing.
    """

    name: str
    file: str
    runtime: str
    traced: bool
    write: Callable[[Bundle, Path], None]
    open: Callable[[Bundle, Path, int], Call]
    need: Callable[[], object] = lambda: None

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder, not a file."""
        return not Path(self.file).suffix


def sidecar(path: Path) -> Path:
    """Return the JSON file that belongs to an exported file."""
    return path.with_name(f"{path.name}.json")


def _write_onnx(bundle: Bundle, path: Path) -> None:
    about = bundle.about()
    metadata = {name: value if isinstance(value, str) else json.dumps(value) for name, value in about.items()}
    with quietly():
        export_onnx(bundle.model, bundle.example(), path, output=bundle.output, metadata=metadata)
    write_json(sidecar(path), about)


def _open_onnx(bundle: Bundle, path: Path, threads: int) -> Call:
    return onnx_call(open_session(onnx_packages("--format onnx"), path, threads))


def _write_torch_export(bundle: Bundle, path: Path) -> None:
    about = bundle.about()
    with quietly(), torch.no_grad():
        program = torch.export.export(
            bundle.model, (bundle.example(),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)
        )
        torch.export.save(program, path, extra_files={"about.json": json.dumps(about)})
    write_json(sidecar(path), about)


def _open_torch_export(bundle: Bundle, path: Path, threads: int) -> Call:
    with quietly():
        return _inference(torch.export.load(path).module())


def _write_safetensors(bundle: Bundle, path: Path) -> None:
    tensors = {
        name: tensor.detach().contiguous().clone() for name, tensor in bundle.model.state_dict().items()
    }
    content = {**bundle.content, "figures": bundle.figures.to_json()}
    write_bytes(path, save(tensors, metadata={"format": "pt", PLAN_KEY: json.dumps(content)}))


def _write_hub(bundle: Bundle, path: Path) -> None:
    write_hub(path, bundle.model, bundle.content, bundle.about(), bundle.figures, bundle.base)


def _open_student(bundle: Bundle, path: Path, threads: int) -> Call:
    return _inference(load_student(path, model=bundle.blank).model)


def _inference(model: Callable[[torch.Tensor], torch.Tensor]) -> Call:
    def call(images: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return model(images)

    return call


ONNX = Format(
    name="onnx",
    file="model.onnx",
    runtime="onnxruntime",
    traced=True,
    write=_write_onnx,
    open=_open_onnx,
    need=lambda: onnx_packages("--format onnx"),
)
TORCH_EXPORT = Format(
    name="torch-export",
    file="model.pt2",
    runtime="torch.export",
    traced=True,
    write=_write_torch_export,
    open=_open_torch_export,
)
SAFETENSORS = Format(
    name="safetensors",
    file="model.safetensors",
    runtime="eager",
    traced=False,
    write=_write_safetensors,
    open=_open_student,
)
HUB = Format(name="hub", file="hub", runtime="eager", traced=False, write=_write_hub, open=_open_student)
FORMATS = {format.name: format for format in (ONNX, TORCH_EXPORT, SAFETENSORS, HUB)}


def get_format(name: str) -> Format:
    """Return a format.

    Raises:
        MixerzooError: for an unknown name, with a suggestion.
    """
    if name not in FORMATS:
        raise MixerzooError(f"--format {name}: {did_you_mean(name, FORMATS)}")
    return FORMATS[name]
