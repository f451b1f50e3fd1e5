"""From candidates to scores: what is distilled, what gets gradient steps, what is left out, and what is kept."""

import dataclasses
import json
import math
import shutil

import pytest
import tiny_search
import torch

from mixerzoo import MixerSpec, hookimpl
from mixerzoo.capture import MEMORY_LIMIT_GB
from mixerzoo.errors import MixerzooError
from mixerzoo.latency import Conditions, LatencyTable, Stopwatch
from mixerzoo.opening import open_data, open_teacher
from mixerzoo.plan import Candidate, Plan
from mixerzoo.progress import Reporter
from mixerzoo.registry import get_registry, temporary_plugin
from mixerzoo_search import candidates as candidates_module
from mixerzoo_search import context as context_module
from mixerzoo_search import exact, scoring, steps
from mixerzoo_search import scores as scores_module
from mixerzoo_search.candidates import faster_than_teacher, list_candidates, not_beaten
from mixerzoo_search.context import Context
from mixerzoo_search.prior import DamageForecast
from mixerzoo_search.prior_table import to_json
from mixerzoo_search.report import PriorTable, Rank
from mixerzoo_search.run_directory import RunDirectory
from mixerzoo_search.scores import additive, measure_scores
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

    def recorded(spec, width, site, captured, recipe, *, start=None, wider=None, targets=None):
        made.append((site.name, Candidate(spec.name, width), recipe.steps))
        assert (start is not None) == (recipe.steps > 0)
        assert (wider is not None) == (recipe.wider > 0)
        return distill(spec, width, site, captured, recipe, start=start, wider=wider, targets=targets)

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
    def forecast(context, candidates, scores=None):
        found = {pair: damage(*pair) for pair in pairs(candidates)}
        nothing = Rank(scores=0, before_scores=math.nan, left_out=math.nan)
        return DamageForecast(damage=found, spearman=0.0, scores=0), PriorTable(rows=[], overall=nothing)

    return forecast


def steps_taken(context):
    stored = context.run.load("stepped")
    assert set(stored) == {"done", "chosen", "worse"}
    return stored


def test_steps_go_in_rounds_to_what_could_enter_the_best_plans(started, distilled, monkeypatch):
    context, space, table = started
    asked, rounds = [], [[("blocks.0.attn", STATIC), ("blocks.1.mlp", SLICE)], [("blocks.0.mlp", SLICE)], []]

    def next_round(model, budgets, factors, seconds, *, most, harmless):
        assert 0 < harmless < 1e-3
        asked.append((budgets, set(factors), seconds, most))
        return rounds[len(asked) - 1]

    monkeypatch.setattr(scoring, "UNIFORM_SHARE", 1.0)  # nothing is left out
    monkeypatch.setattr(steps, "next_round", next_round)
    scoring.score(context, space, table)
    assert [(site, c) for site, c, _ in distilled] == [*rounds[0], *rounds[1]]
    assert {taken for _, _, taken in distilled} == {2}
    assert steps_taken(context)["chosen"] == [[site, str(c)] for site, c in [*rounds[0], *rounds[1]]]
    assert steps_taken(context)["done"] is True
    budgets, able, seconds, most = asked[0]
    assert budgets == [share * context.budget_ms for share in steps.STEP_BUDGETS]
    assert {c for _, c in able} == {STATIC, SLICE}  # the others have nothing before a readout
    assert (seconds, most) == (None, 2)
    assert [one[1] for one in asked[1:]] == [able - set(rounds[0]), able - set(rounds[0]) - set(rounds[1])]
    assert [one[3] for one in asked[1:]] == [2, 2]


def test_what_gets_steps_is_decided_once(started, make_context, distilled):
    context, space, table = started
    first = scoring.score(context, space, table)
    stepped = steps_taken(context)["chosen"]
    assert [[site, str(candidate)] for site, candidate, _ in distilled] == stepped
    assert 0 < len(distilled) <= round(steps.STEPPED_PER_SITE * len(context.teacher.sites))
    number = len(distilled)
    again = scoring.score(make_context(), space, table)
    assert len(distilled) == number
    assert again == first


def test_a_search_stopped_between_two_rounds_of_steps_goes_on_as_if_it_had_not_been(
    started, make_context, distilled, monkeypatch, tmp_path
):
    context, space, table = started
    monkeypatch.setattr(steps, "ROUND", 0.01)  # two at a time
    monkeypatch.setattr(steps, "HOPE", 0.01)
    shutil.copytree(context.run.path, tmp_path / "before")
    whole = scoring.score(context, space, table)
    undisturbed, number = steps_taken(context), len(distilled)
    assert number > 2
    # Again, from the same closed forms, killed when the third is about to take its steps.
    shutil.rmtree(context.run.path)
    shutil.copytree(tmp_path / "before", context.run.path)
    for path in [*(tmp_path / "library").glob("*.json")]:
        if json.loads(path.read_text())["recipe"]["steps"]:
            path.unlink()
    distilled.clear()
    make = candidates_module.CandidateLibrary.make

    def killed(self, *arguments, **options):
        if len(distilled) == 3:
            raise KeyboardInterrupt
        return make(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(candidates_module.CandidateLibrary, "make", killed)
        with pytest.raises(KeyboardInterrupt):
            scoring.score(make_context(), space, table)
    assert len(steps_taken(context)["chosen"]) > 2
    assert steps_taken(context)["done"] is False
    resumed = scoring.score(make_context(), space, table)
    assert steps_taken(context) == undisturbed
    assert len(distilled) == number
    assert resumed.model == whole.model


def test_steps_that_raise_the_score_do_not_count(started, make_context, monkeypatch):
    context, space, table = started

    def worse(context, space, report):
        return {pair: loss + 1.0 for pair, loss in measure_scores(context, space, report).items()}

    monkeypatch.setattr(scoring, "measure_scores", worse)
    scored = scoring.score(context, space, table)
    stored = steps_taken(context)
    assert stored["chosen"] == stored["worse"] != []
    assert context.library.stepped == set()
    assert make_context().stepped == []
    scores = context.run.load("scores")
    for site, candidate in stored["chosen"]:
        closed = context.library.find(site, Candidate.parse(candidate), stepped=False)
        plan = Plan.of({site: Candidate.parse(candidate)}, context.teacher.sites)
        assert scored.model.predict_loss(plan) == scores[closed.key]
    assert all(row.before_steps is None for row in scored.prior_table.rows)


def test_minutes_of_steps_are_a_limit_in_place_of_a_number(make_context, distilled, monkeypatch):
    monkeypatch.setattr(steps, "STEPPED_PER_SITE", 0.0)
    taken = {}
    for minutes in (1e-9, 100.0):
        context = make_context(distill_minutes=minutes)
        space = space_of(context, NONE, STATIC, SLICE)
        table = latency_table(context, space)
        scoring.distill_closed_form(context, space, table)
        distilled.clear()
        scoring.score(context, space, table)
        taken[minutes] = list(distilled)
        assert steps_taken(context)["done"] is True
        shutil.rmtree(context.run.path)
        shutil.rmtree(context.library.files.folder)
    assert len(taken[1e-9]) == 1
    assert len(taken[100.0]) > 2


def test_without_steps_nothing_is_stepped(make_context, distilled):
    context = make_context(distill_steps=0)
    space = space_of(context, NONE, STATIC, SLICE)
    scoring.distill_closed_form(context, space, latency_table(context, space))
    scoring.score(context, space, latency_table(context, space))
    assert {taken for _, _, taken in distilled} == {0}
    assert steps_taken(context) == {"done": True, "chosen": [], "worse": []}


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
    scores = measure_scores(context, space)
    assert set(scores) == set(pairs(space))
    for (site, candidate), loss in scores.items():
        module = context.evaluator.module(site, candidate)
        assert context.score_judge.evaluate_modules({site: module}).loss == pytest.approx(loss, abs=1e-7)
    model = additive(context, space, table, scores)
    assert model.base_ms == context.teacher_ms
    for site, candidate in pairs(space):
        plan = Plan.of({site: candidate}, context.teacher.sites)
        assert model.predict_loss(plan) == scores[site, candidate]
        assert model.additive_ms(plan) == pytest.approx(
            context.teacher_ms + table.change_ms[site][str(candidate)]
        )


def test_what_no_hopeful_plan_near_the_budget_holds_is_predicted(started, make_context, monkeypatch):
    context, space, table = started
    monkeypatch.setattr(scores_module, "AT_RANDOM", 0.0)
    monkeypatch.setattr(scores_module, "NEAR", (1.0,))
    found = scores_module.score_what_matters(context, space, space, table)
    assert 0 < len(found) < len(pairs(space))
    assert len(context.run.load("scores")) == len(found)  # nothing else was measured
    expected = scores_module.forecast(context, space, found)[0].damage
    # As good as if all had been scored: no plan that holds another one could be better, if that did half the damage.
    hopeful = {pair: found.get(pair, scores_module.HOPEFUL * expected[pair]) for pair in pairs(space)}
    for damage in (hopeful, {**expected, **found}):
        best = exact.solve(additive(context, space, table, damage), context.budget_ms)
        assert {pair for pair in best.plan.choices if not pair[1].is_keep} <= set(found)
    assert scores_module.score_what_matters(make_context(), space, space, table) == found


def test_the_model_has_predictions_where_there_are_no_scores(make_context, monkeypatch):
    context = make_context(distill_steps=0)
    space = space_of(context, NONE, STATIC, POOL, SLICE)
    table = latency_table(context, space)
    scoring.distill_closed_form(context, space, table)
    monkeypatch.setattr(scores_module, "AT_RANDOM", 0.0)
    monkeypatch.setattr(scores_module, "NEAR", (1.0,))
    monkeypatch.setattr(scoring, "UNIFORM_SHARE", 1.0)  # nothing is left out
    scored = scoring.score(context, space, table)
    rows = {(row.site, row.candidate): row for row in scored.prior_table.rows}
    assert 0 < sum(row.score is None for row in rows.values()) < len(rows)
    for site, candidate in pairs(space):
        row = rows[site, str(candidate)]
        plan = Plan.of({site: candidate}, context.teacher.sites)
        loss = row.fitted if row.score is None else row.score
        assert scored.model.predict_loss(plan) == pytest.approx(loss)


def test_scores_that_a_run_has_taken_over_count(started, make_context, monkeypatch):
    context, space, table = started
    monkeypatch.setattr(scores_module, "AT_RANDOM", 0.0)
    every = measure_scores(context, space)
    again = make_context()
    assert scores_module.score_what_matters(again, space, space, table) == every


def test_a_random_share_is_scored_whatever_is_predicted(started, monkeypatch):
    context, space, table = started
    monkeypatch.setattr(scores_module, "AT_RANDOM", 1.0)
    assert set(scores_module.score_what_matters(context, space, space, table)) == set(pairs(space))


def test_a_score_that_is_not_finite_is_null_on_disk_and_in_no_plan(started, monkeypatch):
    context, space, table = started
    broken = next(site for site, row in space.items() if POOL in row)
    real = context.score_judge.evaluate_modules

    def evaluate(modules, **options):
        found = real(modules, **options)
        bad = broken in modules and type(modules[broken].mixer).__name__ == "Pool"
        return dataclasses.replace(found, loss=math.nan) if bad else found

    monkeypatch.setattr(context.score_judge, "evaluate_modules", evaluate)
    scores = measure_scores(context, space)
    assert [pair for pair, loss in scores.items() if not math.isfinite(loss)] == [(broken, POOL)]
    content = json.loads((context.run.path / "scores.json").read_text(), parse_constant=pytest.fail)
    assert list(content.values()).count(None) == 1
    again = measure_scores(context, space)
    assert math.isnan(again[broken, POOL])
    model = additive(context, space, table, again)
    assert POOL not in model.candidates[model.sites.index(broken)]
    assert POOL in space[broken]


def test_scores_are_measured_once_for_the_same_weights(started, make_context, monkeypatch):
    context, space, _ = started
    measured = []
    evaluate = type(context.score_judge).evaluate_modules

    def counted(self, modules):
        measured.append(sorted(modules))
        return evaluate(self, modules)

    monkeypatch.setattr(type(context.score_judge), "evaluate_modules", counted)
    first = measure_scores(context, space)
    assert len(measured) == len(first)
    again = make_context()
    assert measure_scores(again, space) == first
    assert len(measured) == len(first)
    # Better weights are another entry in the library, and are scored again.
    site = "blocks.0.mlp"
    again.library.make(site, SLICE, again.captured, stepped=True)
    stepped = again.library.find(site, SLICE, stepped=True)
    improved = stepped.nmse < again.library.find(site, SLICE, stepped=False).nmse
    measure_scores(again, space)
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


def test_the_prior_is_recorded_beside_the_truth(started):
    context, space, table = started
    before = context.run.load("prior")
    assert (before["scores"], before["before_scores"], before["mixers"]) == (0, None, {})
    assert (
        {row["score"] for row in before["candidates"]}
        == {row["fitted"] for row in before["candidates"]}
        == {None}
    )
    assert all(row["nmse"] > 0 and row["predicted"] > 0 and row["key"] for row in before["candidates"])
    scored = scoring.score(context, space, table)
    stored, scores = context.run.load("prior"), context.run.load("scores")
    assert stored == to_json(scored.prior_table)
    assert {(row["site"], row["candidate"]) for row in stored["candidates"]} == {
        (s, str(c)) for s, c in pairs(space)
    }
    loss = {
        (site, str(c)): one
        for site, row, losses in zip(
            scored.model.sites, scored.model.candidates, scored.model.loss, strict=True
        )
        for c, one in zip(row, losses, strict=True)
    }
    for row in stored["candidates"]:
        if row["score"] is not None:
            assert row["score"] == scores[row["key"]] == loss[row["site"], row["candidate"]]
    assert stored["scores"] == sum(row["score"] is not None for row in stored["candidates"]) > 3
    assert stored["scores"] == sum(mixer["scores"] for mixer in stored["mixers"].values())
    assert -1 <= stored["left_out"] <= 1
    # Another start knows less at its beginning, and leaves what is there.
    scoring.distill_closed_form(context, space, table)
    assert context.run.load("prior") == stored


def test_activations_are_limited_as_asked(make_context, monkeypatch):
    asked = []
    taken = context_module.capture

    def capture(*arguments, **options):
        asked.append(options["memory_limit_gb"])
        return taken(*arguments, **options)

    monkeypatch.setattr(context_module, "capture", capture)
    in_files = make_context(memory_limit=0.0).captured
    in_memory = make_context().captured
    assert asked == [0.0, MEMORY_LIMIT_GB]
    for site, captured in in_memory.sites.items():
        assert torch.equal(in_files.sites[site].x, captured.x)
        assert torch.equal(in_files.sites[site].y, captured.y)


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
            spec.outline(site, candidate.width)
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


def test_a_mixer_that_looks_at_numbers_while_it_is_built_is_a_candidate():
    class Looks(torch.nn.Linear):
        def __init__(self, dim):
            super().__init__(dim, dim)
            self.large = self.weight.abs().max().item() > 1

    class Plugin:
        @hookimpl
        def register_mixers(self, register):
            register(MixerSpec(name="looks", build=Looks, summary="a test subject"))

    with temporary_plugin(Plugin(), name="looks"):
        before = torch.random.get_rng_state()
        found = list_candidates(open_teacher("tiny").sites, mixers=("looks",))
        assert torch.equal(torch.random.get_rng_state(), before)
    assert found["blocks.0.attn"] == (Candidate("looks"),)
