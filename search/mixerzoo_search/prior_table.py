"""The prior beside the truth: what it is made from and predicts for every candidate, and how it ranks each mixer's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mixerzoo.plan import Candidate
from mixerzoo.registry import get_registry
from mixerzoo_search.fit_quality import spearman
from mixerzoo_search.prior import Clue, DamageForecast, Mixing, predict_damage
from mixerzoo_search.report.content import DamageRow, PriorTable, Rank

if TYPE_CHECKING:
    from mixerzoo_search.candidates import Candidates
    from mixerzoo_search.context import Context

LEAST_SCORES = 3  # under which ranks say nothing

Scores = Mapping[tuple[str, Candidate], float]


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What is known of one candidate at one site.

    Attributes:
        clue: what the prior goes by.
        key: of its weights in the library; empty where there are none.
        before_steps: its score as it was solved in closed form, if these weights have taken gradient steps.
    """

    clue: Clue
    key: str = ""
    before_steps: float | None = None


def gather(context: Context, candidates: Candidates) -> list[Evidence]:
    """Return what a search knows of its candidates: their sites, and their errors with the weights that count."""
    statistics, scores = context.statistics, context.run.load("scores") or {}
    evidence = []
    for site, row in candidates.items():
        for candidate in row:
            entry = context.library.best(site, candidate)
            closed = context.library.find(site, candidate, stepped=False)
            stepped = entry is not None and closed is not None and entry.key != closed.key
            clue = Clue(
                site=site,
                candidate=candidate,
                statistics=statistics[site],
                nmse=None if entry is None else entry.nmse,
                kind=context.teacher.site(site).kind,
                mixing=mixing_of(candidate),
            )
            evidence.append(
                Evidence(
                    clue=clue,
                    key="" if entry is None else entry.key,
                    before_steps=scores.get(closed.key) if stepped and closed is not None else None,
                )
            )
    return evidence


def mixing_of(candidate: Candidate) -> Mixing:
    """Return how a mixer decides which token sees which, as far as its claims tell."""
    spec = get_registry().mixers.get(candidate.mixer)
    if spec.caps.per_token:
        return "none" if spec.readout is None else "token"
    return "content" if spec.caps.any_length else "static"


def prior_table(evidence: Sequence[Evidence], scores: Scores) -> tuple[PriorTable, DamageForecast]:
    """Predict the damage of every candidate, and compare with the scores there are."""
    forecast = predict_damage([one.clue for one in evidence], scores)
    rows = [_row(one, forecast, scores) for one in evidence if not one.clue.candidate.is_keep]
    mixers = sorted({row.mixer for row in rows if row.score is not None})
    table = PriorTable(
        rows=rows,
        overall=rank(rows),
        mixers={mixer: rank([row for row in rows if row.mixer == mixer]) for mixer in mixers},
    )
    return table, forecast


def rank(rows: Sequence[DamageRow]) -> Rank:
    """Return how well the predictions rank the scores; NaN under three scores, or where either side is constant."""
    scored = [row for row in rows if row.score is not None and math.isfinite(row.score)]
    truth = [float(row.score) for row in scored if row.score is not None]
    return Rank(
        scores=len(scored),
        before_scores=_spearman([row.predicted for row in scored], truth),
        left_out=_spearman([math.nan if row.fitted is None else row.fitted for row in scored], truth),
    )


def to_json(table: PriorTable) -> dict[str, Any]:
    """Return the content of `prior.json`; numbers that are not finite become null, features are left out."""
    return {
        **finite(asdict(table.overall)),
        "mixers": {mixer: finite(asdict(found)) for mixer, found in table.mixers.items()},
        "candidates": [
            {name: value for name, value in row_json(row).items() if name != "features"} for row in table.rows
        ],
    }


def row_json(row: DamageRow) -> dict[str, Any]:
    """Return a row as JSON-ready data."""
    return finite(asdict(row))


def evidence_from_json(
    content: Mapping[str, Any], statistics: Mapping[str, Mapping[str, float]]
) -> list[Evidence]:
    """Rebuild what `prior.json` was made from, with the statistics of the sites.

    Raises:
        LookupError, TypeError, ValueError, AttributeError: for anything else.
    """
    return [
        Evidence(
            clue=Clue(
                site=row["site"],
                candidate=Candidate.parse(row["candidate"]),
                statistics=statistics[row["site"]],
                nmse=None if row["nmse"] is None else float(row["nmse"]),
                kind=row["kind"],
                mixing=row["mixing"],
            ),
            key=row["key"],
            before_steps=row["before_steps"],
        )
        for row in content["candidates"]
    ]


def _row(one: Evidence, forecast: DamageForecast, scores: Scores) -> DamageRow:
    clue, score = one.clue, scores.get(one.clue.key)
    return DamageRow(
        site=clue.site,
        kind=clue.kind,
        candidate=str(clue.candidate),
        mixing=clue.mixing,
        nmse=clue.nmse,
        predicted=forecast.expected[clue.key],
        fitted=forecast.fitted.get(clue.key),
        score=score if score is not None and math.isfinite(score) else None,
        before_steps=one.before_steps,
        key=one.key,
        features=clue.features(),
    )


def _spearman(predicted: Sequence[float], truth: Sequence[float]) -> float:
    finite = np.isfinite(predicted)
    if finite.sum() < LEAST_SCORES or len(set(truth)) < 2 or len({p for p in predicted if p == p}) < 2:
        return math.nan
    return spearman(predicted, truth)


def finite(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row with null for every number that is not finite."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in content.items()
    }
