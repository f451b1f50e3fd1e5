"""The library: distilled candidates on disk, each under a key of all that made it, each with a checksum.

A candidate is two files: its weights `<key>.safetensors` and then its entry `<key>.json`, each written whole. There
is no file that two candidates share, so that any number of processes can work on one library.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import json
import math
import os
import re
import sys
import uuid
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors

from mixerzoo import __version__, locks
from mixerzoo.data import Dataset
from mixerzoo.distill import Distilled, Recipe
from mixerzoo.errors import MixerzooError
from mixerzoo.files import read_json, write_json, write_tensors
from mixerzoo.hosts import Teacher
from mixerzoo.plan import Candidate
from mixerzoo.spec import MixerSpec, Site

LOCK = "library.lock"  # marks a folder as a library, and is shared by the processes that use it
CHECK = "check"  # of an entry: the hash of the rest
KEY = re.compile(r"[0-9a-f]{24}")
MAKING = (
    "capture",
    "data",
    "distill",
    "elimination",
    "objectives",
    "pairs",
    "readout",
    "ridge",
    "statistics",
    "targets",
)
DISTILLING = tuple(Path(__file__).with_name(f"{name}.py") for name in MAKING)  # what weights depend on


@dataclass(frozen=True, kw_only=True)
class Source:
    """What candidates are distilled from: a teacher on some images.

    Attributes:
        model: name of the teacher, for people.
        teacher: fingerprint of its weights.
        data_name: name of the data, for people.
        data: fingerprint of the data.
        images: how many calibration images.
        form: hash of all else that its activations depend on: its modules, how images are prepared, which they are.
    """

    model: str
    teacher: str
    data_name: str
    data: str
    images: int
    form: str

    @classmethod
    def of(cls, teacher: Teacher, data: Dataset, calibration: Sequence[int]) -> Source:
        """Describe a teacher on the images `calibration` of the data."""
        # Heads are in the sites; activations and norms leave no trace in weights.
        modules = re.sub(r" at 0x[0-9a-f]+", "", repr(teacher.model))
        sites = [site.to_json() for site in teacher.sites]
        return cls(
            model=teacher.name,
            teacher=teacher.fingerprint,
            data_name=data.name,
            data=data.fingerprint,
            images=len(calibration),
            form=_hash([modules, sites, asdict(teacher.image), list(calibration)]),
        )


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A candidate, how it did, and what it was made from. `sha256` is empty for one that failed."""

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
    model: str
    teacher: str
    data_name: str
    data: str
    images: int
    plugin: str
    recipe: dict[str, float | str]
    made: str

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


@dataclass(frozen=True, kw_only=True)
class Order:
    """A candidate that can be made: all that its weights depend on.

    Attributes:
        source: what it is distilled from.
        site: where it stands.
        candidate: mixer and width.
        plugin: distribution and version that the mixer comes from.
        code: hash of the mixer's code, and of the code that distils.
        recipe: how it is distilled.
    """

    source: Source
    site: Site
    candidate: Candidate
    plugin: str
    code: str
    recipe: Recipe

    @property
    def key(self) -> str:
        """Key of the candidate; names that are for people are not in it."""
        source = self.source
        parts = [source.teacher, source.data, source.images, source.form, self.site.to_json()]
        parts += [str(self.candidate), self.plugin, self.code, self.recipe.to_json()]
        return _hash(parts)[:24]


def code_hash(spec: MixerSpec) -> str:
    """Return a hash of a mixer's code and of the code that distils it.

    The version of a plugin is not enough: it stays the same while its author works on it.
    """
    parts: list[Any] = [__version__, spec.readout, *map(_file_hash, DISTILLING)]
    for function in (spec.build, spec.inherit):
        if function is not None:
            parts += [_name(function), _source_hash(function)]
    return _hash(parts)


def build_hash(spec: MixerSpec) -> str:
    """Return a hash of the code that builds and runs a mixer."""
    return _hash([_name(spec.build), _source_hash(spec.build)])


def _source_hash(function: Callable[..., Any]) -> str:
    """Return a hash of the file of a function and of all that it imports from its own package."""
    module = sys.modules.get(_plain(function).__module__)
    file = getattr(module, "__file__", None)
    if module is not None and file is not None and Path(file).is_file():
        depth = len(module.__package__.split(".")) if module.__package__ else 0
        path = Path(file).absolute()
        return _files_hash(path, path.parents[depth])
    try:
        return _hash(inspect.getsource(_plain(function)))
    except (OSError, TypeError):
        return _UNKNOWN


_UNKNOWN = uuid.uuid4().hex  # of this process: code that cannot be read may be another one in the next


@functools.cache
def _files_hash(file: Path, root: Path) -> str:
    """Return a hash of a module's file and of the modules of its package below `root` that it leads to."""
    found: dict[str, str] = {}
    todo = [file]
    while todo:
        path = todo.pop()
        name = path.relative_to(root).as_posix()
        if name not in found:
            content = path.read_bytes()
            found[name] = hashlib.sha256(content).hexdigest()
            if (
                path.parent != root and path.suffix == ".py"
            ):  # what is in no package has nothing of its own to import
                todo += _imports(content, path, root)
    return _hash(sorted(found.items()))


def _imports(content: bytes, path: Path, root: Path) -> Iterator[Path]:
    """Yield the files of the same package that a module imports, wherever in it."""
    parts = path.relative_to(root).parent.parts
    for node in ast.walk(ast.parse(content)):
        names: list[tuple[str, ...]] = []
        if isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = parts[: len(parts) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            # `from package import module` leads to the module, and to the package only for what is none.
            names = [
                (*base, alias.name) if _file_of((*base, alias.name), root) else base for alias in node.names
            ]
        for name in names:
            file = _file_of(name, root)
            if file is not None and name[0] == parts[0]:
                yield file


def _file_of(name: tuple[str, ...], root: Path) -> Path | None:
    path = root.joinpath(*name)
    files = (path.with_name(f"{path.name}.py"), path / "__init__.py") if name else ()
    return next((file for file in files if file.is_file()), None)


@functools.cache
def _file_hash(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    while isinstance(function, functools.partial):
        function = function.func
    return function


def _name(function: Callable[..., Any]) -> str:
    plain = _plain(function)
    return f"{plain.__module__}.{getattr(plain, '__qualname__', type(plain).__qualname__)}"


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


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
    return (folder / LOCK).is_file()


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
        write_json(self.entry_path(key), content | {CHECK: _hash(content)})
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
        return entry if entry.key == key and check == _hash(entry.to_json()) else None

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
            descriptor = locks.acquire(self.folder / LOCK, shared=True)
            if descriptor is not None:
                weakref.finalize(self, os.close, descriptor)

    def _content(self, entry: Entry) -> bytes | None:
        try:
            content = self.tensors_path(entry.key).read_bytes()
        except OSError:
            return None
        return content if hashlib.sha256(content).hexdigest() == entry.sha256 else None
