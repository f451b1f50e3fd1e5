"""Latencies that are kept in a library: a file for each architecture under each set of conditions.

What a candidate changes is kept in units of the teacher's latency. It depends on shapes, on what runs them and on the
mixer's code, not on weights, so that any search of a teacher of this architecture can take it.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mixerzoo import locks
from mixerzoo.code_hash import build_hash
from mixerzoo.errors import MixerzooError
from mixerzoo.files import json_hash, read_json, write_json
from mixerzoo.hosts import Teacher
from mixerzoo.latency.conditions import device_name, version_of
from mixerzoo.latency.in_place import InPlace
from mixerzoo.latency.stopwatch import Stopwatch
from mixerzoo.plan import Candidate
from mixerzoo.registry import get_registry

FOLDER = "latency"  # of a library
SCHEMA = 1
CHECK = "check"  # of a file: the hash of the rest
HERE = Path(__file__).parent
MEASURING = (
    *(HERE / f"{name}.py" for name in ("in_place", "rounds", "stopwatch")),
    HERE.parent / "runtimes.py",
    HERE.parent / "hosts" / "__init__.py",
)  # what is measured, and how


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A candidate's latency at a shape of site, or why it cannot run there.

    Attributes:
        code: hash of the mixer's code, with the plugin's version.
        measured: when.
        checked: when it was last found to hold.
        placed: what was measured; None for one that cannot run.
        failed: why it cannot.
    """

    code: str
    measured: str
    checked: str
    placed: InPlace | None = None
    failed: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready data; an error that is not known becomes null."""
        content = {name: value for name, value in asdict(self).items() if value}
        if self.placed is not None:
            error = self.placed.error
            content["placed"] = asdict(self.placed) | {"error": error if math.isfinite(error) else None}
        return content

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Kept:
        """Rebuild from `to_json`."""
        content = dict(data)
        placed = content.get("placed")
        if placed is not None:
            error = math.inf if placed["error"] is None else placed["error"]
            content["placed"] = InPlace(**{**placed, "error": error})
        return cls(**content)


Entries = dict[str, dict[str, Kept]]  # shape -> candidate -> kept


class LatencyFile:
    """The latencies of one architecture under one set of conditions, shared by any number of processes.

    Attributes:
        path: its file, which need not be there.
        about: what the key is made of.
        damaged: whether the file was found to be damaged; it then counts as empty.
        teacher_ms: the teacher's latency when the table was last measured, for people; known after `read`.
    """

    def __init__(self, library: Path, stopwatch: Stopwatch) -> None:
        self.library = library
        self.about = _about(stopwatch)
        self.path = library / FOLDER / f"{json_hash(self.about)[:24]}.json"
        self.damaged = False
        self.teacher_ms: float | None = None
        self._name = stopwatch.teacher.name

    def read(self) -> Entries:
        """Return what is kept of the code as it is now."""
        return {
            shape: {text: kept for text, kept in row.items() if kept.code == code_of(text)}
            for shape, row in self._all().items()
        }

    def write(self, found: Mapping[str, Mapping[str, InPlace | str]], *, teacher_ms: float) -> None:
        """Add what was measured, or the reason where a candidate cannot run; the caller holds the claim."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        entries = self._all()
        self.teacher_ms = teacher_ms
        for shape, row in found.items():
            for text, value in row.items():
                ran = isinstance(value, InPlace)
                entries.setdefault(shape, {})[text] = Kept(
                    code=code_of(text),
                    measured=now,
                    checked=now,
                    placed=value if isinstance(value, InPlace) else None,
                    failed="" if ran else str(value),
                )
        self._store(entries)

    def confirm(self, names: Iterable[tuple[str, str]]) -> None:
        """Note that some entries (shape, candidate) were found to hold; the caller holds the claim."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        entries = self._all()
        for shape, text in names:
            if text in entries.get(shape, {}):
                entries[shape][text] = replace(entries[shape][text], checked=now)
        self._store(entries)

    def forget(self) -> None:
        """Remove everything: the machine is no longer what it was; the caller holds the claim."""
        self.path.unlink(missing_ok=True)

    @contextmanager
    def claim(self) -> Iterator[None]:
        """Keep other processes from measuring the same during the block; they would disturb each other, too."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._mark()
        with locks.held(self.path.with_suffix(".lock")):
            yield

    def _mark(self) -> None:
        """Mark the folder as a library: there may be no candidate in it yet."""
        with suppress(PermissionError):
            descriptor = locks.acquire(self.library / locks.LIBRARY, shared=True)
            if descriptor is not None:
                os.close(descriptor)

    def _all(self) -> Entries:
        if not self.path.exists():
            return {}
        found = _read(self.path)
        if found is None:
            self.damaged = True
            return {}
        self.teacher_ms, entries = found
        return entries

    def _store(self, entries: Entries) -> None:
        content = {
            "schema": SCHEMA,
            "model": self._name,
            "teacher_ms": self.teacher_ms,
            "about": self.about,
            "entries": {
                shape: {text: kept.to_json() for text, kept in row.items()} for shape, row in entries.items()
            },
        }
        write_json(self.path, content | {CHECK: json_hash(content)})


def damaged_tables(library: Path) -> list[Path]:
    """Return the files of latencies in a library that are damaged: searches measure again what was in them."""
    return [path for path in sorted((library / FOLDER).glob("*.json")) if _read(path) is None]


def _read(path: Path) -> tuple[float | None, Entries] | None:
    """Return the teacher's latency and the entries of a file; None where it is damaged."""
    try:
        content = read_json(path)
        if content.pop(CHECK) != json_hash(content):
            return None
        entries = {
            shape: {text: Kept.from_json(kept) for text, kept in row.items()}
            for shape, row in content["entries"].items()
        }
        return content["teacher_ms"], entries
    except (MixerzooError, AttributeError, KeyError, TypeError, ValueError):
        return None


def _about(stopwatch: Stopwatch) -> dict[str, Any]:
    conditions = stopwatch.conditions
    runtimes = get_registry().runtimes
    packages = ("mixerzoo", "torch", "timm", *stopwatch.runtime.packages)
    return {
        "architecture": architecture(stopwatch.teacher),
        "device": conditions.device,
        "device_name": device_name(conditions.device),
        "threads": conditions.threads,
        "dtype": conditions.dtype,
        "batch_size": conditions.batch_size,
        "runtime": conditions.runtime,
        "runtime_from": str(runtimes.origin(conditions.runtime)) if conditions.runtime in runtimes else "",
        "versions": {name: version_of(name) for name in packages},
        # Kernels in C are compiled where there is a compiler, and slow code stands in for them where there is none.
        "compiler": shutil.which(os.environ.get("CC", "cc")) is not None,
        "kernels": os.environ.get("MIXERZOO_KERNELS", "1"),
        "measuring": json_hash([hashlib.sha256(file.read_bytes()).hexdigest() for file in MEASURING])[:16],
    }


def architecture(teacher: Teacher) -> str:
    """Return a hash of all of a teacher that latency depends on: its modules, sites and images, not its weights."""
    modules = re.sub(r" at 0x[0-9a-f]+", "", repr(teacher.model))
    return json_hash([modules, [site.to_json() for site in teacher.sites], list(teacher.image.size)])[:16]


def code_of(text: str) -> str:
    """Return the hash of a candidate's code; nothing for a mixer that is not there."""
    mixers, mixer = get_registry().mixers, Candidate.parse(text).mixer
    if mixer not in mixers:
        return ""
    return json_hash([str(mixers.origin(mixer)), build_hash(mixers.get(mixer))])[:16]
