"""Progress of long work: a bar with the time left on a terminal, nothing where there is none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

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


class Reporter:
    """Shows one bar a phase on standard error; silent if `quiet` or not a terminal."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = Console(stderr=True)
        self.silent = quiet or not self.console.is_terminal

    def note(self, text: str) -> None:
        """Print one line, unless silent."""
        if not self.silent:
            self.console.print(text, highlight=False)

    @contextmanager
    def phase(self, name: str, total: float) -> Iterator[Report]:
        """Show a bar inside the block; call the yielded function with how much is done."""
        if self.silent:
            yield lambda done: None
            return
        with Progress(
            TextColumn("{task.description:<34}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
        ) as progress:
            task = progress.add_task(name, total=total)
            yield lambda done: progress.update(task, completed=done)
            progress.update(task, completed=total)
