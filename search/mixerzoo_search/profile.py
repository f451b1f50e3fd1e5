"""`mixerzoo profile`: what each site of a teacher does, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from mixerzoo.capture import capture
from mixerzoo.data import Dataset, image_batches, load_labels
from mixerzoo.hosts import Teacher
from mixerzoo.latency import TABLE, Conditions, Stopwatch, environment, measure_table, threads
from mixerzoo.plan import Candidate
from mixerzoo.progress import Reporter
from mixerzoo.score import Judge
from mixerzoo.statistics import ATTENTION_STATISTICS
from mixerzoo_search import report

NOTHING = Candidate("none")
ACCURACY_IMAGES = 200


def profile(
    teacher: Teacher, data: Dataset, conditions: Conditions, *, images: int, reporter: Reporter, command: str
) -> report.Profile:
    """Measure the attention statistics of every site, and its latency: what is saved when nothing stands there."""
    indices = data.splits.calibration[:images]
    with reporter.phase("teacher's activations", len(indices)) as progress:
        batches = image_batches(data, indices, teacher.image)
        statistics = capture(teacher, batches, len(indices), on_batch=progress).statistics
    with threads(conditions.threads), reporter.phase("latency of every site", TABLE.least) as progress:
        table = measure_table(
            Stopwatch(teacher, conditions),
            {site.name: (NOTHING,) for site in teacher.sites},
            on_round=progress,
        )
    test = data.splits.test[:ACCURACY_IMAGES]
    judge = Judge(teacher, image_batches(data, test, teacher.image), load_labels(data, test))
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
        environment=environment(conditions),
        command=command,
    )


def profile_table(found: report.Profile) -> list[Sequence[str]]:
    """Return the profile as rows of text, the header first."""
    rows: list[Sequence[str]] = [("site", "ms", *(name.replace("_", " ") for name in ATTENTION_STATISTICS))]
    for site in found.sites:
        values = [site.statistics.get(name, math.nan) for name in ATTENTION_STATISTICS]
        cells = ["" if math.isnan(value) else f"{value:.2f}" for value in values]
        rows.append((site.name, f"{site.latency_ms:.2f}", *cells))
    return rows


def write_profile(folder: Path, found: report.Profile) -> None:
    """Write `profile.html` and `profile.png`."""
    report.write_profile(folder / "profile.html", folder / "profile.png", found)
