"""Make many candidates: one after the other, or, where that takes a while, in several processes.

The processes are forked: they see the teacher and its activations without a copy, and hand over what they make
through the library. Small products do not keep many threads busy: one thread each is the fastest way to share out
the cores.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from ctypes import c_int
from functools import partial
from typing import Any

import torch

from mixerzoo.capture import Capture
from mixerzoo.plan import Candidate
from mixerzoo_search.candidates import CandidateLibrary

Task = tuple[str, Candidate]

ALONE_S = 1.0  # that one process makes candidates before others are worth their start
WORTH_S = 3.0  # of work left for which they are
POLL_S = 0.05


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def make_all(
    library: CandidateLibrary,
    todo: Sequence[Task],
    captured: Capture,
    *,
    stepped: bool,
    processes: int | None = None,
    on_made: Callable[[int], None] = lambda done: None,
) -> None:
    """Distil candidates, unless they are in the library or other processes are making them: those are waited for.

    Args:
        library: where they go.
        todo: sites and candidates.
        captured: the teacher's activations.
        stepped: with gradient steps.
        processes: how many at most; as many as there are cores unless given. Where processes cannot be forked, one.
        on_made: called with how many are done.
    """
    rest, others, done, most = list(todo), list[Task](), 0, 0
    processes = cores() if processes is None else processes
    began = time.perf_counter()

    def report(made: int) -> None:
        nonlocal most
        if made > most:
            most = made
            on_made(made)

    while rest:
        spent = time.perf_counter() - began
        if processes > 1 and done and spent > ALONE_S and len(rest) * spent / done > WORTH_S and _can_fork():
            _fork(library, rest, captured, stepped, processes, partial(_later, report, done))
            processes = 1  # what they did not make is made here: that also tells why they did not
            continue
        site, candidate = rest.pop(0)
        if library.make(site, candidate, captured, stepped=stepped, wait=False) is None:
            others.append((site, candidate))
        else:
            done += 1
            report(done)
    for site, candidate in others:  # last: by now, whoever was at it may be done
        library.make(site, candidate, captured, stepped=stepped)
        done += 1
        report(done)


def _later(report: Callable[[int], None], before: int, made: int) -> None:
    report(before + made)


def _can_fork() -> bool:
    return "fork" in multiprocessing.get_all_start_methods() and not torch.cuda.is_initialized()


def _fork(
    library: CandidateLibrary,
    todo: Sequence[Task],
    captured: Capture,
    stepped: bool,
    processes: int,
    on_made: Callable[[int], None],
) -> None:
    """Let processes take tasks in turn; returns when all of them have ended."""
    context = multiprocessing.get_context("fork")
    taken, made = context.Value(c_int, 0), context.Value(c_int, 0)
    arguments = (library, todo, captured, stepped, os.getpid(), taken, made)
    workers = [
        context.Process(target=_work, args=arguments, daemon=True) for _ in range(min(processes, len(todo)))
    ]
    try:
        for worker in workers:
            worker.start()
        while any(worker.is_alive() for worker in workers):
            time.sleep(POLL_S)
            on_made(made.value)
    finally:
        for worker in workers:
            if worker.pid is not None:
                worker.terminate()
                worker.join()


def _work(
    library: CandidateLibrary,
    todo: Sequence[Task],
    captured: Capture,
    stepped: bool,
    parent: int,
    taken: Any,
    made: Any,
) -> None:
    torch.set_num_threads(1)
    while os.getppid() == parent:
        with taken.get_lock():
            number = taken.value
            taken.value += 1
        if number >= len(todo):
            return
        try:
            site, candidate = todo[number]
            library.make(site, candidate, captured, stepped=stepped, wait=False)
        except Exception:  # the first process comes to the same task, and to the same error
            return
        with made.get_lock():
            made.value += 1
