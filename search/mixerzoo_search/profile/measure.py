"""`mixerzoo profile`: what each site of a teacher does, what it costs and, given a library, what the prior predicts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mixerzoo.capture import capture
from mixerzoo.classes import fitting_labels
from mixerzoo.data import Dataset, image_batches
from mixerzoo.errors import MixerzooError
from mixerzoo.hosts import Teacher
from mixerzoo.latency import TABLE, Conditions, Stopwatch, environment, measure_table, threads
from mixerzoo.library.entries import Entry
from mixerzoo.library.folder import Library, is_library
from mixerzoo.plan import Candidate
from mixerzoo.progress import Reporter
from mixerzoo.registry import get_registry
from mixerzoo.score import Judge
from mixerzoo.statistics import ATTENTION_STATISTICS
from mixerzoo_search import report
from mixerzoo_search.prior import Clue
from mixerzoo_search.prior_table import Evidence, finite, mixing_of, prior_table, row_json
from mixerzoo_search.report import numbers
from mixerzoo_search.report.damage import number, rank_rows, sorted_rows
from mixerzoo_search.settings import MEMORY_LIMIT, check_memory_limit

NOTHING = Candidate("none")
ACCURACY_IMAGES = 200
SCHEMA = 1


def profile(
    teacher: Teacher,
    data: Dataset,
    conditions: Conditions,
    *,
    images: int,
    reporter: Reporter,
    command: str,
    library: Path | None = None,
    memory_limit: float = MEMORY_LIMIT,
) -> report.Profile:
    """Measure the attention statistics of every site, and its latency: what is saved when nothing stands there.

    With a library, the damage of the candidates that it has of this teacher and data is predicted, before any score.

    Raises:
        MixerzooError: if `library` is none, or the memory limit is no size.
    """
    check_memory_limit(memory_limit)
    if library is not None and not is_library(library):
        raise MixerzooError(f"'{library}' is not a library; give the folder that `mixerzoo search` wrote")
    indices = data.splits.calibration[:images]
    with reporter.phase("teacher's activations", len(indices)) as progress:
        batches = image_batches(data, indices, teacher.image)
        statistics = capture(
            teacher, batches, len(indices), memory_limit_gb=memory_limit, on_batch=progress
        ).statistics
    with threads(conditions.threads), reporter.phase("latency of every site", TABLE.least) as progress:
        table = measure_table(
            Stopwatch(teacher, conditions),
            {site.name: (NOTHING,) for site in teacher.sites},
            on_round=progress,
        )
    test = data.splits.test[:ACCURACY_IMAGES]
    judge = Judge(teacher, image_batches(data, test, teacher.image), fitting_labels(teacher, data, test))
    return report.Profile(
        teacher=report.Teacher(
            name=teacher.name,
            latency_ms=table.base_ms,
            accuracy=judge.teacher_evaluation().accuracy,
            params=teacher.params,
        ),
        sites=[
            report.SiteRow(
                name=site.name,
                kind=site.kind,
                statistics=statistics[site.name],
                latency_ms=-table.change_ms[site.name][str(NOTHING)],
            )
            for site in teacher.sites
        ],
        prior=None if library is None else _predicted(teacher, data, statistics, Library(library)),
        environment=environment(conditions),
        command=command,
    )


def _predicted(
    teacher: Teacher, data: Dataset, statistics: Mapping[str, Mapping[str, float]], library: Library
) -> report.PriorTable:
    """Predict the damage of the closed forms in a library; of one made more than once, the latest on most images."""
    found: dict[tuple[str, str], Entry] = {}
    for entry in sorted(library, key=lambda entry: (entry.images, entry.made)):
        ours = (entry.teacher, entry.data) == (teacher.fingerprint, data.fingerprint)
        if ours and not entry.recipe.get("steps") and not entry.failed and entry.site in statistics:
            found[entry.site, entry.candidate] = entry
    known = get_registry().mixers
    evidence = [
        Evidence(
            clue=Clue(
                site=site.name,
                candidate=candidate,
                statistics=statistics[site.name],
                nmse=entry.nmse,
                kind=site.kind,
                mixing=mixing_of(candidate),
            ),
            key=entry.key,
        )
        for site in teacher.sites
        for (name, text), entry in sorted(found.items())
        if name == site.name and (candidate := Candidate.parse(text)).mixer in known
    ]
    return prior_table(evidence, {})[0]


def profile_table(found: report.Profile) -> list[Sequence[str]]:
    """Return the sites as rows of text, the header first."""
    rows: list[Sequence[str]] = [("site", "ms", *(name.replace("_", " ") for name in ATTENTION_STATISTICS))]
    for site in found.sites:
        values = [site.statistics.get(name, math.nan) for name in ATTENTION_STATISTICS]
        cells = ["" if math.isnan(value) else f"{value:.2f}" for value in values]
        rows.append((site.name, "" if site.latency_ms is None else f"{site.latency_ms:.2f}", *cells))
    return rows


def damage_table(prior: report.PriorTable) -> list[Sequence[str]]:
    """Return what the prior says of every candidate, and its score, as rows of text, the header first."""
    header = ("site", "candidate", "mixes by", "NMSE", "predicted", "fitted", "measured", "before steps")
    rows: list[Sequence[str]] = [header]
    for row in sorted_rows(prior.rows):
        values = (row.nmse, row.predicted, row.fitted, row.score, row.before_steps)
        cells = ("" if value is None else numbers.short(value) for value in values)
        rows.append((row.site, row.candidate, "" if row.kind == "mlp" else row.mixing, *cells))
    return rows


def rank_table(prior: report.PriorTable) -> list[Sequence[str]]:
    """Return Spearman of predicted and measured damage, in all and per mixer, as rows of text, the header first."""
    rows: list[Sequence[str]] = [("Spearman", "scores", "before any score", "with the others' scores")]
    for name, rank in rank_rows(prior):
        rows.append((name, str(rank.scores), number(rank.before_scores), number(rank.left_out)))
    return rows


def profile_json(found: report.Profile) -> dict[str, Any]:
    """Return a profile as JSON-ready data; numbers that are not finite become null."""
    prior = found.prior
    content: dict[str, Any] = {
        "schema": SCHEMA,
        "teacher": asdict(found.teacher),
        "sites": [
            {"name": s.name, "kind": s.kind, "latency_ms": s.latency_ms, "statistics": finite(s.statistics)}
            for s in found.sites
        ],
        "environment": dict(found.environment),
    }
    if prior is not None:
        content["prior"] = {
            **finite(asdict(prior.overall)),
            "mixers": {name: finite(asdict(rank)) for name, rank in prior.mixers.items()},
            "candidates": [row_json(row) for row in prior.rows],
        }
    return content


def write_profile(folder: Path, found: report.Profile) -> None:
    """Write `profile.html` and `profile.png`."""
    report.write_profile(folder / "profile.html", folder / "profile.png", found)
