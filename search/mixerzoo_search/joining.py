"""Several processes on one search: one leads it, the others take part in its study, and any of them can take over.

Whoever holds the run's lock leads: it makes all phases and finishes. The system releases the lock when that process
ends, however it ends.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from mixerzoo.errors import MixerzooError
from mixerzoo.latency import threads
from mixerzoo.locks import lock_of
from mixerzoo_search.beginning import Opened, demand_measured_here, open_search
from mixerzoo_search.claims import counts
from mixerzoo_search.pipeline import (
    SearchResult,
    lead,
    prepare,
    study_of,
    work,
    worker_of,
)
from mixerzoo_search.run_directory import ReadOnlyRun
from mixerzoo_search.starting import Asked
from mixerzoo_search.study import OPEN
from mixerzoo_search.workers import WORKER, holding

POLL_S = 0.5


@dataclass(frozen=True, kw_only=True)
class Joined:
    """What taking part in another process's search came to.

    Attributes:
        path: the run directory.
        evaluated: plans that this process has evaluated.
        trials: of the study as a whole.
    """

    path: Path
    evaluated: int
    trials: int


def run_search(asked: Asked) -> SearchResult:
    """Search.

    Raises:
        MixerzooError: for anything the user can mend, and if another process is at this search; nothing is written
            then.
        BudgetOutOfReachError: if even the fastest plan is over the budget.
    """
    opened = open_search(asked)
    with _leading(opened) as leads:
        if leads:
            return lead(opened)
    raise MixerzooError(
        f"run directory '{opened.run.path}': another process is at this search; add --join to take part, or give "
        "another --out"
    )


def join_search(asked: Asked) -> SearchResult | Joined:
    """Take part in the study of a search that another process leads, or lead it if none does.

    It waits for the study to begin. If the process that leads ends before it is finished, this one goes on with it.

    Raises:
        MixerzooError: for anything the user can mend, such as a machine that the search was not measured on.
        BudgetOutOfReachError: if this process leads, and even the fastest plan is over the budget.
    """
    opened = open_search(asked)
    found: Joined | None = None
    told = False
    while True:
        with _leading(opened) as leads:
            if leads and found is not None and opened.run.record().get("phase") == "finished":
                return found
            if leads:
                return lead(opened)
        if found is not None:
            return found
        if opened.run.begun and opened.run.record().get("phase") == "study":
            found = _take_part(opened)
            continue
        if not told:
            asked.reporter.note(f"run '{opened.run.path}': waiting for its study to begin")
            told = True
        time.sleep(POLL_S)


def _take_part(opened: Opened) -> Joined:
    run = ReadOnlyRun(opened.run.path)
    record = run.record()
    opened.run.check(opened.identity)
    demand_measured_here(opened)
    settings = opened.asked.settings
    with threads(settings.threads):
        context = opened.context(run, record["teacher_ms"])
        prepared = prepare(context, opened.candidates, check_budget=False)
        worker = worker_of(run)
        with study_of(context, prepared, opened) as study:
            if study.user_attrs.get(OPEN):
                work(context, prepared, study, worker, journal=None)
            trials = [trial for trial in study.get_trials(deepcopy=False) if counts(trial)]
    mine = sum(trial.user_attrs.get(WORKER) == worker.name for trial in trials)
    return Joined(path=run.path, evaluated=mine, trials=len(trials))


@contextmanager
def _leading(opened: Opened) -> Iterator[bool]:
    """Hold the run's lock, beside its directory; yields False if another process does. Empty folders are removed."""
    path = opened.run.path
    made = [folder for folder in path.parents if not folder.exists()]
    try:
        with holding(lock_of(path), wait=False, remove=True) as leads:
            yield leads
    finally:
        with suppress(OSError):  # what is not empty stays
            for folder in made:
                folder.rmdir()
