"""The figures of `distill.py`: one JSON for all parts, to which each start adds, and from which it goes on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from mixerzoo import locks
from mixerzoo.files import read_json, write_json
from mixerzoo.latency import Conditions, environment


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the parts are told.

    Attributes:
        teacher: its name here.
        cache: where the teacher, and the library of the part `refit`, are kept.
        data: MNIST, or None for the fetched one.
        images: to capture.
        mixers: of the library.
        steps: gradient steps of the part `nmse`.
        minutes: of gradient steps of the part `refit`.
        plans: of the part `refit`; empty for all.
        variants: of the digits, in the part `refit`.
        live_every: in the part `plain`, the step of so many that runs the teacher and is timed.
        threads: of everything.
        seed: of everything random.
        quick: smaller.
    """

    teacher: str
    cache: Path
    data: Path | None
    images: int
    mixers: tuple[str, ...]
    steps: int
    minutes: float
    plans: tuple[str, ...]
    variants: tuple[str, ...]
    live_every: int
    threads: int
    seed: int
    quick: bool


class Section:
    """The figures of one part on one teacher; what was measured with the same settings before is there already.

    Args:
        path: the JSON, or None to keep nothing.
        teacher: the teacher.
        part: the part.
        settings: what the figures depend on.
        threads: of the environment.
        again: forget what is there of this part.

    Raises:
        UsageError: if `--quick` would overwrite what was measured in full.
    """

    def __init__(
        self,
        path: Path | None,
        teacher: str,
        part: str,
        settings: dict[str, Any],
        threads: int,
        *,
        again: bool = False,
    ) -> None:
        self.path, self.teacher, self.part = path, teacher, part
        settings = json.loads(json.dumps(settings))
        there = self._read().get(teacher, {}).get(part)
        if there and settings["quick"] and not there["settings"]["quick"]:
            raise click.UsageError(f"'{path}' holds {part} in full; give --quick another --json")
        self.content: dict[str, Any] = (
            there
            if there and there["settings"] == settings and not again
            else {"settings": settings, "environment": environment(Conditions(threads=threads)), "rows": {}}
        )

    @property
    def rows(self) -> dict[str, Any]:
        """Figures by what they are of; call `save` after a change."""
        rows: dict[str, Any] = self.content["rows"]
        return rows

    def save(self, **figures: Any) -> None:
        """Add figures and write the file; what other processes wrote of other parts is kept."""
        self.content |= figures
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with locks.held(self.path.with_name(f".{self.path.name}.lock")):
            whole = self._read()
            whole.setdefault(self.teacher, {})[self.part] = self.content
            write_json(self.path, whole)

    def _read(self) -> dict[str, Any]:
        if self.path is None or not self.path.exists():
            return {}
        whole: dict[str, Any] = read_json(self.path)
        return whole


def table(console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; all but its first column are numbers."""
    found = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        found.add_column(column, justify="right" if number else "left", no_wrap=not number)
    for row in rows:
        found.add_row(*row)
    console.print(found, highlight=False)


def verdict(console: Console, what: str, value: float, bar: float, *, least: bool = False) -> bool:
    """Print a figure beside its bar and say whether it is met."""
    met = value >= bar if least else value <= bar
    colour, relation = "green" if met else "red", "at least" if least else "at most"
    console.print(f"[{colour}]{what}: {value:.3g} ({relation} {bar:g})[/{colour}]", highlight=False)
    return met
