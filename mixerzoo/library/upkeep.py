"""What is in a library, what is wrong with it, and what can go."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixerzoo import locks
from mixerzoo.errors import MixerzooError
from mixerzoo.latency.store import damaged_tables
from mixerzoo.library.entries import Entry
from mixerzoo.library.folder import KEY, Library


@dataclass(frozen=True, kw_only=True)
class Shelved:
    """An entry with what its files say: bytes of weights, and seconds since a search used it last."""

    entry: Entry
    size: int
    unused_s: float

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        return self.entry.to_json() | {"bytes": self.size, "unused_s": round(self.unused_s)}


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A file, or a candidate with both of its files, that can go.

    Attributes:
        name: file or key.
        what: `damaged`, `orphan`, `leftover`, `failed` or `unused`.
        about: what more is known, or empty.
        size: bytes.
        files: what is removed with it.
    """

    name: str
    what: str
    about: str
    size: int
    files: tuple[Path, ...]


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """What was removed, and whether a search was using the library."""

    removed: tuple[Fault, ...]
    in_use: bool


def shelved(library: Library) -> list[Shelved]:
    """Return all entries that can be read, by site and candidate."""
    found = []
    for entry in library:
        size = _size(library.tensors_path(entry.key))
        found.append(Shelved(entry=entry, size=size, unused_s=_unused_s(library.entry_path(entry.key))))
    return sorted(found, key=_place)


def _place(item: Shelved) -> tuple[str, list[tuple[int, str]], str]:
    """Return what entries are sorted by: `blocks.2` comes before `blocks.10`."""
    parts = [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", item.entry.site)]
    return item.entry.model, parts, item.entry.candidate


def faults(library: Library) -> list[Fault]:
    """Return what is damaged, and weights without an entry; not what a running process is making."""
    return _damaged_tables(library) + [
        fault
        for key in _keys(library)
        if _faults(library, key)
        for fault in _claimed_faults(library, key)
        if fault.what in ("damaged", "orphan")
    ]


def prune(
    library: Library, *, older_than: float | None = None, failed: bool = False, dry_run: bool = False
) -> Pruned:
    """Remove what is damaged or belongs to nothing, and the candidates that are asked for.

    Args:
        library: the library.
        older_than: candidates that no search used for so many days go too; unless a search is running.
        failed: so do the records of those that failed.
        dry_run: remove nothing.

    Raises:
        MixerzooError: if the library may not be written.
    """
    if not os.access(library.folder, os.W_OK):
        raise MixerzooError(
            f"library '{library.folder}': you may not write there, so that nothing can be removed"
        )
    removed = []
    for fault in _damaged_tables(library):
        (path,) = fault.files
        with locks.held(path.with_suffix(".lock"), wait=False) as mine:
            if mine:
                if not dry_run:
                    path.unlink(missing_ok=True)
                removed.append(fault)
    with _alone(library) as alone:
        for key in _keys(library):
            with _claim(library, key) as mine:
                if not mine:
                    continue
                found = _faults(library, key)
                if alone and not any(fault.what == "damaged" for fault in found):
                    found += _unwanted(library, key, older_than=older_than, failed=failed)
                for fault in found:
                    for path in () if dry_run else fault.files:
                        path.unlink(missing_ok=True)
                removed += found
    return Pruned(removed=tuple(removed), in_use=not alone)


@contextmanager
def _alone(library: Library) -> Iterator[bool]:
    """Keep searches from starting to use the library during the block; yields False if one does."""
    descriptor = locks.acquire(library.folder / locks.LIBRARY, wait=False)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            os.close(descriptor)


@contextmanager
def _claim(library: Library, key: str) -> Iterator[bool]:
    """Claim a candidate without using the library; yields False if a process is making it."""
    if not os.access(library.folder, os.W_OK):  # then no process can be
        yield True
        return
    with locks.held(library.folder / f"{key}.lock", wait=False) as mine:
        yield mine


def _keys(library: Library) -> list[str]:
    """Return the keys that any file bears, what was only begun included."""
    names = [path.name.removeprefix(".") for path in library.folder.iterdir()]
    found = {name.partition(".")[0] for name in names if "." in name}
    return sorted(key for key in found if KEY.fullmatch(key))


def _damaged_tables(library: Library) -> list[Fault]:
    return [
        Fault(
            name=str(path.relative_to(library.folder)),
            what="damaged",
            about="latencies",
            size=_size(path),
            files=(path,),
        )
        for path in damaged_tables(library.folder)
    ]


def _claimed_faults(library: Library, key: str) -> list[Fault]:
    with _claim(library, key) as mine:
        return _faults(library, key) if mine else []


def _faults(library: Library, key: str) -> list[Fault]:
    """Return what is wrong under a key that is claimed, so that no other process is at its files."""
    entry_path, tensors_path = library.entry_path(key), library.tensors_path(key)
    both = (entry_path, tensors_path)
    found = [
        Fault(name=path.name, what="leftover", about="", size=_size(path), files=(path,))
        for path in sorted(library.folder.glob(f".{key}.*.tmp"))
    ]
    size = sum(map(_size, both))
    entry = library.read(key)
    if entry_path.exists() and entry is None:
        found.append(Fault(name=entry_path.name, what="damaged", about="not readable", size=size, files=both))
    elif entry is not None and not library.is_whole(entry):
        about = f"{entry.site} {entry.candidate}"
        found.append(Fault(name=tensors_path.name, what="damaged", about=about, size=size, files=both))
    elif tensors_path.exists() and (entry is None or entry.failed):
        found.append(
            Fault(
                name=tensors_path.name,
                what="orphan",
                about="no entry",
                size=_size(tensors_path),
                files=(tensors_path,),
            )
        )
    return found


def _unwanted(library: Library, key: str, *, older_than: float | None, failed: bool) -> list[Fault]:
    entry = library.read(key)
    if entry is None:
        return []
    days = _unused_s(library.entry_path(key)) / 86_400
    old = older_than is not None and days >= older_than
    if not old and not (failed and entry.failed):
        return []
    # The entry goes first: weights without one are an orphan, an entry without weights would be damage.
    files = (library.entry_path(key), library.tensors_path(key))
    return [
        Fault(
            name=key,
            what="unused" if old else "failed",
            about=f"{entry.site} {entry.candidate}",
            size=sum(map(_size, files)),
            files=files,
        )
    ]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _unused_s(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return 0.0
