"""The folder of a library, which any number of processes may use at the same time."""

from __future__ import annotations

import hashlib
import os
import re
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import torch
from safetensors.torch import load as load_tensors

from mixerzoo import locks
from mixerzoo.distill import Distilled
from mixerzoo.errors import MixerzooError
from mixerzoo.files import json_hash, read_json, write_json, write_tensors
from mixerzoo.library.entries import Entry, Order

CHECK = "check"  # of an entry: the hash of the rest
KEY = re.compile(r"[0-9a-f]{24}")


def check_folder(folder: Path) -> None:
    """Check that a library can be, or is, in `folder`; writes nothing.

    Raises:
        MixerzooError: if something else is there, or it cannot be written.
    """
    visible = folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir())
    if (visible or folder.is_file()) and not is_library(folder):
        raise MixerzooError(f"library '{folder}' holds something else; give another --library")
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise MixerzooError(f"library '{folder}' cannot be written; give another --library")


def is_library(folder: Path) -> bool:
    """Say whether `folder` is a library."""
    return (folder / locks.LIBRARY).is_file()


class Library:
    """A folder of candidates that any number of processes may use at the same time.

    A candidate whose entry cannot be read, or whose file is missing or does not match its checksum, is named in
    `damaged`; it is then distilled again.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._damaged: dict[str, str] = {}
        self._whole: dict[str, Entry] = {}  # those whose files matched their checksum in this process
        self._used = False

    def __iter__(self) -> Iterator[Entry]:
        """Iterate over the entries that can be read, whole or not."""
        for path in sorted(self.folder.glob("*.json")):
            entry = self.read(path.stem) if KEY.fullmatch(path.stem) else None
            if entry is not None:
                yield entry

    def __len__(self) -> int:
        return sum(1 for _ in self)

    @property
    def damaged(self) -> list[str]:
        """What was found damaged, in words."""
        return list(self._damaged.values())

    def get(self, key: str) -> Entry | None:
        """Return the entry under `key` if its file is whole."""
        if key in self._whole:
            return self._whole[key]
        if not self.entry_path(key).exists():
            return None
        self._use()
        entry = self.read(key)
        if entry is None:
            self._damaged[key] = f"its entry ({self.entry_path(key)})"
            return None
        if not self.is_whole(entry):
            self._damaged[key] = f"{entry.site} {entry.candidate} ({self.tensors_path(key)})"
            return None
        with suppress(OSError):
            os.utime(self.entry_path(key))  # `prune` goes by the last use
        self._whole[key] = entry
        return entry

    def put(self, order: Order, result: Distilled) -> Entry:
        """Write a candidate: its weights, then its entry; both are there or neither counts."""
        self._use()
        key, source = order.key, order.source
        entry = Entry(
            key=key,
            site=order.site.name,
            candidate=str(order.candidate),
            steps=result.steps,
            nmse=result.nmse,
            nmse_start=result.nmse_start,
            nmse_solved=result.nmse_solved,
            params=result.params,
            seconds=round(result.seconds, 4),
            failed=result.failed,
            sha256="",
            model=source.model,
            teacher=source.teacher,
            data_name=source.data_name,
            data=source.data,
            images=source.images,
            plugin=order.plugin,
            recipe=order.recipe.to_json(),
            made=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        if not entry.failed:
            entry = replace(entry, sha256=write_tensors(self.tensors_path(key), result.state))
        content = entry.to_json()
        write_json(self.entry_path(key), content | {CHECK: json_hash(content)})
        self._whole[key] = entry
        return entry

    def state(self, key: str) -> dict[str, torch.Tensor]:
        """Return the weights under `key`, which `get` or `put` has returned.

        Raises:
            MixerzooError: if the file was damaged since.
        """
        content = self._content(self._whole[key])
        if content is None:
            raise MixerzooError(
                f"library file '{self.tensors_path(key)}' is damaged; run the same command again"
            )
        weights: dict[str, torch.Tensor] = load_tensors(content)
        return weights

    @contextmanager
    def claim(self, key: str, *, wait: bool = True) -> Iterator[bool]:
        """Keep other processes from making a candidate during the block; yields False if one is at it.

        Args:
            key: of the candidate.
            wait: until the other process is done, or has ended.
        """
        self._use()
        with locks.held(self.folder / f"{key}.lock", wait=wait) as mine:
            yield mine

    def read(self, key: str) -> Entry | None:
        """Return the entry under `key` as it is on disk, or None if it is not as it was written."""
        try:
            content = read_json(self.entry_path(key))
            check = content.pop(CHECK, None)
            entry = Entry.from_json(content)
        except (MixerzooError, AttributeError, TypeError):
            return None
        return entry if entry.key == key and check == json_hash(entry.to_json()) else None

    def is_whole(self, entry: Entry) -> bool:
        """Say whether the file of an entry matches its checksum; one that failed has none."""
        return bool(entry.failed) or self._content(entry) is not None

    def entry_path(self, key: str) -> Path:
        """Return the file of an entry."""
        return self.folder / f"{key}.json"

    def tensors_path(self, key: str) -> Path:
        """Return the file of its weights."""
        return self.folder / f"{key}.safetensors"

    def _use(self) -> None:
        """Tell other processes, for as long as this object lives, that the candidates are in use."""
        if self._used:
            return
        self._used = True
        self.folder.mkdir(parents=True, exist_ok=True)
        with suppress(PermissionError):  # a library that one may only read
            descriptor = locks.acquire(self.folder / locks.LIBRARY, shared=True)
            if descriptor is not None:
                weakref.finalize(self, os.close, descriptor)

    def _content(self, entry: Entry) -> bytes | None:
        try:
            content = self.tensors_path(entry.key).read_bytes()
        except OSError:
            return None
        return content if hashlib.sha256(content).hexdigest() == entry.sha256 else None
