"""`mixerzoo profile --run`: what a search, finished or not, knows of its sites and candidates. It measures nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixerzoo.errors import MixerzooError
from mixerzoo_search import report
from mixerzoo_search.prior_table import Evidence, evidence_from_json, prior_table
from mixerzoo_search.run_directory import RUN_FILE, RunDirectory

NOTHING = "none@1"


def profile_run(path: Path, *, command: str = "") -> report.Profile:
    """Return the profile of the teacher of a run, with what the prior predicts and what was measured.

    Scores that the search had measured when it was stopped count, too.

    Raises:
        MixerzooError: if `path` is no run directory, or the search has not come so far.
    """
    run = RunDirectory(path)
    if not (path / RUN_FILE).exists():
        raise MixerzooError(
            f"'{path}' is not a run directory: it has no {RUN_FILE}; give what a search wrote"
        )
    record, statistics, prior = run.record(), run.load("statistics"), run.load("prior")
    if statistics is None or prior is None:
        raise MixerzooError(
            f"run '{path}' has no predictions yet: start the same search again, and it goes on"
        )
    scores, latency, summary = (run.load(name) or {} for name in ("scores", "latency", "summary"))
    try:
        evidence = evidence_from_json(prior, statistics)
        table, _ = prior_table(evidence, _scores(evidence, scores))
        return report.Profile(
            teacher=_teacher(record, summary),
            sites=_sites(evidence, statistics, latency),
            prior=table,
            environment=record["environment"],
            command=command,
        )
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise MixerzooError(
            f"run '{path}': its files are not what this version writes ({error!r}); start the same search again"
        ) from None


def _scores(evidence: list[Evidence], scores: Mapping[str, float | None]) -> dict[Any, float]:
    """Return the scores of the weights that count; one that is not finite is NaN."""
    found = {one.clue.key: scores[one.key] for one in evidence if one.key in scores}
    return {key: math.nan if score is None else float(score) for key, score in found.items()}


def _teacher(record: Mapping[str, Any], summary: Mapping[str, Any]) -> report.Teacher:
    known = summary.get("teacher", {})
    return report.Teacher(
        name=record["identity"]["model"],
        latency_ms=float(record["teacher_ms"]),
        accuracy=known.get("accuracy"),
        params=known.get("params"),
    )


def _sites(
    evidence: list[Evidence], statistics: Mapping[str, Mapping[str, float]], latency: Mapping[str, Any]
) -> list[report.SiteRow]:
    """Return the sites; what one takes is what was saved with nothing there, if that was timed."""
    kinds = {one.clue.site: one.clue.kind for one in evidence}
    change_ms = latency.get("change_ms", {})
    return [
        report.SiteRow(
            name=site,
            kind=kinds.get(site, "mlp" if "entropy" not in row else "attention"),
            statistics=row,
            candidates=[str(one.clue.candidate) for one in evidence if one.clue.site == site],
            latency_ms=-change_ms[site][NOTHING] if NOTHING in change_ms.get(site, {}) else None,
        )
        for site, row in statistics.items()
    ]
