"""The library: distilled candidates on disk, each under a key of all that made it, each with a checksum."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors

from mixerzoo.distill import Distilled, Recipe
from mixerzoo.errors import MixerzooError
from mixerzoo.files import read_json, write_json, write_tensors
from mixerzoo.plan import Candidate
from mixerzoo.spec import Site

INDEX = "index.json"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of the index: a candidate and how it did. `sha256` is empty for one that failed."""

    key: str
    site: str
    candidate: str
    steps: int
    nmse: float
    nmse_start: float
    nmse_solved: float
    params: int
    seconds: float
    failed: str
    sha256: str

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready data; numbers that are not finite become null."""
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in vars(self).items()
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Entry:
        """Rebuild an entry."""
        absent: dict[str, Any] = {"nmse": math.inf, "nmse_start": math.nan, "nmse_solved": math.nan}
        content: dict[str, Any] = {
            name: absent.get(name) if value is None else value for name, value in data.items()
        }
        return cls(**content)


def candidate_key(
    *, teacher: str, data: str, site: Site, candidate: Candidate, plugin: str, recipe: Recipe, images: int
) -> str:
    """Return the key of a candidate: a hash of all that its weights depend on.

    Args:
        teacher: fingerprint of the teacher.
        data: fingerprint of the data.
        site: where it stands.
        candidate: mixer and width.
        plugin: distribution and version that the mixer comes from.
        recipe: how it was distilled.
        images: calibration images.
    """
    parts = [teacher, data, site.name, str(candidate), plugin, recipe.to_json(), images]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


class Library:
    """A folder of `<key>.safetensors` files and their index.

    A file that is missing or does not match its checksum is dropped from the index and named in `damaged`; the
    candidate is then distilled again. So are all of them where the index itself cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.damaged: list[str] = []
        self._whole: set[str] = set()  # keys whose files matched their checksum in this process
        self._entries: dict[str, Entry] = {}
        if (folder / INDEX).exists():
            try:
                content = read_json(folder / INDEX)
                self._entries = {key: Entry.from_json(data) for key, data in content.items()}
            except (MixerzooError, AttributeError, TypeError):
                self.damaged.append(f"its index ({folder / INDEX})")

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: str) -> Entry | None:
        """Return the entry under `key` if its file is whole."""
        entry = self._entries.get(key)
        if entry is None or entry.failed or key in self._whole:
            return entry
        if self._content(entry) is None:
            self.damaged.append(f"{entry.site} {entry.candidate} ({self._path(key)})")
            del self._entries[key]
            return None
        self._whole.add(key)
        return entry

    def put(self, key: str, site: Site, candidate: Candidate, result: Distilled) -> Entry:
        """Write a candidate and its line in the index; both are there or neither counts."""
        entry = Entry(
            key=key,
            site=site.name,
            candidate=str(candidate),
            steps=result.steps,
            nmse=result.nmse,
            nmse_start=result.nmse_start,
            nmse_solved=result.nmse_solved,
            params=result.params,
            seconds=round(result.seconds, 4),
            failed=result.failed,
            sha256="",
        )
        if not entry.failed:
            entry = replace(entry, sha256=write_tensors(self._path(key), result.state))
        self._entries[key] = entry
        self._whole.add(key)
        write_json(self.folder / INDEX, {key: entry.to_json() for key, entry in self._entries.items()})
        return entry

    def state(self, key: str) -> dict[str, torch.Tensor]:
        """Return the weights under `key`.

        Raises:
            MixerzooError: if the file was damaged since `get`.
        """
        content = self._content(self._entries[key])
        if content is None:
            raise MixerzooError(f"library file '{self._path(key)}' is damaged; run the same command again")
        weights: dict[str, torch.Tensor] = load_tensors(content)
        return weights

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _content(self, entry: Entry) -> bytes | None:
        try:
            content = self._path(entry.key).read_bytes()
        except OSError:
            return None
        return content if hashlib.sha256(content).hexdigest() == entry.sha256 else None
