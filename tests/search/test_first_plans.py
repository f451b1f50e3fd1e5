"""The plans that a study begins with: where students do better than a constant answer, and near the budget."""

import math
from types import SimpleNamespace

import pytest

from mixerzoo.plan import Candidate
from mixerzoo_search.additive import AdditiveModel
from mixerzoo_search.exact import solve
from mixerzoo_search.first_plans import HALVINGS, HOPEFUL, NEAR, fastest_hopeful, first_plans

SITES = 8
TEACHER_MS = 10.0


def make_model(scale=1.0):
    """Return a model whose fastest plan is predicted to lose 8 * 8 * scale, at 2 ms."""
    losses = {"pool": 0.001, "static": 0.1, "linear": 1.0, "none": 8.0}
    row = {
        Candidate(mixer): (scale * loss, -0.25 * number)
        for number, (mixer, loss) in enumerate(losses.items(), 1)
    }
    return AdditiveModel.from_scores({f"site{at}": row for at in range(SITES)}, base_ms=TEACHER_MS)


def context(budget_ms):
    """A search of a teacher that is sure of its answers: a constant one loses the entropy of ten classes."""
    return SimpleNamespace(
        budget_ms=budget_ms,
        teacher_ms=TEACHER_MS,
        study_judge=SimpleNamespace(constant_loss=lambda: math.log(10)),
    )


def test_no_plan_is_looked_at_that_is_worse_than_a_constant_answer():
    search, model = context(8.0), make_model()
    plans = first_plans(search, model)
    assert all(solution.loss <= HOPEFUL * math.log(10) for solution in plans)
    assert [solution.ms for solution in plans] == sorted(solution.ms for solution in plans)
    assert len(plans) > 10
    for share in NEAR:
        assert solve(model, share * 8.0).plan in {solution.plan for solution in plans}


def test_the_budget_is_looked_at_whatever_is_predicted_there():
    search, model = context(3.0), make_model()
    plans = first_plans(search, model)
    assert solve(model, 3.0).plan in {solution.plan for solution in plans}
    assert min(solution.ms for solution in plans) <= 3.0


@pytest.mark.parametrize("most", [0.01, 0.5, 3.0, 20.0])
def test_the_fastest_hopeful_budget_is_found_to_a_share_of_the_span(most):
    model = make_model()
    fastest = model.predict_ms(model.fastest())
    found = fastest_hopeful(model, TEACHER_MS, most)
    assert solve(model, found).loss <= most
    step = (TEACHER_MS - fastest) / 2**HALVINGS
    assert found == fastest or solve(model, found - 1.001 * step).loss > most


def test_where_all_plans_are_hopeful_the_sweep_begins_with_the_fastest():
    model = make_model(scale=1e-6)
    assert fastest_hopeful(model, TEACHER_MS, 0.5) == model.predict_ms(model.fastest())
    assert model.fastest() in {solution.plan for solution in first_plans(context(6.0), model)}
