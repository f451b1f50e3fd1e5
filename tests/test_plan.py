"""Candidates and plans: written and read back without loss, named briefly, refused clearly."""

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixerzoo import MixerzooError, Site
from mixerzoo.plan import KEEP, KEEP_CANDIDATE, Candidate, Plan


def site(name, index, kind="attention"):
    return Site(name=name, kind=kind, index=index, stage=0, dim=8, heads=2, tokens=5)


SITES = [site(f"blocks.{i}.attn", i) for i in range(6)] + [
    site(f"blocks.{i}.mlp", 6 + i, "mlp") for i in range(2)
]
LETTERS = {"glu_mlp": "G", "none": "N"}

candidates = st.one_of(
    st.just(KEEP_CANDIDATE),
    st.builds(
        Candidate,
        st.from_regex(r"[a-z][a-z0-9_]{0,12}", fullmatch=True).filter(lambda name: name != KEEP),
        st.floats(min_value=1e-3, max_value=8),
    ),
)
plans = st.lists(candidates, min_size=len(SITES), max_size=len(SITES)).map(
    lambda found: Plan(tuple((s.name, c) for s, c in zip(SITES, found, strict=True)))
)


@given(candidates)
def test_a_candidate_is_read_back_as_it_was_written(candidate):
    assert Candidate.parse(str(candidate)) == candidate


@given(plans)
def test_a_plan_survives_json(plan):
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan
    assert again.key == plan.key


@given(plans)
def test_the_short_name_has_one_run_a_letter_and_counts_every_site(plan):
    attention, mlp = plan.short_name(SITES, LETTERS).split("/")
    for part, count in ((attention, 6), (mlp, 2)):
        runs = [(run[0], int(run[1:])) for run in part.split("-")]
        assert sum(length for _, length in runs) == count
        assert all(one[0] != two[0] for one, two in pairwise(runs))


@given(plans, plans)
def test_plans_with_one_key_are_one_plan(one, other):
    assert (one.key == other.key) == (one == other)


def test_texts():
    assert str(Candidate("glu_mlp", 0.5)) == "glu_mlp@0.5"
    assert str(Candidate("glu_mlp", 1 / 3)) == "glu_mlp@0.3333333333333333"
    assert str(KEEP_CANDIDATE) == "keep"
    assert Candidate.parse("glu_mlp") == Candidate("glu_mlp", 1.0)
    assert Candidate.parse("keep").is_keep


@pytest.mark.parametrize(
    "text",
    [
        *("", "@0.5", "glu_mlp@", "glu_mlp@half", "glu_mlp@nan", "glu_mlp@inf", "glu_mlp@0", "glu_mlp@-1"),
        *("keep@0.5", "glu mlp@1", "os.system@1", "glu@1@2", 3, None),
    ],
)
def test_anything_else_is_refused(text):
    with pytest.raises(MixerzooError, match=r"write mixer@width, such as glu_mlp@0.5") as caught:
        Candidate.parse(text)
    assert f"'{text}'" in str(caught.value)


def test_sites_that_are_not_named_keep_the_teachers_module():
    plan = Plan.of({"blocks.4.attn": Candidate("glu_mlp", 0.5), "blocks.5.attn": Candidate("none")}, SITES)
    assert plan["blocks.4.attn"] == Candidate("glu_mlp", 0.5)
    assert plan["blocks.0.attn"].is_keep
    assert plan.replaced() == 2
    assert list(plan.to_json()) == [s.name for s in SITES]
    assert plan.short_name(SITES, LETTERS) == "A4-G1-N1/A2"


def test_a_mixer_without_a_letter_is_named_by_its_first():
    plan = Plan.of({s.name: Candidate("hyena") for s in SITES}, SITES)
    assert plan.short_name(SITES, {}) == "H6/H2"
    assert Plan.of({}, SITES[:3]).short_name(SITES[:3], {}) == "A3"


def test_a_plan_for_a_site_that_is_not_there_is_refused():
    with pytest.raises(MixerzooError, match=r"plan: 'blocks.9.attn' is not a site of this teacher"):
        Plan.of({"blocks.9.attn": KEEP_CANDIDATE}, SITES)


def test_a_plan_with_a_bad_candidate_is_refused():
    with pytest.raises(MixerzooError, match="candidate 'glu_mlp@wide'"):
        Plan.from_json({"blocks.0.attn": "glu_mlp@wide"})
