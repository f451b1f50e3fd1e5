"""Progress of long work: a bar with the time left on a terminal, nothing where there is none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Report = Callable[[float], None]


class Bar(Protocol):
    """What a phase is told: how much is done, and how much there is, where that has changed."""

    def __call__(self, done: float, total: float | None = None) -> None:
        """Show it."""


def beginning_at(before: float, report: Report) -> Report:
    """Return what a part of a phase reports to, if so much was done before it."""
    return lambda done: report(before + done)


class Reporter:
    """Shows one bar a phase on standard error; silent if `quiet` or not a terminal."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = Console(stderr=True)
        self.silent = quiet or not self.console.is_terminal

    def note(self, text: str) -> None:
        """Print one line, unless silent."""
        if not self.silent:
            self.console.print(text, highlight=False, markup=False)

    @contextmanager
    def phase(self, name: str, total: float) -> Iterator[Bar]:
        """Show a bar inside the block; call the yielded function with how much is done."""
        if self.silent:
            yield lambda done, total=None: None
            return
        with Progress(
            TextColumn("{task.description:<34}", markup=False),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
        ) as progress:
            task = progress.add_task(name, total=total)
            yield lambda done, total=None: progress.update(task, completed=done, total=total)
            progress.update(task, completed=progress.tasks[task].total)
