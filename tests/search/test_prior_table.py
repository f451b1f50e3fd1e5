"""The prior beside the truth: ranks per mixer, what is kept in JSON, and what is rebuilt from it."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from mixerzoo.plan import KEEP_CANDIDATE, Candidate
from mixerzoo_search.fit_quality import spearman
from mixerzoo_search.prior import Clue, predict_damage
from mixerzoo_search.prior_table import Evidence, evidence_from_json, prior_table, to_json
from mixerzoo_search.report import PriorTable

MIXERS = ("static", "linear", "pool")
STATISTICS = {
    f"s{at}": {"entropy": 0.1 * at, "contribution": 0.2 + 0.1 * at, "locality": math.nan} for at in range(8)
}


def make_evidence() -> list[Evidence]:
    rng = np.random.default_rng(0)
    return [
        Evidence(
            clue=Clue(
                site=site,
                candidate=Candidate(mixer),
                statistics=statistics,
                nmse=float(rng.uniform(0.05, 0.9)),
                mixing="static",
            ),
            key=f"{site} {mixer}",
        )
        for site, statistics in STATISTICS.items()
        for mixer in MIXERS
    ]


def make_scores(evidence: list[Evidence], noise: float = 0.2) -> dict[tuple[str, Candidate], float]:
    rng = np.random.default_rng(1)
    return {
        one.clue.key: one.clue.expected_damage() * float(np.exp(noise * rng.normal()))
        for one in evidence
        if one.clue.candidate.mixer != "pool" or one.clue.site in ("s1", "s2")
    }


def test_each_row_has_features_predictions_and_the_truth() -> None:
    evidence = make_evidence()
    scores = make_scores(evidence)
    table, forecast = prior_table(evidence, scores)
    assert [(row.site, row.candidate) for row in table.rows] == [
        (one.clue.site, str(one.clue.candidate)) for one in evidence
    ]
    for row, one in zip(table.rows, evidence, strict=True):
        clue = one.clue
        assert row.features == clue.features()
        assert {"log_contribution", "log_error", "entropy", "mixes_static"} <= set(row.features)
        assert row.predicted == pytest.approx(clue.expected_damage())
        assert row.score == scores.get(clue.key)
        assert (row.nmse, row.mixing, row.key) == (clue.nmse, "static", one.key)
        assert row.fitted is not None
        if row.score is None:
            assert row.fitted == forecast.damage[clue.key]


def test_a_fit_leaves_out_the_candidates_own_score() -> None:
    evidence = make_evidence()
    scores = make_scores(evidence)
    key = evidence[0].clue.key
    fitted = [
        next(row for row in prior_table(evidence, scores | {key: scores[key] * times})[0].rows).fitted
        for times in (1, 1000)
    ]
    assert fitted[0] == pytest.approx(fitted[1], rel=1e-6)
    # It is what is predicted where that score was never measured.
    others = {other: score for other, score in scores.items() if other != key}
    assert predict_damage([one.clue for one in evidence], others).damage[key] == pytest.approx(
        fitted[0], rel=1e-6
    )


def test_ranks_are_of_each_mixer_and_nothing_is_said_from_two_scores() -> None:
    evidence = make_evidence()
    table, forecast = prior_table(evidence, make_scores(evidence))
    assert {mixer: rank.scores for mixer, rank in table.mixers.items()} == {
        "linear": 8,
        "pool": 2,
        "static": 8,
    }
    assert table.overall.scores == 18
    assert table.overall.left_out == pytest.approx(forecast.spearman)
    for mixer in ("linear", "static"):
        rows = [row for row in table.rows if row.mixer == mixer]
        truth = [row.score or 0.0 for row in rows]
        assert table.mixers[mixer].before_scores == pytest.approx(
            spearman([r.predicted for r in rows], truth)
        )
        assert table.mixers[mixer].left_out == pytest.approx(spearman([r.fitted or 0.0 for r in rows], truth))
    assert math.isnan(table.mixers["pool"].before_scores)
    assert math.isnan(table.mixers["pool"].left_out)


def test_ranks_of_what_is_all_the_same_or_broken_are_not_numbers() -> None:
    evidence = make_evidence()
    same, _ = prior_table(evidence, dict.fromkeys(make_scores(evidence), 0.5))
    assert math.isnan(same.overall.before_scores)
    broken, _ = prior_table(evidence, dict.fromkeys(make_scores(evidence), math.nan))
    assert broken.overall.scores == 0
    assert {row.score for row in broken.rows} == {row.fitted for row in broken.rows} == {None}
    nothing, _ = prior_table([], {})
    assert nothing.rows == []


def again(table: PriorTable) -> list[Evidence]:
    return evidence_from_json(json.loads(json.dumps(to_json(table), allow_nan=False)), STATISTICS)


def test_what_is_kept_gives_the_same_table() -> None:
    evidence = [*make_evidence(), Evidence(clue=Clue(site="s1", candidate=KEEP_CANDIDATE))]
    evidence[3] = Evidence(
        clue=Clue(
            site="s1", candidate=Candidate("static", 1 / 3), statistics=STATISTICS["s1"], mixing="static"
        ),
        before_steps=0.5,
    )
    scores = make_scores(evidence)
    for known in (scores, {}):
        table, _ = prior_table(evidence, known)
        assert all(row.candidate != "keep" for row in table.rows)
        assert prior_table(again(table), known)[0].rows == table.rows
