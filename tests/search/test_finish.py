"""Which plans have their turn at the end: those of lowest loss that meet the budget when measured again."""

from types import SimpleNamespace

import pytest
import torch

from mixerzoo.plan import Candidate, Plan
from mixerzoo.progress import Reporter
from mixerzoo.score import Evaluation
from mixerzoo_search import finish as finishing
from mixerzoo_search.evaluate import PlanResult
from mixerzoo_search.finetuning import halving
from mixerzoo_search.finish import MEASURED, REFITTED, SURELY
from mixerzoo_search.run_directory import RunDirectory

LIMIT = 5.0


def result(number, ms=4.0):
    plan = Plan.from_json({"a": str(Candidate("static", 1 / (1 + number))), "b": "keep"})
    return PlanResult(
        plan=plan, loss=float(number), agreement=1.0, accuracy=None, latency_ms=ms, predicted_ms=ms,
        predicted_loss=0.0, params=1, source="sampler",
    )  # fmt: skip


@pytest.fixture
def context(tmp_path, monkeypatch):
    """A search that measures as `again` says: plan key -> latency and the most that it can be; 4 ms unless said."""
    monkeypatch.setattr(finishing, "assemble", lambda model, modules: modules)
    found = SimpleNamespace(
        run=RunDirectory(tmp_path / "run"),
        teacher=SimpleNamespace(model=None),
        evaluator=SimpleNamespace(modules=lambda plan: plan),
        reporter=Reporter(quiet=True),
        again={},
        measured=[],
    )
    (tmp_path / "run").mkdir()

    def final_latency(students):
        found.measured += students
        return {key: found.again.get(key, (4.0, 4.1)) for key in students}

    found.evaluator.final_latency = final_latency
    return found


def finalists(context, results):
    meets, misses = finishing._finalists(context, results, LIMIT)
    return [r.loss for r in meets], [r.loss for r in misses]


def test_what_misses_when_measured_again_goes_no_further(context):
    results = [result(number) for number in range(12)]
    within = 0.999 * SURELY * LIMIT
    again = {0: (5.01, 5.02), 1: (4.9, within), 2: (4.9, 1.01 * SURELY * LIMIT)}
    context.again = {results[number].plan.key: found for number, found in again.items()}
    assert finalists(context, results) == ([1.0, 3.0, 4.0, 5.0], [0.0, 2.0])
    assert context.measured == [r.plan.key for r in results[: 2 + REFITTED]]
    assert finalists(context, results) == ([1.0, 3.0, 4.0, 5.0], [0.0, 2.0])  # decided once
    assert len(context.measured) == 2 + REFITTED


def test_there_is_an_end_to_measuring(context):
    results = [result(number) for number in range(20)]
    context.again = {r.plan.key: (5.5, 5.6) for r in results[: MEASURED - 2]}
    meets, misses = finalists(context, results)
    assert meets == [MEASURED - 2, MEASURED - 1]
    assert misses == [float(number) for number in range(MEASURED - 2)]


def test_a_killed_search_measures_only_what_it_had_not(context):
    results = [result(number) for number in range(20)]
    context.again = {results[2].plan.key: (5.5, 5.6)}
    measure, left = context.evaluator.final_latency, [1]

    def killed(students):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return measure(students)

    context.evaluator.final_latency = killed
    with pytest.raises(KeyboardInterrupt):
        finalists(context, results)
    context.evaluator.final_latency = measure
    assert finalists(context, results) == ([0.0, 1.0, 3.0, 4.0], [2.0])
    assert context.measured == [r.plan.key for r in results[: REFITTED + 1]]


def test_a_search_made_longer_measures_what_is_new(context):
    first = [result(number) for number in range(1, 5)]
    assert finalists(context, first)[0] == [1.0, 2.0, 3.0, 4.0]
    better = [result(0.5), *first[:3]]  # as many as before
    assert finalists(context, better)[0] == [0.5, 1.0, 2.0, 3.0]


def test_what_was_refitted_before_has_the_latency_of_the_last_measurement(tmp_path, monkeypatch):
    stored = finishing.Finalist(
        result=result(1, ms=4.0), student="refitted", losses=torch.zeros(2), further=torch.empty(0)
    )
    monkeypatch.setattr(finishing, "_load", lambda *_: stored)
    context = SimpleNamespace(run=RunDirectory(tmp_path))
    (found,) = finishing._refitted(context, [result(1, ms=4.3)])
    assert (found.result.latency_ms, found.student) == (4.3, "refitted")


def test_what_was_over_the_limit_before_is_not_measured(context):
    assert finalists(context, [result(0, ms=5.1), result(1, ms=6.0)]) == ([], [])
    assert context.measured == []
    assert finalists(context, [result(0, ms=5.1), result(1), result(2)]) == ([1.0, 2.0], [])


# What is done to a finalist


def test_distillation_must_be_clearly_better_where_its_best_state_was_chosen(tmp_path, monkeypatch):
    old = torch.linspace(0.1, 0.3, 100)
    noise = torch.randn(100, generator=torch.Generator().manual_seed(0))
    sides = {
        "clear": old - 0.05 + 0.05 * noise,
        "chance": old - 0.005 + 0.05 * noise,
        "broken": old * float("nan"),
    }
    context = SimpleNamespace(
        final_judge=SimpleNamespace(losses=sides.__getitem__),
        study_judge=SimpleNamespace(evaluate=lambda _: Evaluation(loss=0.3, agreement=0.5, accuracy=0.25)),
        run=RunDirectory(tmp_path),
        settings=SimpleNamespace(seed=0, device="cpu"),
        teacher=None,
        training_images=None,
        image_parts=SimpleNamespace(choice=()),
    )
    monkeypatch.setattr(finishing, "_save", lambda *_: None)
    before = finishing.Finalist(result=result(0.1), student="old", losses=old, further=torch.empty(0))
    assert before.loss == pytest.approx(0.2)
    for name in sides:
        monkeypatch.setattr(finishing, "finetune", lambda *_, name=name, **__: (name, None))
        this = halving.Round(number=1, of=2, plans=2, seconds=1.0)
        found = finishing._finetuned(context, before, this, lambda _: 0.0, lambda _: None)
        if name != "clear":
            assert found is before
            continue
        assert found.student == "clear"
        assert found.loss == pytest.approx(float(sides["clear"].mean()))
        # Comparable with all other plans, and worse there: they were chosen on these images.
        assert found.result.loss == 0.3 > before.result.loss
        assert (found.result.agreement, found.result.accuracy) == (0.5, 0.25)
        assert found.result.source == "finetuned"
        assert found.result.latency_ms == before.result.latency_ms


@pytest.mark.parametrize(("mean", "kept"), [(0.19, True), (0.21, False), (float("nan"), False)])
def test_further_images_decide_whether_distillation_has_helped(tmp_path, monkeypatch, mean, kept):
    context = SimpleNamespace(
        final_judge=SimpleNamespace(losses=lambda _: torch.full((100,), 0.1)),
        choice_judge=SimpleNamespace(losses=lambda _: torch.full((50,), mean)),
        study_judge=SimpleNamespace(evaluate=lambda _: Evaluation(loss=0.3, agreement=0.5, accuracy=0.25)),
        image_parts=SimpleNamespace(choice=range(50)),
        run=RunDirectory(tmp_path),
        settings=SimpleNamespace(seed=0, device="cpu"),
        teacher=None,
        training_images=None,
    )
    monkeypatch.setattr(finishing, "_save", lambda *_: None)
    monkeypatch.setattr(finishing, "finetune", lambda *_, **__: ("new", None))
    losses, further = torch.full((100,), 0.3), torch.full((50,), 0.2)
    before = finishing.Finalist(result=result(0.1), student="old", losses=losses, further=further)
    assert before.loss == pytest.approx((100 * 0.3 + 50 * 0.2) / 150)
    this = halving.Round(number=1, of=1, plans=1, seconds=1.0)
    found = finishing._finetuned(context, before, this, lambda _: 0.0, lambda _: None)
    assert (found.student == "new") is kept
    assert kept or found is before
    assert not kept or found.loss == pytest.approx((100 * 0.1 + 50 * 0.19) / 150)


@pytest.mark.parametrize("further", [True, False])
@pytest.mark.parametrize(
    ("stitched", "refitted", "kept"),
    [(0.2, 0.1, True), (0.1, 0.2, False), (float("nan"), 0.5, True), (0.5, float("nan"), False)],
)
def test_a_refit_is_kept_if_it_is_better(monkeypatch, stitched, refitted, kept, further):
    losses = {"stitched": torch.full((10,), stitched), "refitted": torch.full((10,), refitted)}
    monkeypatch.setattr(finishing, "assemble", lambda model, modules: "stitched")
    context = SimpleNamespace(
        teacher=SimpleNamespace(model=None),
        evaluator=SimpleNamespace(modules=lambda plan: None),
        final_judge=SimpleNamespace(losses=losses.__getitem__),
        choice_judge=SimpleNamespace(losses=losses.__getitem__),
        study_judge=SimpleNamespace(evaluate=lambda _: Evaluation(loss=0.3, agreement=0.5, accuracy=0.25)),
        image_parts=SimpleNamespace(choice=range(10 * further)),
    )
    found = finishing._better(context, result(0.1), "refitted")
    assert found.student == ("refitted" if kept else "stitched")
    assert found.result.source == ("refit" if kept else "sampler")
    assert found.loss == pytest.approx(refitted if kept else stitched)
    assert len(found.further) == 10 * further


def test_a_student_that_breaks_down_on_the_final_images_comes_last():
    losses = torch.tensor([0.1, float("nan")])
    broken = finishing.Finalist(result=result(0), student="", losses=losses, further=torch.empty(0))
    assert broken.loss == float("inf")
    assert finishing._finite(broken.losses) == [pytest.approx(0.1), None]
