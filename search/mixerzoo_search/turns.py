"""Processes of one machine that share a search take turns: while one of them measures latency, the others wait."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from torch import nn

from mixerzoo.latency import Rounds, Stopwatch, Timing
from mixerzoo.latency.rounds import AS_A_RULE
from mixerzoo_search.workers import holding


class Turns:
    """A lock that processes share while they compute, and hold alone while they measure.

    Args:
        folder: where its file is; each machine has its own.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / f"timing-{socket.gethostname() or 'machine'}.turn"
        self._shared: ExitStack | None = None

    @contextmanager
    def together(self) -> Iterator[None]:
        """Compute something, while no other process measures."""
        self._enter()
        try:
            yield
        finally:
            self._leave()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Measure something, while no other process computes."""
        inside = self._shared is not None
        self._leave()  # two that both waited for the other to let go would wait for ever
        try:
            with holding(self._file):
                yield
        finally:
            if inside:
                self._enter()

    def _enter(self) -> None:
        self._shared = ExitStack()
        self._shared.enter_context(holding(self._file, shared=True))

    def _leave(self) -> None:
        if self._shared is not None:
            self._shared.close()
            self._shared = None


class PoliteStopwatch(Stopwatch):
    """A stopwatch that measures alone, once `turns` are set."""

    turns: Turns | None = None

    def time(
        self,
        students: Mapping[str, nn.Module],
        *,
        rounds: Rounds = AS_A_RULE,
        on_round: Callable[[int], None] = lambda done: None,
    ) -> dict[str, Timing]:
        """Time students beside the teacher; the result has `teacher` in it."""
        with ExitStack() as stack:
            if self.turns is not None:
                stack.enter_context(self.turns.alone())
            return super().time(students, rounds=rounds, on_round=on_round)
