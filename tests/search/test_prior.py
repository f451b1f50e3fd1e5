from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixerzoo.plan import KEEP_CANDIDATE, Candidate
from mixerzoo_search.prior import Clue, Mixing, Prior, predict_damage

STATIC, NONE, LINEAR = Candidate("static"), Candidate("none"), Candidate("linear_attention")
MIXING: dict[str, Mixing] = {
    "static": "static",
    "none": "none",
    "linear_attention": "content",
    "keep": "content",
}


def clue(
    candidate: Candidate = STATIC, nmse: float | None = None, site: str = "a", **statistics: float
) -> Clue:
    mixing = MIXING[candidate.mixer]
    return Clue(site=site, candidate=candidate, statistics=statistics, nmse=nmse, mixing=mixing)


def test_without_evidence_damage_is_contribution_squared_times_error() -> None:
    forecast = predict_damage([clue(nmse=0.2, contribution=0.5), clue(KEEP_CANDIDATE)])
    assert forecast.damage[("a", STATIC)] == pytest.approx(0.05)
    assert forecast.damage[("a", KEEP_CANDIDATE)] == 0.0
    assert (forecast.spearman, forecast.scores) == (0.0, 0)


@pytest.mark.parametrize(
    ("easy", "hard"),
    [
        (clue(input_dependence=0.1), clue(input_dependence=0.8)),
        (clue(STATIC), clue(NONE)),
        (clue(entropy=0.05), clue(entropy=0.5)),
        (clue(entropy=0.98), clue(entropy=0.5)),
        (clue(sink=0.9), clue(sink=0.0)),
        (clue(LINEAR, effective_rank=0.1), clue(LINEAR, effective_rank=0.9)),
        (clue(Candidate("static", 1.0)), clue(Candidate("static", 0.25))),
        (clue(NONE, contribution=0.1), clue(NONE, contribution=0.9)),
        (
            Clue(site="m", candidate=Candidate("narrow", 0.75), kind="mlp"),
            Clue(site="m", candidate=Candidate("narrow", 0.25), kind="mlp"),
        ),
    ],
)
def test_the_statistics_point_the_expected_way(easy: Clue, hard: Clue) -> None:
    assert easy.expected_damage() < hard.expected_damage()


def test_missing_and_broken_statistics_take_the_middle() -> None:
    assert clue(entropy=math.nan).expected_damage() == clue().expected_damage()
    assert math.isfinite(clue(nmse=math.nan, contribution=0.0).expected_damage())


def make_clues(rng: np.random.Generator, sites: int = 12) -> list[Clue]:
    clues = []
    for at in range(sites):
        statistics = {
            name: float(rng.uniform(0, 1))
            for name in ("entropy", "sink", "input_dependence", "effective_rank")
        } | {"contribution": float(rng.uniform(0.1, 1.0))}
        for candidate in (STATIC, NONE, LINEAR):
            nmse = None if candidate == NONE else float(rng.uniform(0.05, 0.9))
            clues.append(Clue(site=f"s{at}", candidate=candidate, statistics=statistics, nmse=nmse))
    return clues


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000))
def test_scores_teach_what_the_formula_misses(seed: int) -> None:
    rng = np.random.default_rng(seed)
    clues = make_clues(rng, sites=20)

    # The truth: the formula, in other units, and with an effect of input dependence that it does not know.
    def truth(clue: Clue) -> float:
        return 7.0 * clue.expected_damage() * math.exp(4 * clue.statistic("input_dependence"))

    scores = {clue.key: truth(clue) for clue in clues[:30]}
    plain, taught = predict_damage(clues), predict_damage(clues, scores)
    unseen = clues[30:]

    def miss(damage: dict[tuple[str, Candidate], float]) -> float:
        return float(np.std([math.log(damage[clue.key] / truth(clue)) for clue in unseen]))

    assert miss(dict(taught.damage)) < 0.7 * miss(dict(plain.damage))
    assert taught.spearman > 0.8
    assert taught.scores == 30
    for key, score in scores.items():
        assert taught.damage[key] == score


def test_one_score_only_changes_the_units() -> None:
    clues = make_clues(np.random.default_rng(0))
    plain = predict_damage(clues).damage
    taught = predict_damage(clues, {clues[0].key: 3 * plain[clues[0].key]}).damage
    ratios = [taught[clue.key] / plain[clue.key] for clue in clues]
    assert ratios == pytest.approx([3.0] * len(clues), rel=0.05)


def test_scores_that_are_noise_or_broken_do_no_harm() -> None:
    clues = make_clues(np.random.default_rng(0))
    scores = {clues[0].key: -1e-6, clues[1].key: math.nan, clues[2].key: math.inf, clues[3].key: 0.1}
    forecast = predict_damage(clues, scores)
    assert forecast.scores == 2
    assert all(math.isfinite(value) and value >= 0 for value in forecast.damage.values())


def test_a_forecast_of_nothing() -> None:
    assert predict_damage([]).damage == {}


damages = st.dictionaries(
    st.tuples(st.sampled_from("abc"), st.sampled_from([KEEP_CANDIDATE, STATIC, NONE, LINEAR])),
    st.one_of(st.floats(0, 1e6), st.just(math.nan), st.just(math.inf)),
    min_size=1,
)


@given(damages, st.floats(0, 1))
def test_a_prior_is_a_probability_and_keeps_its_uniform_share(
    damage: dict[tuple[str, Candidate], float], share: float
) -> None:
    prior = Prior.from_damage(damage, uniform_share=share)
    for row in prior.weights.values():
        assert sum(row.values()) == pytest.approx(1.0)
        assert min(row.values()) >= share / len(row) - 1e-12


def test_less_damage_is_more_likely() -> None:
    damage = {("a", KEEP_CANDIDATE): 0.0, ("a", STATIC): 0.1, ("a", NONE): 5.0, ("b", NONE): 0.01}
    prior = Prior.from_damage(damage)
    row = prior.weights["a"]
    assert row["keep"] > row["static@1"] > row["none@1"]
    assert prior.order() == [("b", "none@1"), ("a", "static@1"), ("a", "none@1")]
    assert prior.probabilities("a", ["none@1", "keep", "unheard_of"]).sum() == pytest.approx(1.0)
    assert prior.probabilities("elsewhere", ["x", "y"]).tolist() == [0.5, 0.5]


def test_the_ablations() -> None:
    damage = {("a", Candidate(f"m{at}")): float(at) for at in range(20)}
    prior = Prior.from_damage(damage)
    assert set(prior.uniform().weights["a"].values()) == {0.05}
    shuffled = prior.shuffled(1)
    assert sorted(shuffled.weights["a"].values()) == sorted(prior.weights["a"].values())
    assert shuffled != prior
    assert shuffled == prior.shuffled(1) != prior.shuffled(2)
