"""A run directory: one search, all that it finished, and nothing half-written."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mixerzoo.errors import MixerzooError
from mixerzoo.files import read_json, write_json
from mixerzoo.temporary import is_free
from mixerzoo_search.differences import difference

RUN_FILE = "run.json"
PHASES_FILE = "phases.json"
LIBRARY = "library"
PHASES = ("capture", "distill", "latency", "score", "exact", "study", "finetune")


class RunDirectory:
    """`runs/<name>/`: results of phases as JSON, each written whole when the phase (or its part) is done."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._inside: list[float] = []  # for each phase being timed, seconds that belong to phases inside it

    def check(self, identity: Mapping[str, Any]) -> bool:
        """Return whether a search of this identity has begun here; writes nothing.

        Args:
            identity: what must be the same for a search to go on.

        Raises:
            MixerzooError: if the directory holds another search (with the difference), or something else.
        """
        if not self.begun:
            if not is_free(self.path):
                raise MixerzooError(f"run directory '{self.path}' holds something else; give another --out")
            return False
        there = self.record().get("identity")
        if not isinstance(there, dict):
            raise MixerzooError(f"'{self.path / RUN_FILE}': not a run of mixerzoo; give another --out")
        told = difference(there, identity)
        if told is not None:
            raise MixerzooError(
                f"run directory '{self.path}' holds another search ({told}); give another --out"
            )
        return True

    def start(self, identity: Mapping[str, Any], **record: Any) -> None:
        """Begin a search here: write `run.json`."""
        write_json(self.path / RUN_FILE, {"identity": dict(identity), **record})

    @property
    def begun(self) -> bool:
        """Whether there is a `run.json`."""
        return (self.path / RUN_FILE).exists()

    def note(self, **record: Any) -> None:
        """Add to `run.json`."""
        write_json(self.path / RUN_FILE, read_json(self.path / RUN_FILE) | record)

    @property
    def study(self) -> str:
        """The name of its study, which it keeps where the directory gets another one."""
        named: str | None = self.record().get("study") if self.begun else None
        return self.path.resolve().name if named is None else named

    @property
    def library(self) -> Path:
        """The folder of its distilled candidates: what `run.json` says, or `library` beside the run directory."""
        named = self.record().get("library") if self.begun else None
        if named is None:
            return self.path.parent / LIBRARY
        return Path(os.path.normpath(self.path.resolve() / named))

    def name_of(self, library: Path) -> str:
        """Return what `run.json` says of a library: where it is from here, if the two may be moved together."""
        there, here = library.resolve(), self.path.resolve()
        return os.path.relpath(there, here) if there.is_relative_to(here.parent) else str(there)

    def record(self) -> dict[str, Any]:
        """Return the content of `run.json`."""
        content: dict[str, Any] = read_json(self.path / RUN_FILE)
        return content

    def load(self, name: str) -> Any:
        """Return the content of `<name>.json`, or None if that part was never finished."""
        path = self.path / f"{name}.json"
        return read_json(path) if path.exists() else None

    def store(self, name: str, content: Any) -> None:
        """Write `<name>.json`."""
        write_json(self.path / f"{name}.json", content)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the time of the block to the phase's, less that of phases timed inside it.

        What was spent before a resume counts too.
        """
        began = time.perf_counter()
        self._inside.append(0.0)
        try:
            yield
        finally:
            whole = time.perf_counter() - began
            spent = self.wall_s()
            spent[phase] = spent.get(phase, 0.0) + whole - self._inside.pop()
            if self._inside:
                self._inside[-1] += whole
            write_json(self.path / PHASES_FILE, spent)

    def wall_s(self) -> dict[str, float]:
        """Return phase -> seconds spent so far, over all starts."""
        if not (self.path / PHASES_FILE).exists():
            return dict.fromkeys(PHASES, 0.0)
        content: dict[str, float] = read_json(self.path / PHASES_FILE)
        return content


class ReadOnlyRun(RunDirectory):
    """The run directory of another process's search: what there is can be read, and nothing is written."""

    def store(self, name: str, content: Any) -> None:
        """Write nothing."""

    def note(self, **record: Any) -> None:
        """Write nothing."""

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Count nothing: the time of a phase is that of the process that makes it."""
        yield
