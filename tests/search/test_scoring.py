"""From candidates to scores: what is distilled, what gets gradient steps, what is left out, and what is kept."""

import dataclasses
import json

import pytest
import tiny_search
import torch

from mixerzoo.errors import MixerzooError
from mixerzoo.latency import Conditions, LatencyTable, Stopwatch
from mixerzoo.opening import open_data, open_teacher
from mixerzoo.plan import Candidate, Plan
from mixerzoo.progress import Reporter
from mixerzoo.registry import get_registry, temporary_plugin
from mixerzoo_search import candidates as candidates_module
from mixerzoo_search import exact, scoring
from mixerzoo_search.candidates import faster_than_teacher, list_candidates, not_beaten
from mixerzoo_search.context import Context
from mixerzoo_search.prior import DamageForecast
from mixerzoo_search.run_directory import RunDirectory
from mixerzoo_search.settings import Budget, Settings
from mixerzoo_search.timing import latency_table

NONE, SLICE = Candidate("none"), Candidate("mlp_slice", 0.5)
STATIC, POOL = Candidate("static", 0.5), Candidate("pool")


@pytest.fixture(scope="module", autouse=True)
def _tiny_host():
    with temporary_plugin(tiny_search.TinyPlugin(), name="tiny"):
        yield


class Ruled(Stopwatch):
    time = tiny_search.ruled_time


@pytest.fixture
def make_context(tmp_path):
    """Make what the phases of one search share; another call is another start of the same search."""
    tiny_search.write_npz(tmp_path / "data.npz")

    def make(**changes):
        budget = Budget(share=0.6)
        settings = Settings(
            **{
                "model": "tiny",
                "data": str(tmp_path / "data.npz"),
                "budget": budget,
                "images": 40,
                "threads": 1,
            }
            | {"distill_steps": 2}
            | changes
        )
        teacher = open_teacher("tiny")
        teacher_ms = tiny_search.ruled_ms(teacher.model)
        return Context(
            settings=settings,
            teacher=teacher,
            data=open_data(settings.data),
            run=RunDirectory(tmp_path / "run"),
            reporter=Reporter(quiet=True),
            stopwatch=Ruled(teacher, Conditions(threads=1)),
            teacher_ms=teacher_ms,
            budget_ms=budget.in_ms(teacher_ms),
        )

    return make


def space_of(context, *wanted):
    """Return the candidates of every site, as far as they are wanted."""
    every = list_candidates(context.teacher.sites, mixers=sorted({candidate.mixer for candidate in wanted}))
    return {site: tuple(candidate for candidate in row if candidate in wanted) for site, row in every.items()}


def pairs(space):
    return [(site, candidate) for site, row in space.items() for candidate in row]


@pytest.fixture
def distilled(monkeypatch):
    """What is distilled from here on: (site, candidate, steps)."""
    made, distill = [], candidates_module.distill

    def recorded(spec, width, site, captured, recipe, *, start=None):
        made.append((site.name, Candidate(spec.name, width), recipe.steps))
        assert (start is not None) == (recipe.steps > 0)
        return distill(spec, width, site, captured, recipe, start=start)

    monkeypatch.setattr(candidates_module, "distill", recorded)
    return made


def test_every_candidate_is_made_in_closed_form_once(make_context, distilled):
    context = make_context()
    space, more = space_of(context, NONE, STATIC, SLICE), space_of(context, NONE, STATIC, SLICE, POOL)
    table = latency_table(context, more)
    assert scoring.distill_closed_form(context, space, table) == space
    assert distilled == [(site, candidate, 0) for site, candidate in pairs(space)]
    scoring.distill_closed_form(context, space, table)
    again = make_context()
    scoring.distill_closed_form(again, space, table)
    assert len(distilled) == len(pairs(space))
    assert "captured" not in vars(again)  # not even the activations are needed
    scoring.distill_closed_form(again, more, table)
    assert {candidate for _, candidate, _ in distilled[len(pairs(space)) :]} == {POOL}


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_what_is_clearly_beaten_at_the_first_sites_goes_no_further(
    make_context, distilled, monkeypatch, share
):
    context = make_context()
    space = space_of(context, NONE, STATIC, POOL, SLICE)
    monkeypatch.setattr(scoring, "_probes", lambda context: {"blocks.0.attn", "blocks.0.mlp"})
    monkeypatch.setattr(scoring, "UNIFORM_SHARE", share)
    monkeypatch.setattr(scoring, "CLEARLY", 1.0)
    table = latency_table(context, space)
    row = dict.fromkeys(table.change_ms["blocks.0.attn"], -0.5)
    table = dataclasses.replace(table, change_ms={**table.change_ms, "blocks.0.attn": row})
    found = scoring.distill_closed_form(context, space, table)
    assert {(site, c) for site, c, _ in distilled} == set(pairs(found))
    for site in ("blocks.0.attn", "blocks.0.mlp", "blocks.1.mlp"):
        assert found[site] == space[site]
    # All are as fast there, so that only the one of the lowest error is not beaten.
    best = min(space["blocks.0.attn"], key=lambda c: context.library.best("blocks.0.attn", c).nmse)
    assert found["blocks.1.attn"] == (space["blocks.1.attn"] if share else (best,))


def test_the_first_sites_are_spread_over_the_depth(make_context, monkeypatch):
    context = make_context()
    assert scoring._probes(context) == {site.name for site in context.teacher.sites}
    monkeypatch.setattr(scoring, "PROBES", 0)
    assert scoring._probes(context) == {"blocks.0.attn", "blocks.1.attn", "blocks.0.mlp", "blocks.1.mlp"}


def test_only_candidates_that_save_time_are_useful(make_context):
    context = make_context()
    space = {"blocks.0.attn": (NONE, STATIC, POOL)}
    edge = scoring.TOLERANCE * context.teacher_ms
    table = LatencyTable(
        base_ms=context.teacher_ms,
        change_ms={"blocks.0.attn": {"none@1": -1.0, "static@0.5": -0.9 * edge, "pool@1": float("inf")}},
    )
    assert scoring.useful(context, space, table) == {"blocks.0.attn": (NONE,)}
    assert faster_than_teacher(space, table, tolerance_ms=0.0) == {"blocks.0.attn": (NONE, STATIC)}


@pytest.fixture
def started(make_context):
    """A search whose closed forms are made: the context, the space and the latencies."""
    context = make_context()
    space = space_of(context, NONE, STATIC, POOL, SLICE)
    table = latency_table(context, space)
    assert scoring.distill_closed_form(context, space, table) == space
    return context, space, table


def forecast_of(damage):
    return lambda context, candidates, scores=None: DamageForecast(
        damage={pair: damage(*pair) for pair in pairs(candidates)}, spearman=0.0, scores=0
    )


def test_steps_go_to_the_candidates_of_exact_plans_near_the_budget(started, distilled, monkeypatch):
    context, space, table = started
    asked = []

    def frontier(model, budgets, *, per_budget):
        asked.append((budgets, per_budget))
        chosen = {"blocks.0.attn": STATIC, "blocks.1.attn": NONE, "blocks.1.mlp": SLICE}
        plan = Plan.of(chosen, context.teacher.sites)
        return [exact.Solution(plan=plan, loss=0.0, ms=1.0, optimal=True, gap=0.0)]

    monkeypatch.setattr(scoring, "UNIFORM_SHARE", 1.0)  # nothing is left out
    monkeypatch.setattr(scoring.exact, "frontier", frontier)
    scoring.score(context, space, table)
    # `none` has no weights to train.
    assert sorted(distilled) == [("blocks.0.attn", STATIC, 2), ("blocks.1.mlp", SLICE, 2)]
    assert asked == [([share * context.budget_ms for share in scoring.STEP_BUDGETS], 2)]


def test_what_gets_steps_is_decided_once(started, make_context, distilled):
    context, space, table = started
    first = scoring.score(context, space, table)
    stepped = json.loads((context.run.path / "stepped.json").read_text())
    assert sorted((site, str(candidate)) for site, candidate, _ in distilled) == sorted(map(tuple, stepped))
    assert len(distilled) <= round(scoring.STEPPED_PER_SITE * len(context.teacher.sites))
    number = len(distilled)
    again = scoring.score(make_context(), space, table)
    assert len(distilled) == number
    assert again == first


def test_without_steps_nothing_is_stepped(make_context, distilled):
    context = make_context(distill_steps=0)
    space = space_of(context, NONE, STATIC, SLICE)
    scoring.distill_closed_form(context, space, latency_table(context, space))
    scoring.score(context, space, latency_table(context, space))
    assert {steps for _, _, steps in distilled} == {0}
    assert context.run.load("stepped") == []


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_beaten_candidates_are_left_out_but_for_a_uniform_share(started, monkeypatch, share):
    context, space, table = started
    monkeypatch.setattr(scoring, "UNIFORM_SHARE", share)
    # `none` is the fastest everywhere: where it is the least harmful too, it beats all others.
    monkeypatch.setattr(scoring, "forecast", forecast_of(lambda site, c: 0.1 if c == NONE else 1.0))
    scored = scoring.score(context, space, table)
    left = {site: row[1:] for site, row in zip(scored.model.sites, scored.model.candidates, strict=True)}
    assert left == (space if share else dict.fromkeys(space, (NONE,)))


def test_a_candidate_that_is_faster_or_less_harmful_is_not_beaten(started, monkeypatch):
    context, space, table = started
    monkeypatch.setattr(scoring, "UNIFORM_SHARE", 0.0)
    monkeypatch.setattr(scoring, "forecast", forecast_of(lambda site, c: 1.0 if c == NONE else 0.1))
    scored = scoring.score(context, space, table)
    for site, row in zip(scored.model.sites, scored.model.candidates, strict=True):
        assert NONE in row
        assert set(row[1:]) & (set(space[site]) - {NONE})


def test_the_share_that_stays_follows_the_seed():
    space = {"site": (NONE, *(Candidate("static", width / 10) for width in range(1, 9)))}
    table = LatencyTable(base_ms=1.0, change_ms={"site": {str(c): -1.0 for c in space["site"]}})
    damage = {("site", c): 0.1 if c == NONE else 1.0 for c in space["site"]}
    stays = iter([False, True, False, False, False, False, True, False])
    left = not_beaten(space, damage, table, keep_all_the_same=lambda: next(stays), tolerance_ms=0.0)
    assert left == {"site": (NONE, Candidate("static", 0.2), Candidate("static", 0.7))}


def test_a_margin_has_to_be_clear():
    space = {"site": (NONE, STATIC)}

    def left(harm, ms, tolerance_ms=0.0):
        table = LatencyTable(base_ms=1.0, change_ms={"site": {"none@1": -0.5, "static@0.5": ms}})
        damage = {("site", NONE): 1.0, ("site", STATIC): harm}
        kept = not_beaten(space, damage, table, keep_all_the_same=lambda: False, tolerance_ms=tolerance_ms)
        return STATIC in kept["site"]

    assert left(1.4, -0.4)
    assert not left(1.6, -0.4)
    assert not left(1.6, -0.5)
    assert left(1.6, -0.6)
    assert not left(1.6, -0.6, tolerance_ms=0.2)


def test_scores_are_losses_with_one_site_replaced(started):
    context, space, table = started
    scores = scoring.measure_scores(context, space, "scores")
    assert set(scores) == set(pairs(space))
    for (site, candidate), loss in scores.items():
        module = context.evaluator.module(site, candidate)
        assert context.score_judge.evaluate_modules({site: module}).loss == pytest.approx(loss, abs=1e-7)
    model = scoring.additive(context, space, table, scores)
    assert model.base_ms == context.teacher_ms
    for site, candidate in pairs(space):
        plan = Plan.of({site: candidate}, context.teacher.sites)
        assert model.predict_loss(plan) == scores[site, candidate]
        assert model.additive_ms(plan) == pytest.approx(
            context.teacher_ms + table.change_ms[site][str(candidate)]
        )


def test_scores_are_measured_once_for_the_same_weights(started, make_context, monkeypatch):
    context, space, _ = started
    measured = []
    evaluate = type(context.score_judge).evaluate_modules

    def counted(self, modules):
        measured.append(sorted(modules))
        return evaluate(self, modules)

    monkeypatch.setattr(type(context.score_judge), "evaluate_modules", counted)
    first = scoring.measure_scores(context, space, "scores")
    assert len(measured) == len(first)
    again = make_context()
    assert scoring.measure_scores(again, space, "scores") == first
    assert len(measured) == len(first)
    # Better weights are another entry in the library, and are scored again.
    site = "blocks.0.mlp"
    again.library.make(site, SLICE, again.captured, stepped=True)
    stepped = again.library.find(site, SLICE, stepped=True)
    improved = stepped.nmse < again.library.find(site, SLICE, stepped=False).nmse
    scoring.measure_scores(again, space, "scores")
    assert measured[len(first) :] == ([[site]] if improved else [])


def test_failed_candidates_are_left_out(started):
    context, space, table = started
    files, site = context.library.files, "blocks.0.attn"
    entry = context.library.find(site, STATIC, stepped=False)
    files._whole[entry.key] = dataclasses.replace(entry, failed="no idea", sha256="")
    scored = scoring.score(context, space, table)
    row = dict(zip(scored.model.sites, scored.model.candidates, strict=True))
    assert STATIC not in row[site]
    assert STATIC in row["blocks.1.attn"]


def test_the_prior_is_as_asked(started, make_context):
    context, space, table = started
    sparsity = scoring.score(context, space, table).prior.weights
    uniform = scoring.score(make_context(prior="uniform"), space, table).prior.weights
    shuffled = scoring.score(make_context(prior="shuffled"), space, table).prior.weights
    for site, row in sparsity.items():
        assert "keep" in row
        assert sum(row.values()) == pytest.approx(1)
        assert set(uniform[site]) == set(shuffled[site]) == set(row)
        assert len(set(map(float, uniform[site].values()))) == 1
        assert sorted(shuffled[site].values()) == pytest.approx(sorted(row.values()))
        # The sites disagree about what is harmful, but keeping the teacher's module never is.
        assert row["keep"] == max(row.values())
    assert sparsity != shuffled


def test_the_quality_of_the_prior_is_recorded(started):
    context, space, table = started
    scored = scoring.score(context, space, table)
    assert set(scored.prior_quality) == {"before_scores", "left_out"}
    assert all(-1 <= value <= 1 for value in scored.prior_quality.values())
    assert context.run.load("prior") == scored.prior_quality


def test_candidates_are_what_can_stand_at_a_site():
    sites = open_teacher("tiny").sites
    every = list_candidates(sites)
    shelf = get_registry().mixers
    for site in sites:
        assert len(set(every[site.name])) == len(every[site.name])
        for candidate in every[site.name]:
            spec = shelf.get(candidate.mixer)
            assert site.kind in spec.kinds
            assert candidate.width in spec.widths
            with torch.device("meta"):
                spec.make(site, candidate.width)
    assert NONE in every["blocks.0.attn"]
    assert SLICE in every["blocks.0.mlp"]
    assert SLICE not in every["blocks.0.attn"]


def test_widths_narrow_all_but_mixers_of_a_single_width():
    sites = open_teacher("tiny").sites
    narrow = list_candidates(sites, mixers=("static", "none"), widths=(0.5,))
    assert narrow["blocks.0.attn"] == (STATIC, NONE)
    with pytest.raises(MixerzooError, match=r"no candidate for any site: mixers static, widths 0\.33"):
        list_candidates(sites, mixers=("static",), widths=(0.33,))
    with pytest.raises(MixerzooError, match="unknown mixer 'sttic': did you mean 'static'"):
        list_candidates(sites, mixers=("sttic",))
