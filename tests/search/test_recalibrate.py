"""What measured students teach the additive model: the line, candidates that are off, never noise."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mixerzoo.plan import Candidate
from mixerzoo.progress import Reporter
from mixerzoo_search import finish as finishing
from mixerzoo_search import recalibrate
from mixerzoo_search.additive import AdditiveModel
from mixerzoo_search.evaluate import PlanResult
from mixerzoo_search.finish import Finalist, finish
from mixerzoo_search.recalibrate import FEW, LEAST, NEAR, moved, recalibrated, solved_again
from mixerzoo_search.run_directory import RunDirectory
from mixerzoo_search.timing import random_plans

CANDIDATES = [Candidate("static", width) for width in (0.25, 0.5, 1.0)] + [Candidate("pool")]


def make_model(sites=6):
    rng = np.random.default_rng(0)
    change = {c: -float(rng.uniform(0.3, 1.0)) for c in CANDIDATES}  # sites of one shape share it
    return AdditiveModel.from_scores(
        {f"site{at}": {c: (float(rng.random()), change[c]) for c in CANDIDATES} for at in range(sites)},
        base_ms=10.0,
    )


SHAPES = {f"site{at}": "attention" for at in range(6)}
OFF = {Candidate("static", 0.5): 0.3, Candidate("pool"): -0.15}  # ms that they take beyond the table


def truth(model, plan, *, intercept=0.0, slope=1.0):
    return intercept + slope * model.additive_ms(plan) + sum(OFF.get(c, 0.0) for _, c in plan.choices)


def truly(model, students):
    return {key: (truth(model, plan), 1.002 * truth(model, plan)) for key, plan in students.items()}


def as_they_were(context, results):
    """Stand in for the refit."""
    none = torch.empty(0)
    return [Finalist(result=r, student=r.plan, losses=torch.tensor([r.loss]), further=none) for r in results]


def measured(model, count, *, seed=1, noise=0.0, **law):
    dice = np.random.default_rng(seed)
    return [
        (plan, truth(model, plan, **law) * (1 + noise * dice.standard_normal()))
        for plan in random_plans(model, count, seed=seed)
    ]


def worst(model, pairs):
    return max(abs(model.predict_ms(plan) / ms - 1) for plan, ms in pairs)


@pytest.mark.parametrize(("intercept", "slope"), [(0.0, 1.0), (0.4, 1.15)])
def test_candidates_that_take_more_than_alone_are_found(intercept, slope):
    model = make_model()
    law = {"intercept": intercept, "slope": slope}
    pairs, fresh = measured(model, 40, **law), measured(model, 40, seed=2, **law)
    line = model.calibrated([model.additive_ms(p) for p, _ in pairs], [ms for _, ms in pairs])
    found = recalibrated(model, pairs, shapes=SHAPES)
    assert worst(found, fresh) < 0.01
    assert worst(line, fresh) > 0.05
    assert found.loss == model.loss
    assert found.candidates == model.candidates
    assert {row[0] for row in found.latency_ms} == {0.0}  # `keep` costs nothing


def test_noise_is_not_taken_for_a_candidate():
    model = make_model()
    fresh = [(plan, model.additive_ms(plan)) for plan in random_plans(model, 40, seed=9)]
    errors = []
    for seed in range(12):
        dice = np.random.default_rng(seed)
        pairs = [
            (plan, model.additive_ms(plan) * (1 + 0.02 * dice.standard_normal()))
            for plan in random_plans(model, 24, seed=seed)
        ]
        errors.append(worst(recalibrated(model, pairs, shapes=SHAPES), fresh))
    assert np.median(errors) < 0.02


def test_one_disturbed_student_does_not_tilt_it():
    model = make_model()
    pairs = measured(model, 40)
    pairs[3] = (pairs[3][0], 3 * pairs[3][1])
    assert worst(recalibrated(model, pairs, shapes=SHAPES), measured(model, 40, seed=2)) < 0.05


def test_few_students_give_the_line_only():
    model = make_model()
    pairs = measured(model, LEAST - 1, intercept=0.5)
    found = recalibrated(model, pairs, shapes=SHAPES)
    assert found.latency_ms == model.latency_ms
    assert found == model.calibrated([model.additive_ms(p) for p, _ in pairs], [ms for _, ms in pairs])


def test_without_any_student_nothing_changes():
    model = make_model()
    assert recalibrated(model, []) == model
    assert recalibrated(model, [(random_plans(model, 1, seed=0)[0], float("nan"))]) == model


def test_of_a_plan_measured_twice_the_last_counts():
    model = make_model()
    pairs = measured(model, 30)
    wrong = [(plan, 2 * ms) for plan, ms in pairs]
    assert recalibrated(model, [*wrong, *pairs], shapes=SHAPES) == recalibrated(model, pairs, shapes=SHAPES)


def test_sites_of_a_shape_share_what_is_learnt():
    model = make_model()
    every = measured(model, 80)
    without = [(plan, ms) for plan, ms in every if plan["site5"] not in OFF]
    others = [(plan, ms) for plan, ms in every if plan["site5"] in OFF]
    assert worst(recalibrated(model, without, shapes=SHAPES), others) < 0.01
    assert worst(recalibrated(model, without), others) > 0.02  # where each site is on its own


@pytest.fixture
def context(tmp_path):
    """A search whose students take what `truth` says."""
    evaluated = []

    def evaluate(plan, model, *, source):
        evaluated.append(plan)
        return result_of(make_model(), plan, model=model, source=source)

    return SimpleNamespace(
        run=RunDirectory(tmp_path / "run"),
        reporter=Reporter(quiet=True),
        teacher=SimpleNamespace(sites=()),
        image_parts=SimpleNamespace(choice=()),
        evaluator=SimpleNamespace(evaluate=evaluate),
        evaluated=evaluated,
    )


def result_of(plain, plan, *, model, source="sampler"):
    return PlanResult(
        plan=plan,
        loss=model.predict_loss(plan),
        agreement=1.0,
        accuracy=None,
        latency_ms=truth(plain, plan),
        predicted_ms=model.predict_ms(plan),
        predicted_loss=model.predict_loss(plan),
        params=1,
        source=source,
    )


def test_what_is_near_the_limit_says_how_far_off_the_model_is_there():
    model = make_model()
    results = [
        PlanResult(
            **{**vars(result_of(model, plan, model=model)), "latency_ms": 0.9 * model.predict_ms(plan)}
        )
        for plan in random_plans(model, 30, seed=4)
    ]
    near = [r for r in results if abs(r.latency_ms - 7.0) <= NEAR * 7.0]
    assert len(near) >= FEW
    found = moved(model, results, 7.0)
    off = [found.predict_ms(r.plan) - r.latency_ms for r in near]
    assert abs(np.median(off)) < 1e-9
    assert found.slope == model.slope
    again = moved(model, [*(replace(r, latency_ms=3.0) for r in near), *results], 7.0)
    assert again == found  # of a plan measured twice the last counts
    assert moved(model, results, 1.0) == model  # none is near
    assert moved(model, near[: FEW - 1], 7.0) == model


def test_plans_that_missed_are_solved_again_with_what_they_taught(context, monkeypatch):
    monkeypatch.setattr(recalibrate, "shapes_of", lambda context: SHAPES)
    model, limit = make_model(), 7.0
    results = [result_of(model, plan, model=model) for plan in random_plans(model, 30, seed=4)]
    corrected, more = solved_again(context, model, results, limit)
    assert more
    assert [result.plan for result in more] == context.evaluated
    assert not {result.plan for result in more} & {result.plan for result in results}
    assert all(result.source == "exact" for result in more)
    assert all(result.latency_ms <= 1.01 * limit for result in more)  # as the plain model would not have it
    assert any(model.predict_ms(result.plan) > 1.01 * limit for result in more) or corrected != model


def test_a_stop_loses_one_evaluation_at_most(context, monkeypatch):
    monkeypatch.setattr(recalibrate, "shapes_of", lambda context: SHAPES)
    model, limit = make_model(), 7.0
    results = [result_of(model, plan, model=model) for plan in random_plans(model, 30, seed=4)]
    evaluate = context.evaluator.evaluate

    def stops(plan, model, *, source):
        if len(context.evaluated) == 2:
            raise KeyboardInterrupt
        return evaluate(plan, model, source=source)

    context.evaluator.evaluate = stops
    with pytest.raises(KeyboardInterrupt):
        solved_again(context, model, results, limit)
    context.evaluator.evaluate = evaluate
    _, more = solved_again(context, model, results, limit)
    assert [result.plan for result in more] == context.evaluated
    before = len(context.evaluated)
    assert solved_again(context, model, results, limit)[1] == more
    assert len(context.evaluated) == before


def test_a_loss_that_is_not_finite_is_no_result(context, monkeypatch):
    monkeypatch.setattr(recalibrate, "shapes_of", lambda context: SHAPES)
    model = make_model()
    results = [result_of(model, plan, model=model) for plan in random_plans(model, 30, seed=4)]
    evaluate = context.evaluator.evaluate

    def breaks(plan, model, *, source):
        found = evaluate(plan, model, source=source)
        return PlanResult(**{**vars(found), "loss": float("nan")})

    context.evaluator.evaluate = breaks
    assert solved_again(context, model, results, 7.0)[1] == []
    assert "NaN" not in (context.run.path / "solved_again.json").read_text()


def test_where_no_plan_meets_the_budget_the_next_are_solved_for_with_corrected_latencies(
    context, monkeypatch
):
    """The first measurements were of a luckier moment: all plans near the budget miss it when measured again."""
    monkeypatch.setattr(recalibrate, "shapes_of", lambda context: SHAPES)
    model, budget = make_model(), 7.0
    lucky = [
        PlanResult(**{**vars(result_of(model, plan, model=model)), "latency_ms": 0.9 * truth(model, plan)})
        for plan in random_plans(model, 60, seed=4)
    ]
    near = [result for result in lucky if result.latency_ms <= budget and truth(model, result.plan) > budget]
    results = [result for result in lucky if result.latency_ms > budget] + near
    assert near

    context.budget_ms, context.settings = budget, SimpleNamespace(finetune_minutes=0.0)
    context.evaluator.modules = lambda plan, fresh=False: plan
    measured = []

    def final_latency(students):
        measured.extend(students.values())
        return truly(model, students)

    context.evaluator.final_latency = final_latency
    context.teacher.model = None
    monkeypatch.setattr(finishing, "assemble", lambda model, plan: plan)
    monkeypatch.setattr(finishing, "_refitted", as_they_were)
    outcome = finish(context, results, model)
    assert outcome.best is not None
    assert outcome.best.result.latency_ms <= budget
    assert outcome.best.result.plan in {result.plan for result in outcome.results}
    assert outcome.best.result.source == "exact"
    assert {result.plan for result in near} & set(measured)
    assert len(measured) == len(set(measured))


def test_room_below_the_budget_is_not_left_unused(context, monkeypatch):
    """The study's plans were faster than predicted: the one of lowest loss is only found when solved for again."""
    monkeypatch.setattr(recalibrate, "shapes_of", lambda context: SHAPES)
    model, budget = make_model(), 7.0
    monkeypatch.setitem(globals(), "truth", lambda plain, plan: 0.9 * plain.additive_ms(plan))
    results = [
        result
        for plan in random_plans(model, 60, seed=4)
        if (result := result_of(model, plan, model=model)).predicted_ms <= budget
    ]
    context.budget_ms, context.settings = budget, SimpleNamespace(finetune_minutes=0.0)
    context.evaluator.modules = lambda plan, fresh=False: plan
    context.evaluator.final_latency = lambda students: truly(model, students)
    context.teacher.model = None
    monkeypatch.setattr(finishing, "assemble", lambda model, plan: plan)
    monkeypatch.setattr(finishing, "_refitted", as_they_were)
    outcome = finish(context, results, model)
    assert outcome.best is not None
    assert outcome.best.result.predicted_ms > 0.97 * budget
    assert outcome.best.result.latency_ms <= budget
    assert outcome.best.result.loss < min(r.loss for r in results)
    context.evaluator.final_latency = None  # what was measured is on disk
    assert finish(context, results, model).best.result == outcome.best.result


def test_a_search_that_can_meet_nothing_ends(context, monkeypatch):
    monkeypatch.setattr(recalibrate, "shapes_of", lambda context: SHAPES)
    model = make_model()
    context.budget_ms, context.settings = 0.5, SimpleNamespace(finetune_minutes=0.0)
    results = [result_of(model, plan, model=model) for plan in random_plans(model, 20, seed=4)]
    monkeypatch.setattr(finishing, "_finalists", lambda *_: ([], []))
    outcome = finish(context, results, model)
    assert outcome.best is None
    assert outcome.results == []
