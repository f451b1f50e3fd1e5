"""A search before its first phase: what was asked for is checked, and the run directory is begun."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixerzoo.errors import MixerzooError
from mixerzoo.hosts import assemble
from mixerzoo.latency import REFERENCE, Conditions, Stopwatch, check_device, environment
from mixerzoo.library.folder import check_folder
from mixerzoo.registry import get_registry
from mixerzoo_search.candidates import Candidates, list_candidates
from mixerzoo_search.context import Context
from mixerzoo_search.differences import machines
from mixerzoo_search.evaluate import FINAL
from mixerzoo_search.run_directory import RunDirectory
from mixerzoo_search.starting import Asked
from mixerzoo_search.study import is_taken, of_another
from mixerzoo_search.taking_over import begin, carry
from mixerzoo_search.timing import demand_candidates
from mixerzoo_search.turns import PoliteStopwatch


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A search whose arguments have been checked, and what is known before anything is measured.

    Attributes:
        asked: what was asked for.
        run: the run directory.
        candidates: of every site.
        identity: what makes the search what it is.
        stopwatch: times students beside the teacher.
    """

    asked: Asked
    run: RunDirectory
    candidates: Candidates
    identity: dict[str, Any]
    stopwatch: PoliteStopwatch

    def context(self, run: RunDirectory, teacher_ms: float) -> Context:
        """Return what the phases share."""
        asked = self.asked
        return Context(
            settings=asked.settings,
            teacher=asked.teacher,
            data=asked.data,
            run=run,
            reporter=asked.reporter,
            stopwatch=self.stopwatch,
            teacher_ms=teacher_ms,
            budget_ms=asked.settings.budget.in_ms(teacher_ms),
        )


def open_search(asked: Asked) -> Opened:
    """Check everything that can be checked; writes nothing.

    Raises:
        MixerzooError: for anything the user can mend.
    """
    settings = asked.settings
    check_device(settings.device, settings.dtype)
    conditions = Conditions(
        batch_size=settings.batch_size,
        threads=settings.threads,
        dtype=settings.dtype,
        device=settings.device,
        runtime=settings.runtime,
    )
    stopwatch = PoliteStopwatch(asked.teacher, conditions)
    candidates = list_candidates(asked.teacher.sites, mixers=settings.mixers, widths=settings.widths)
    demand_candidates(candidates, stopwatch.runtime)
    identity = settings.identity() | {
        "teacher_fingerprint": asked.teacher.fingerprint[:16],
        "data_fingerprint": asked.data.fingerprint[:16],
        "plugins": get_registry().versions(),
        "space": {site: [str(c) for c in row] for site, row in candidates.items()},
    }
    run = _free_directory(asked.run, identity) if asked.numbered else asked.run
    run.check(identity)
    if asked.source is not None and run.path.resolve() == Path.cwd():
        raise MixerzooError(
            f"--out {run.path} is the working directory; with --from, give --out the name of a new one"
        )
    library = library_of(asked, run)
    if library.resolve() == run.path.resolve():
        raise MixerzooError(f"run directory '{run.path}' is the library's; give another --out or --library")
    check_folder(library)
    # Asked in this order: another process may just begin the same search.
    if asked.storage is not None and is_taken(asked.storage, run.study) and not run.begun:
        raise of_another(asked.storage, run.study)
    return Opened(asked=asked, run=run, candidates=candidates, identity=identity, stopwatch=stopwatch)


def library_of(asked: Asked, run: RunDirectory) -> Path:
    """Return the library: the given one, else that of the run, else that of the run that is taken over from."""
    if asked.library is not None:
        return asked.library
    return asked.source.library if asked.source is not None and not run.begun else run.library


def _free_directory(run: RunDirectory, identity: dict[str, Any]) -> RunDirectory:
    """Return the first of `run`, `run-2`, ... that is free, or holds this very search."""
    number, found = 1, run
    while True:
        try:
            found.check(identity)
        except MixerzooError:
            number += 1
            found = RunDirectory(run.path.with_name(f"{run.path.name}-{number}"))
            continue
        return found


def begin_run(opened: Opened, library: Path) -> None:
    """Write `run.json`, with what is taken over from another run if there is one."""
    asked, run = opened.asked, opened.run
    here = environment(opened.stopwatch.conditions)
    record: dict[str, Any] = {
        "library": run.name_of(library),
        "environment": here,
        "classes": list(asked.data.classes),
        "skipped_images": list(asked.data.skipped),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }
    if asked.source is None:
        run.start(opened.identity, teacher_ms=_time_teacher(opened.stopwatch), **record)
        return
    carried = carry(
        asked.source,
        opened.candidates,
        environment=here,
        storage=asked.source_storage,
        steps_anew=asked.steps_anew,
    )
    teacher_ms = carried.teacher_ms
    if teacher_ms is None:
        asked.reporter.note(f"run '{asked.source.path}': latency is measured anew ({carried.why})")
        teacher_ms = _time_teacher(opened.stopwatch)
    begin(run, carried, opened.identity, teacher_ms=teacher_ms, source=str(asked.source.path), **record)
    asked.reporter.note(f"run '{asked.source.path}': taken over into '{run.path}': {carried.told}")


def elsewhere(opened: Opened) -> str | None:
    """Return in what the machine that a begun run was measured on is another one than this; None if it is not."""
    there = opened.run.record().get("environment")
    return None if there is None else machines(there, environment(opened.stopwatch.conditions))


def demand_measured_here(opened: Opened) -> None:
    """Refuse a begun run that was measured on another machine: latencies of two are on no common scale.

    Raises:
        MixerzooError: with the difference.
    """
    other = elsewhere(opened)
    if other is not None:
        path = opened.run.path
        raise MixerzooError(
            f"run '{path}': its latencies are those of another machine ({other}); search with --from {path} and "
            "another --out, which measures latency anew"
        )


def _time_teacher(stopwatch: Stopwatch) -> float:
    again = {"again": assemble(stopwatch.teacher.model, {})}
    return stopwatch.time(again, rounds=FINAL)[REFERENCE].median
