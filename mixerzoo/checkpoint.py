"""Checkpoints of a training in a folder: safetensors and JSON, no pickles, whole or not there.

The tensors are written under the name of their own checksum, then `checkpoint.json`, which names them, then what
it named before is removed: a process killed in between leaves the earlier checkpoint or the later one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from torch import nn

from mixerzoo.errors import MixerzooError
from mixerzoo.files import read_json, write_bytes, write_json

CHECKPOINT = "checkpoint.json"
_PATTERN = "checkpoint-*.safetensors"
# What AdamW keeps for a parameter.
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def save_checkpoint(folder: Path, content: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a checkpoint in place of the one that is there; `content` is JSON-ready."""
    raw = save_bytes({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()})
    sha256 = hashlib.sha256(raw).hexdigest()
    file = f"checkpoint-{sha256[:16]}.safetensors"
    write_bytes(folder / file, raw)
    write_json(folder / CHECKPOINT, {"content": dict(content), "tensors": file, "sha256": sha256})
    _remove_tensors(folder, but=file)


def load_checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]] | None:
    """Return content and tensors of the checkpoint in a folder, or None if there is none.

    Raises:
        MixerzooError: if it is damaged.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        return None
    try:
        found = read_json(path)
        content, file, sha256 = dict(found["content"]), folder / str(found["tensors"]), found["sha256"]
        raw = file.read_bytes()
    except (OSError, LookupError, TypeError, ValueError, MixerzooError) as error:
        raise MixerzooError(_damaged(path, path, str(error))) from None
    if hashlib.sha256(raw).hexdigest() != sha256:
        raise MixerzooError(_damaged(file, path, "it does not match its checksum"))
    try:
        return content, load_bytes(raw)
    except SafetensorError as error:
        raise MixerzooError(_damaged(file, path, str(error))) from None


def remove_checkpoint(folder: Path) -> None:
    """Remove the checkpoint: first what names the tensors."""
    (folder / CHECKPOINT).unlink(missing_ok=True)
    _remove_tensors(folder)


def prefixed(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors under names that begin with `prefix.`."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def unprefixed(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return those tensors whose names begin with `prefix.`, under the rest of their names."""
    start = f"{prefix}."
    return {name[len(start) :]: tensor for name, tensor in tensors.items() if name.startswith(start)}


def moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return the state of an AdamW optimizer: `<parameter>.<step, exp_avg or exp_avg_sq>` -> tensor."""
    return {
        f"{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore_moments(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Give an AdamW optimizer of the model's parameters the state that `moments` returned."""
    for name, parameter in model.named_parameters():
        found = {key: tensors[f"{name}.{key}"] for key in _MOMENTS if f"{name}.{key}" in tensors}
        if found:  # AdamW counts its steps on the CPU
            optimizer.state[parameter] = {
                key: value if key == "step" else value.to(parameter.device) for key, value in found.items()
            }


def _remove_tensors(folder: Path, *, but: str = "") -> None:
    """Remove the tensors of other checkpoints, and what a killed process was writing."""
    for path in (
        *folder.glob(_PATTERN),
        *folder.glob(f".{_PATTERN}.*.tmp"),
        *folder.glob(f".{CHECKPOINT}.*.tmp"),
    ):
        if path.name != but:
            path.unlink(missing_ok=True)


def _damaged(what: Path, path: Path, why: str) -> str:
    return f"checkpoint '{what}' is damaged ({why}); remove '{path}' to begin anew"
