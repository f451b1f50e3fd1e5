"""`mixerzoo prune`: a family of smaller students from one, each written when it is done; what was stopped goes on."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from mixerzoo.hosts import fingerprint
from mixerzoo.latency import Conditions, default_threads
from mixerzoo.locks import alone
from mixerzoo.progress import Reporter
from mixerzoo_search.context import Context
from mixerzoo_search.opened_run import find_student, open_run
from mixerzoo_search.prune.family import Family
from mixerzoo_search.prune.settings import PruneSettings
from mixerzoo_search.prune.work import Work


def prune_run(
    source: Path,
    settings: PruneSettings,
    *,
    plan: Path | None = None,
    out: Path | None = None,
    threads: int | None = None,
    tracking_uri: str | None = None,
    model: nn.Module | None = None,
    reporter: Reporter | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Prune the best student of a finished run to each target; returns the content of `prune.json`.

    Args:
        source: the run directory of a search or of `distill --recipe far`.
        settings: the arguments.
        plan: a plan, whose weights come from the run's library, or the folder of a student.
        out: folder to write, `pruned` in the run directory unless given.
        threads: at which latency is measured; the run's unless given.
        tracking_uri: MLflow store.
        model: the teacher, for runs that were given an object.
        reporter: shows progress.
        command: the command line, for the record.

    Raises:
        BudgetOutOfReachError: if no student is as small as a target; nothing is written where that is known before.
        MixerzooError: for anything else that the user can mend; nothing is written then, unless it is about a target
            after the training: the students of the others are.
    """
    reporter = Reporter(quiet=True) if reporter is None else reporter
    opened = open_run(source, model, reporter)
    context = opened.context
    student = find_student(opened, plan, way_out="give one with --plan")
    conditions = _conditions(context, threads)
    family = Family(
        (source / "pruned") if out is None else out,
        settings.identity()
        | asdict(conditions)
        | {
            "student": fingerprint(student.model)[:16],
            "teacher": context.teacher.fingerprint[:16],
            "data": context.data.fingerprint[:16],
        },
    )
    family.check()
    with alone(family.path, "prunes"):
        family.mend()
        todo = [target for target in settings.targets if not family.done(target)]
        if todo or family.record().get("phase") != "finished":
            Work(context, student, settings, family, conditions, command).go(todo, tracking_uri)
    return family.record()


def _conditions(context: Context, threads: int | None) -> Conditions:
    """Return under what latency is measured: as in the run."""
    settings, identity = context.settings, context.run.record()["identity"]
    measured = "threads" in identity  # a training of all attention at once times nothing
    return Conditions(
        batch_size=settings.batch_size,
        threads=threads or (settings.threads if measured else default_threads()),
        dtype=settings.dtype,
        device=settings.device,
        runtime=settings.runtime,
    )
