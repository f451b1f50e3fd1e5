"""Writing files so that a reader, or a killed process, never meets half of one."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from mixerzoo.errors import MixerzooError
from mixerzoo.temporary import temporary_of


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to a temporary file beside `path`, flush it to disk, and rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_of(path)
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, content: str) -> None:
    """Write text, all of it or nothing."""
    write_bytes(path, content.encode())


def write_json(path: Path, content: Any) -> None:
    """Write JSON, all of it or nothing."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        MixerzooError: if the file is missing or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MixerzooError(f"'{path}': no such file") from None
    except (OSError, ValueError) as error:
        raise MixerzooError(f"'{path}': not readable as JSON ({error})") from None


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> str:
    """Write a safetensors file and return its SHA-256. Tensors that share memory are written each."""
    content = save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()})
    write_bytes(path, content)
    return hashlib.sha256(content).hexdigest()


def replace_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Fill a folder beside its place, then rename it: it is there whole, or not at all.

    Raises:
        MixerzooError: if it cannot be written.
    """
    if folder.resolve() == Path.cwd():
        raise MixerzooError(
            f"'{folder}' is the working directory, which cannot be replaced; give another --out"
        )
    temporary = temporary_of(folder)
    old = temporary.with_suffix(".old")
    put_back(folder)
    try:
        fill(temporary)
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
    except OSError as error:
        raise MixerzooError(f"'{folder}' cannot be written ({error.strerror}); give another --out") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        put_back(folder)


def put_back(folder: Path) -> None:
    """Give a folder its place again if `replace_folder` ended between its two renames; else remove what it replaced."""
    for old in folder.parent.glob(f".{glob.escape(folder.name)}.*.old"):
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(folder)


def json_hash(content: Any) -> str:
    """Return the SHA-256 of JSON-ready data, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
