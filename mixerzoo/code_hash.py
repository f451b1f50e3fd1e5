"""Hashes of the code that a candidate comes from: what has changed is made anew."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mixerzoo import __version__
from mixerzoo.files import json_hash
from mixerzoo.spec import MixerSpec

MAKING = (
    "capture",
    "data",
    "distill",
    "elimination",
    "objectives",
    "pairs",
    "readout",
    "ridge",
    "shrink",
    "statistics",
    "targets",
    "units",
)
DISTILLING = tuple(Path(__file__).parent / f"{name}.py" for name in MAKING)  # what weights depend on


def code_hash(spec: MixerSpec) -> str:
    """Return a hash of a mixer's code and of the code that distils it.

    The version of a plugin is not enough: it stays the same while its author works on it.
    """
    parts: list[Any] = [__version__, spec.readout, *map(_file_hash, DISTILLING)]
    for function in (spec.build, spec.inherit, spec.units):
        if function is not None:
            parts += [_name(function), _source_hash(function)]
    return json_hash(parts)


def build_hash(spec: MixerSpec) -> str:
    """Return a hash of the code that builds and runs a mixer."""
    return json_hash([_name(spec.build), _source_hash(spec.build)])


def _source_hash(function: Callable[..., Any]) -> str:
    """Return a hash of the file of a function and of all that it imports from its own package."""
    module = sys.modules.get(_plain(function).__module__)
    file = getattr(module, "__file__", None)
    if module is not None and file is not None and Path(file).is_file():
        depth = len(module.__package__.split(".")) if module.__package__ else 0
        path = Path(file).absolute()
        return _files_hash(path, path.parents[depth])
    try:
        return json_hash(inspect.getsource(_plain(function)))
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
    return json_hash(sorted(found.items()))


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
