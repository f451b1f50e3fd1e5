"""The latency phases with a rule instead of a clock: the table, the random plans, the affine law, the reach."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import tiny_search
from torch import nn

from mixerzoo import Caps, MixerSpec, hookimpl
from mixerzoo.errors import BudgetOutOfReachError, MixerzooError
from mixerzoo.latency import Conditions, Stopwatch, Timing, reuse, store
from mixerzoo.latency.store import code_of
from mixerzoo.plan import Candidate
from mixerzoo.progress import Reporter
from mixerzoo.registry import get_registry, temporary_plugin
from mixerzoo.runtimes import prepare_eager
from mixerzoo.spec import RuntimeSpec
from mixerzoo_search import timing
from mixerzoo_search.additive import AdditiveModel
from mixerzoo_search.candidates import list_candidates
from mixerzoo_search.run_directory import RunDirectory
from mixerzoo_search.settings import Budget
from mixerzoo_search.timing import (
    CHECK_PLANS,
    FIT_PLANS,
    calibrate,
    demand_candidates,
    demand_reachable,
    latency_table,
    random_plans,
)


def make_model(sites=6, *, seed=0):
    rng = np.random.default_rng(seed)
    scores = {
        f"site{at}": {
            Candidate("static", w): (float(rng.random()), -float(rng.random())) for w in (0.25, 0.5, 1.0)
        }
        for at in range(sites)
    }
    return AdditiveModel.from_scores(scores, base_ms=10.0)


def test_random_plans_are_of_all_speeds():
    model = make_model()
    plans = random_plans(model, 200, seed=0)
    replaced = [plan.replaced() for plan in plans]
    assert set(replaced) == set(range(7))
    assert min(replaced.count(number) for number in range(7)) >= 10  # about as many of each
    latencies = [model.additive_ms(plan) for plan in plans]
    slowest, fastest = model.base_ms, model.additive_ms(model.fastest())
    for share in np.linspace(0, 0.8, 5):
        low = fastest + share * (slowest - fastest)
        assert any(low <= ms <= low + 0.25 * (slowest - fastest) for ms in latencies)
    for at, site in enumerate(model.sites):
        assert {plan[site] for plan in plans} == set(model.candidates[at])


def test_random_plans_follow_the_seed():
    model = make_model()
    assert random_plans(model, 12, seed=3) == random_plans(model, 12, seed=3)
    assert random_plans(model, 12, seed=3) != random_plans(model, 12, seed=4)


def test_random_plans_keep_what_cannot_be_replaced():
    model = AdditiveModel.from_scores({"a": {}, "b": {Candidate("none"): (1.0, -1.0)}}, base_ms=5.0)
    plans = random_plans(model, 30, seed=0)
    assert all(plan["a"].is_keep for plan in plans)
    assert {plan["b"].is_keep for plan in plans} == {True, False}


@pytest.fixture
def context(tmp_path):
    """What the phases ask of a search, with the tiny teacher and latency by rule."""
    teacher = tiny.tiny_teacher()

    class Ruled(Stopwatch):
        time = tiny_search.ruled_time

    stopwatch = Ruled(teacher, Conditions(threads=1))
    return SimpleNamespace(
        settings=SimpleNamespace(seed=0, budget=Budget(ms=2.0)),
        teacher=teacher,
        run=RunDirectory(tmp_path / "run"),
        reporter=Reporter(quiet=True),
        stopwatch=stopwatch,
        teacher_ms=tiny_search.ruled_ms(teacher.model),
        budget_ms=2.0,
        letters={spec.name: spec.letter for spec in get_registry().mixers},
    )


def candidates_of(context, *mixers):
    return list_candidates(context.teacher.sites, mixers=mixers)


def follow(context, monkeypatch, model, law):
    """Let students take what `law` makes of their plan's additive latency; returns the plans that were timed."""
    timed = []

    def latency(students):
        timed.extend(students.values())
        return {name: law(model.additive_ms(plan)) for name, plan in students.items()}

    monkeypatch.setattr(timing, "assemble", lambda _model, plan: plan)
    context.evaluator = SimpleNamespace(modules=lambda plan: plan, latency=latency)
    return timed


@pytest.mark.parametrize(("intercept", "slope"), [(0.0, 1.0), (3.0, 1.2), (-0.5, 0.7)])
def test_calibration_finds_an_affine_law(context, monkeypatch, intercept, slope):
    model = make_model()
    timed = follow(context, monkeypatch, model, lambda ms: intercept + slope * ms)
    fitted, quality = calibrate(context, model)
    assert fitted.intercept_ms == pytest.approx(intercept, abs=1e-6)
    assert fitted.slope == pytest.approx(slope, rel=1e-6)
    assert quality.plans == CHECK_PLANS >= 20
    assert quality.max_error < 1e-6
    assert quality.spearman == pytest.approx(1)
    assert quality.to_json() == vars(quality)
    assert timed == random_plans(model, FIT_PLANS + CHECK_PLANS, seed=0)


def test_calibration_is_measured_once(context, monkeypatch):
    model = make_model()
    timed = follow(context, monkeypatch, model, lambda ms: 1 + ms)
    first = calibrate(context, model)
    before = len(timed)
    assert calibrate(context, model) == first
    assert len(timed) == before


def test_the_error_is_that_of_plans_that_nothing_was_fitted_on(context, monkeypatch):
    model = make_model()
    timed = follow(context, monkeypatch, model, lambda ms: ms)
    law = context.evaluator.latency

    def later_ones_are_slower(students):
        late = len(timed) >= FIT_PLANS
        return {name: ms * (1.25 if late else 1.0) for name, ms in law(students).items()}

    context.evaluator.latency = later_ones_are_slower
    fitted, quality = calibrate(context, model)
    assert (fitted.intercept_ms, fitted.slope) == pytest.approx((0, 1), abs=1e-6)
    assert quality.mape == pytest.approx(0.2)
    assert quality.max_error == pytest.approx(0.2)


def test_the_table_is_on_the_scale_of_the_run(context):
    candidates = candidates_of(context, "none", "static")
    context.teacher_ms *= 2  # the machine was twice as slow when the run began
    table = latency_table(context, candidates)
    assert table.base_ms == context.teacher_ms
    assert set(table.change_ms) == set(candidates)
    for site, row in candidates.items():
        assert set(table.change_ms[site]) == {str(candidate) for candidate in row}
        own = tiny_search.ATTENTION_MS if site.endswith("attn") else tiny_search.MLP_MS
        assert table.change_ms[site]["none@1"] == pytest.approx(2 * -0.95 * own)


def test_the_table_is_measured_once(context, monkeypatch):
    candidates = candidates_of(context, "none")
    first = latency_table(context, candidates)
    monkeypatch.setattr(timing, "know", None)
    assert latency_table(context, candidates) == first


class Fails(nn.Module):
    def forward(self, x):
        raise ValueError("no\nidea")


class Plugin:
    @hookimpl
    def register_mixers(self, register):
        register(MixerSpec(name="fails", build=lambda: Fails(), summary="", caps=Caps(any_length=True)))


def test_a_candidate_that_cannot_run_takes_for_ever(context):
    with temporary_plugin(Plugin()):
        candidates = candidates_of(context, "none", "fails")
        table = latency_table(context, candidates)
        again = latency_table(context, candidates)
    assert again == table
    for site, row in table.change_ms.items():
        assert row["none@1"] < 0
        assert row.get("fails@1", math.inf) == math.inf
        assert ("fails@1" in row) == site.endswith("attn")
    stored = json.loads((context.run.path / "latency.json").read_text(), parse_constant=pytest.fail)
    assert stored["failed"]["blocks.0.attn"] == {"fails@1": "ValueError: no idea"}


def measured_in(context, monkeypatch):
    """Return a list that every candidate that is timed in place is added to."""
    seen, real = [], reuse.measure_in_place

    def measure(stopwatch, part, **others):
        seen.extend((shape, str(c)) for shape, row in part.items() for c in row)
        return real(stopwatch, part, **others)

    monkeypatch.setattr(reuse, "measure_in_place", measure)
    return seen


def another(context, name):
    """Return the context of another search with the same library."""
    return SimpleNamespace(**{**vars(context), "run": RunDirectory(context.run.path.with_name(name))})


def test_another_search_measures_only_what_is_missing(context, monkeypatch):
    candidates = candidates_of(context, "none", "static", "linear")
    first = latency_table(context, candidates)
    seen = measured_in(context, monkeypatch)
    second = another(context, "second")
    assert latency_table(second, candidates) == first
    assert len(seen) == reuse.CHECKED  # whether the table still holds
    assert second.run.load("latency")["measured"] == 0
    seen.clear()
    third = another(context, "third")
    table = latency_table(third, candidates_of(context, "none", "static", "linear", "pool"))
    assert [text for _, text in seen[reuse.CHECKED :]] == ["pool@1"]
    assert table.change_ms["blocks.0.attn"]["pool@1"] < 0
    stored = third.run.load("latency")
    assert (stored["measured"], stored["reused"]) == (1, context.run.load("latency")["measured"])


def test_a_wider_space_in_the_same_run_keeps_what_there_is(context, monkeypatch):
    first = latency_table(context, candidates_of(context, "none"))
    seen = measured_in(context, monkeypatch)
    wider = latency_table(context, candidates_of(context, "none", "pool"))
    assert [text for _, text in seen] == ["pool@1"]
    for site, row in first.change_ms.items():
        assert row.items() <= wider.change_ms[site].items()


def test_what_was_timed_with_other_code_is_timed_again(context, monkeypatch):
    candidates = candidates_of(context, "none", "static")
    first = latency_table(context, candidates)
    seen = measured_in(context, monkeypatch)

    def edited(text):
        return "edited" if text.startswith("static") else code_of(text)

    for module in (timing, store):
        monkeypatch.setattr(module, "code_of", edited)
    assert latency_table(context, candidates) == first  # by the rule, code takes no time
    timed = {text for _, text in seen}
    assert timed == {str(c) for c in candidates["blocks.0.attn"] if c.mixer == "static"}
    seen.clear()
    latency_table(context, candidates)
    assert not seen


def test_what_is_no_candidates_fault_is_raised(context, monkeypatch):
    def breaks(*_, **__):
        raise RuntimeError("the machine is on fire")

    monkeypatch.setattr(reuse, "measure_in_place", breaks)
    with pytest.raises(RuntimeError, match="on fire"):
        latency_table(context, candidates_of(context, "none"))
    assert context.run.load("latency") is None


def test_what_was_measured_before_a_stop_is_not_measured_again(context, monkeypatch):
    candidates = candidates_of(context, "none", "static", "linear", "glu_mlp")
    real, seen = reuse.measure_in_place, []

    def stops(stopwatch, part, **others):
        if seen:
            raise KeyboardInterrupt
        seen.extend(c for row in part.values() for c in row)
        return real(stopwatch, part, **others)

    monkeypatch.setattr(reuse, "PREPARED", 3)
    monkeypatch.setattr(reuse, "measure_in_place", stops)
    with pytest.raises(KeyboardInterrupt):
        latency_table(context, candidates)
    assert seen
    monkeypatch.setattr(reuse, "measure_in_place", real)
    later = measured_in(context, monkeypatch)
    table = latency_table(context, candidates)
    again = later[reuse.CHECKED :]
    assert not {str(c) for c in seen} & {text for _, text in again}
    assert {site: set(row) for site, row in table.change_ms.items()} == {
        site: {str(c) for c in row} for site, row in candidates.items()
    }


EXPORTING = RuntimeSpec(name="exporting", prepare=prepare_eager, needs_export=True)


def test_what_cannot_be_exported_is_left_out_without_a_try(context):
    context.stopwatch.runtime = EXPORTING
    with temporary_plugin(Plugin()):
        table = latency_table(context, candidates_of(context, "none", "fails"))
    assert table.change_ms["blocks.0.attn"]["fails@1"] == math.inf
    assert table.change_ms["blocks.0.attn"]["none@1"] < 0
    assert context.run.load("latency")["failed"]["blocks.0.attn"] == {
        "fails@1": "it does not claim 'exportable', and runtime 'exporting' needs that"
    }


def test_a_space_without_anything_exportable_is_refused(context):
    with temporary_plugin(Plugin()):
        some, nothing = candidates_of(context, "none", "fails"), candidates_of(context, "fails")
        demand_candidates(some, EXPORTING)
        demand_candidates(nothing, context.stopwatch.runtime)
        with pytest.raises(
            MixerzooError, match="'exporting' needs mixers that claim 'exportable', not fails"
        ):
            demand_candidates(nothing, EXPORTING)


def additive_of(context, *mixers):
    candidates = candidates_of(context, *mixers)
    table = latency_table(context, candidates)
    return AdditiveModel.from_scores(
        {site: {c: (0.0, table.change_ms[site][str(c)]) for c in row} for site, row in candidates.items()},
        base_ms=context.teacher_ms,
    )


def test_a_budget_within_reach_passes_without_any_weights(context):
    demand_reachable(context, additive_of(context, "none", "static"))


@pytest.mark.parametrize(
    ("mixers", "budget", "texts"),
    [
        (
            ("none",),
            0.5,
            ["0.5ms (0.5 ms)", "N2/N2", "takes 0.68 ms", "4.1 ms", "outside the sites", "--budget-ms 0.75"],
        ),
        (("mlp_slice",), 2.0, ["2ms (2 ms)", "A2/", "2 of the 4 sites have no candidate"]),
    ],
)
def test_a_budget_out_of_reach_is_refused_with_figures(context, mixers, budget, texts):
    context.settings.budget, context.budget_ms = Budget(ms=budget), budget
    model = additive_of(context, *mixers)
    with pytest.raises(BudgetOutOfReachError) as raised:
        demand_reachable(context, model)
    for text in texts:
        assert text in str(raised.value)
    assert "\n" not in str(raised.value)
    # What it says would do, does.
    enough = float(str(raised.value).rpartition(" ")[2])
    context.settings.budget, context.budget_ms = Budget(ms=enough), enough
    demand_reachable(context, model)


def test_a_budget_that_is_only_uncertain_is_not_refused(context):
    model = additive_of(context, "none")

    def unsure(students, **_):
        return {"fastest": Timing(median=0.7, low=0.6, high=0.8, ratio=0.68 / 4.1, error=0.3)}

    context.stopwatch.time = unsure
    context.budget_ms = 0.6
    demand_reachable(context, model)
    context.budget_ms = 0.4
    with pytest.raises(BudgetOutOfReachError):
        demand_reachable(context, model)
