"""Which of the processes that work on one study are alive.

Each holds a lock on a file of its own, which the system releases however the process ends. Where such a lock says
nothing (another machine, a file system without locks), a process is taken for dead when its heartbeat in the study
stands still for a while.
"""

from __future__ import annotations

import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from optuna.study import Study
from optuna.trial import TrialState

from mixerzoo import locks

BEAT_S = 10.0
STALE_S = 60.0  # without a beat after which a process on another machine is taken for dead
WORKER = "worker"  # trial attribute: the process that evaluates it
BEATS = "beats of"  # study attribute, with the name of the process

_held: set[int] = set()  # descriptors of locks, which processes that are forked must not keep


def _let_go_in_child() -> None:
    for descriptor in _held:
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)


@contextmanager
def holding(path: Path, *, wait: bool = True, shared: bool = False, remove: bool = False) -> Iterator[bool]:
    """Hold the lock `path` during the block, this process alone: what it forks does not; yields False if another does.

    Args:
        path: the file.
        wait: until it is free.
        shared: others may hold it too, if they share it.
        remove: the file after the block.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = locks.acquire(path, wait=wait, shared=shared)
    if descriptor is None:
        yield False
        return
    _held.add(descriptor)
    try:
        yield True
    finally:
        if remove:
            with suppress(OSError):  # Windows removes no file that is open
                path.unlink()
        _held.discard(descriptor)
        os.close(descriptor)


class Worker:
    """One process that takes part in a study.

    Attributes:
        name: its machine and a random part, as trials name the process that evaluates them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = f"{_machine()}.{uuid.uuid4().hex[:12]}"
        self._locks_work = False
        self._seen: dict[
            str, tuple[object, float]
        ] = {}  # process -> its last beat, and when it was first seen

    @contextmanager
    def working(self, study: Study) -> Iterator[None]:
        """Be alive during the block: hold the lock, and beat in the study."""
        stop = threading.Event()

        def beat() -> None:
            count = 0
            while True:
                count += 1
                with suppress(Exception):  # a storage that does not answer is met by the search itself
                    study.set_user_attr(f"{BEATS} {self.name}", count)
                if stop.wait(BEAT_S):
                    study._storage.remove_session()
                    return

        with holding(self._file(self.name)):
            # The file stays where the block fails: whoever goes on with the trial then sees at once that it may.
            self._locks_work = self._is_locked(self._file(self.name))
            self._tidy(study)
            thread = threading.Thread(target=beat, daemon=True)
            thread.start()
            try:
                yield
            finally:
                stop.set()
                thread.join()
        self.forget(self.name)

    def is_alive(self, study: Study, name: str) -> bool:
        """Say whether the process that calls itself `name` is alive, as far as can be known yet."""
        if name == self.name:
            return True
        file = self._file(name)
        if self._locks_work and name.startswith(f"{_machine()}.") and file.exists():
            return self._is_locked(file)
        beat = study.user_attrs.get(f"{BEATS} {name}")
        last, since = self._seen.get(name, (None, 0.0))
        if name not in self._seen or last != beat:
            self._seen[name] = beat, time.monotonic()
            return True
        return time.monotonic() - since < STALE_S

    def forget(self, name: str) -> None:
        """Remove the file of a process that has no trial any more."""
        with suppress(OSError):
            self._file(name).unlink()

    def _tidy(self, study: Study) -> None:
        """Remove the files of dead processes that no trial waits for."""
        running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        named = {self._file(trial.user_attrs[WORKER]) for trial in running if WORKER in trial.user_attrs}
        if self._locks_work:
            for file in {*self.folder.glob("*.lock")} - named:
                if not self._is_locked(file):
                    file.unlink(missing_ok=True)

    def _file(self, name: str) -> Path:
        return self.folder / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}.lock"

    def _is_locked(self, file: Path) -> bool:
        descriptor = locks.acquire(file, wait=False)
        if descriptor is None:
            return True
        os.close(descriptor)
        return False


def _machine() -> str:
    return re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname()) or "machine"
