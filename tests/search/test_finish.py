"""Which plans have their turn at the end: those of lowest loss that meet the budget when measured again."""

from types import SimpleNamespace

import pytest

from mixerzoo.plan import Candidate, Plan
from mixerzoo.progress import Reporter
from mixerzoo.score import Evaluation
from mixerzoo_search import finish as finishing
from mixerzoo_search.evaluate import PlanResult
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

    def final_latency(student):
        found.measured.append(student.key)
        return found.again.get(student.key, (4.0, 4.1))

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
    measure, left = context.evaluator.final_latency, [3]

    def killed(student):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return measure(student)

    context.evaluator.final_latency = killed
    with pytest.raises(KeyboardInterrupt):
        finalists(context, results)
    context.evaluator.final_latency = measure
    assert finalists(context, results) == ([0.0, 1.0, 2.0, 3.0], [])
    assert context.measured == [r.plan.key for r in results[:REFITTED]]


def test_what_was_over_the_limit_before_is_not_measured(context):
    assert finalists(context, [result(0, ms=5.1), result(1, ms=6.0)]) == ([], [])
    assert context.measured == []
    assert finalists(context, [result(0, ms=5.1), result(1), result(2)]) == ([1.0, 2.0], [])


# What is done to a finalist


class Judge:
    """A loss by name of the student."""

    def __init__(self, losses):
        self.losses = losses

    def evaluate(self, student):
        return Evaluation(loss=self.losses[student], agreement=0.5, accuracy=0.25)


def better(before, after, *, study=0.3):
    """Return a finalist, and what becomes of it; the new weights have these losses on final and study images."""
    context = SimpleNamespace(final_judge=Judge({"new": after}), study_judge=Judge({"new": study}))
    old = finishing.Finalist(result=result(0.1), student="old", loss=before)
    return old, finishing._better(context, old, "new", source="refit")


def test_what_is_worse_where_the_plan_was_chosen_but_better_elsewhere_is_taken():
    old, found = better(0.12, 0.09, study=0.3)
    assert (found.student, found.loss) == ("new", 0.09)
    assert found.result.loss == 0.3 > old.result.loss
    assert (found.result.agreement, found.result.accuracy, found.result.source) == (0.5, 0.25, "refit")
    assert found.result.latency_ms == old.result.latency_ms


@pytest.mark.parametrize("after", [0.12, 0.2, float("nan")])
def test_what_is_no_better_is_left(after):
    old, found = better(0.12, after, study=0.0)
    assert found is old
