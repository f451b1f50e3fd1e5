"""ONNX: what the runtime `onnxruntime` and `mixerzoo export --format onnx` share, and what serves the file."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mixerzoo.errors import MixerzooError

PACKAGES = ("onnxruntime", "onnx", "onnxscript")
RUNTIME_ONLY = PACKAGES[:1]
SINGLE_FILE = 1.9 * 2**30  # bytes of weights; a protobuf message takes 2 GiB, and the graph needs some of it


def onnx_packages(who: str, names: tuple[str, ...] = PACKAGES) -> Any:
    """Return the module onnxruntime, once it is certain that all packages are there.

    Raises:
        MixerzooError: if one is not; `who` needs it.
    """
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise MixerzooError(
                f"{who}: package '{name}' cannot be imported ({error}); pip install 'mixerzoo[onnx]'"
            ) from None
    return importlib.import_module("onnxruntime")


def export_onnx(
    model: nn.Module,
    example: torch.Tensor,
    path: Path,
    *,
    output: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a model as ONNX; one file, unless its weights are too large for one message.

    Args:
        model: in eval mode.
        example: input (B, C, H, W), B > 1 where the batch is to be dynamic.
        path: file to write; weights that do not fit go to `<name>.data` beside it.
        output: name of the output; with it, the input is called `images` and the batch dimension is dynamic.
            Without, the file is for the example's shape.
        metadata: entries of the file's metadata.
    """
    options: dict[str, Any] = {}
    if output is not None:
        options = {
            "input_names": ["images"],
            "output_names": [output],
            "dynamic_shapes": ({0: "batch"},),
        }
    with torch.no_grad():
        program = torch.onnx.export(model, (example,), dynamo=True, verbose=False, **options)
    assert program is not None
    program.model.metadata_props.update(metadata or {})
    if sum(t.nbytes for t in model.state_dict().values()) < SINGLE_FILE:
        path.write_bytes(program.model_proto.SerializeToString())
    else:
        program.save(path, external_data=True)


def session_options(ort: Any, threads: int) -> Any:
    """Return the options of a session that runs on so many threads and leaves the cores alone in between."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Threads that go on spinning after a run would slow down the subject that is timed next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def open_session(ort: Any, path: Path, threads: int) -> Any:
    """Return a session on the CPU."""
    return ort.InferenceSession(str(path), session_options(ort, threads), providers=["CPUExecutionProvider"])


def onnx_call(session: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a session of one input and one output as a function of tensors on the CPU."""
    name = session.get_inputs()[0].name

    def call(images: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(session.run(None, {name: images.numpy()})[0])

    return call
