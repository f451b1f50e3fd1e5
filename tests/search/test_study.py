"""The study: seeds first, no plan twice, trials that a killed process left are tried again, and it ends."""

import itertools
import math
from functools import partial

import optuna
import pytest
from optuna.trial import TrialState

from mixerzoo.errors import MixerzooError
from mixerzoo.plan import KEEP_CANDIDATE, Candidate, Plan
from mixerzoo_search import study as study_module
from mixerzoo_search.additive import AdditiveModel
from mixerzoo_search.evaluate import PlanResult
from mixerzoo_search.prior import Prior
from mixerzoo_search.study import evaluations, is_taken, open_study, run_study
from mixerzoo_search.workers import Worker

FAST, SLOW = Candidate("none"), Candidate("static", 0.5)


def make_model(sites=3):
    return AdditiveModel.from_scores(
        {f"site{at}": {FAST: (1.0 + at, -1.0), SLOW: (0.1 * (at + 1), -0.4)} for at in range(sites)},
        base_ms=10.0,
    )


def all_plans(model):
    return [
        model.plan(choice) for choice in itertools.product(*(range(len(row)) for row in model.candidates))
    ]


class Evaluator:
    """Evaluates as the model predicts, remembers what it was asked, and stops where it is told to."""

    def __init__(self, model, *, fail_at=None):
        self.model = model
        self.fail_at = fail_at
        self.asked = []

    def __call__(self, plan, source):
        self.asked.append((plan, source))
        if len(self.asked) == self.fail_at:
            raise KeyboardInterrupt
        return PlanResult(
            plan=plan,
            loss=self.model.predict_loss(plan),
            agreement=0.5,
            accuracy=None,
            latency_ms=self.model.additive_ms(plan),
            predicted_ms=self.model.predict_ms(plan),
            predicted_loss=self.model.predict_loss(plan),
            params=7,
            source=source,
        )

    @property
    def plans(self):
        return [plan for plan, _ in self.asked]


@pytest.fixture
def opened(tmp_path):
    """Open the study of a model, in the same storage each time."""

    def opening(model, *, budget_ms=9.0, seed=0):
        pairs = {(site, c): 1.0 for site, row in zip(model.sites, model.candidates, strict=True) for c in row}
        return open_study(
            f"sqlite:///{tmp_path}/study.db",
            "mine",
            model=model,
            prior=Prior.from_damage(pairs),
            budget_ms=budget_ms,
            seed=seed,
        )

    return opening


@pytest.fixture
def go(tmp_path):
    """Run the study of a model in this process, one of those whose files are in one folder."""
    return partial(run_it, folder=tmp_path / "workers")


def run_it(study, evaluate, *, folder, seeds=(), trials=10, minutes=None, **options):
    return run_study(
        study,
        evaluate,
        model=evaluate.model,
        seeds=seeds,
        budget_ms=9.0,
        trials=trials,
        minutes=minutes,
        worker=Worker(folder),
        **options,
    )


def test_seeds_come_first_and_no_plan_twice(opened, go):
    model = make_model()
    evaluate = Evaluator(model)
    seeds = [model.fastest(), model.plan([0, 0, 0]), model.fastest()]
    seen = []
    results = go(
        opened(model), evaluate, seeds=seeds, on_result=lambda result, done: seen.append((result, done))
    )
    assert evaluate.asked[:2] == [(seeds[0], "exact"), (seeds[1], "exact")]
    assert {source for _, source in evaluate.asked[2:]} == {"sampler"}
    assert len(set(evaluate.plans)) == len(evaluate.plans) == 10
    assert [result.plan for result in results] == evaluate.plans
    assert seen == [(result, done) for done, result in enumerate(results, 1)]


def test_it_ends_with_the_space(opened, go):
    model = make_model(2)
    evaluate = Evaluator(model)
    results = go(opened(model), evaluate, trials=50)
    assert len(results) == 9
    assert set(evaluate.plans) == set(all_plans(model))


def test_a_space_of_one_plan(opened, go):
    model = AdditiveModel.from_scores({"site0": {}, "site1": {}}, base_ms=10.0)
    results = go(opened(model), Evaluator(model), trials=5)
    assert [result.plan for result in results] == [
        Plan((("site0", KEEP_CANDIDATE), ("site1", KEEP_CANDIDATE)))
    ]


def test_it_ends_with_the_minutes(opened, go, monkeypatch):
    model = make_model()
    clock = itertools.count(step=30.0)
    monkeypatch.setattr(study_module.time, "monotonic", lambda: next(clock))
    assert len(go(opened(model), Evaluator(model), minutes=2.0)) == 3


def test_values_and_constraints_are_in_the_study(opened, go):
    model = make_model()
    study = opened(model, budget_ms=9.0)
    results = go(study, Evaluator(model), trials=6)
    assert [direction.name for direction in study.directions] == ["MINIMIZE", "MINIMIZE"]
    assert evaluations(study) == results
    for trial, result in zip(study.trials, results, strict=True):
        assert trial.values == [result.loss, result.latency_ms]
        assert trial.params == result.plan.to_json()
        over = [value for name, value in trial.constraints.items() if name == "latency_over_budget_ms"]
        assert over == [pytest.approx(result.latency_ms - 9.0)]
    feasible = [result.loss for result in results if result.latency_ms <= 9.0]
    assert min(trial.values[0] for trial in study.best_trials) in feasible


def test_a_finished_study_is_left_as_it_is(opened, go):
    model = make_model()
    go(opened(model), Evaluator(model), trials=4)
    evaluate = Evaluator(model)
    study = opened(model)
    before = study.trials
    assert len(go(study, evaluate, trials=4)) == 4
    assert evaluate.asked == []
    assert study.trials == before


def test_it_goes_on_where_it_stopped(opened, go):
    model = make_model()
    seeds = [model.fastest(), model.plan([0, 0, 0])]
    first = go(opened(model), Evaluator(model), seeds=seeds, trials=4)
    evaluate = Evaluator(model)
    results = go(opened(model), evaluate, seeds=seeds, trials=7)
    assert results[:4] == first
    assert len(evaluate.asked) == 3
    assert len({result.plan for result in results}) == 7


def test_a_stopped_study_goes_on_as_if_it_had_not_been(opened, go, tmp_path):
    model = make_model()
    whole = go(opened(model), Evaluator(model), trials=8)
    (tmp_path / "study.db").unlink()
    go(opened(model), Evaluator(model), trials=3)
    assert go(opened(model), Evaluator(model), trials=8) == whole


@pytest.mark.parametrize("fail_at", [1, 2, 3, 4])
def test_the_trial_in_flight_is_tried_again(opened, go, fail_at):
    model = make_model()
    seeds = [model.fastest(), model.plan([0, 0, 0])]
    evaluate = Evaluator(model, fail_at=fail_at)
    with pytest.raises(KeyboardInterrupt):
        go(opened(model), evaluate, seeds=seeds, trials=6)
    lost, source = evaluate.asked[-1]
    again = Evaluator(model)
    study = opened(model)
    assert [trial.state for trial in study.trials].count(TrialState.RUNNING) == 1
    results = go(study, again, seeds=seeds, trials=6)
    assert len(results) == 6
    assert len({result.plan for result in results}) == 6
    assert (lost, source) in again.asked
    assert TrialState.RUNNING not in [trial.state for trial in study.trials]


def test_a_trial_that_was_killed_before_it_had_a_plan(opened, go):
    model = make_model()
    opened(model).ask()
    results = go(opened(model), Evaluator(model), trials=3)
    assert len(results) == 3


def test_a_plan_without_a_finite_loss_is_no_result(opened, go):
    model = make_model()

    class Broken(Evaluator):
        def __call__(self, plan, source):
            result = super().__call__(plan, source)
            if plan != model.fastest():
                return result
            return PlanResult(**(vars(result) | {"loss": math.nan}))

    evaluate = Broken(model)
    study = opened(model)
    results = go(study, evaluate, seeds=[model.fastest()], trials=4)
    assert all(math.isfinite(result.loss) for result in results)
    assert model.fastest() not in [result.plan for result in results]
    assert study.trials[0].state is TrialState.FAIL
    evaluate = Broken(model)
    go(opened(model), evaluate, seeds=[model.fastest()], trials=6)
    assert model.fastest() not in evaluate.plans


def test_tables_that_another_process_is_just_making_are_waited_for(tmp_path, monkeypatch):
    real, tries = study_module._connected, []

    def made_by_another(storage):
        tries.append(storage)
        if len(tries) == 1:
            raise RuntimeError('relation "studies" already exists')
        return real(storage)

    monkeypatch.setattr(study_module, "_connected", made_by_another)
    assert not is_taken(f"sqlite:///{tmp_path}/study.db", "x")
    assert len(tries) == 2


@pytest.mark.parametrize(
    "storage", ["sqlite:////nowhere/at/all.db", "nonsense", "postgres://u@127.0.0.1:9/x"]
)
def test_an_unreachable_storage_is_one_line(storage):
    model = make_model()
    for reach in (
        lambda: is_taken(storage, "x"),
        lambda: open_study(storage, "x", model=model, prior=Prior.from_damage({}), budget_ms=1.0, seed=0),
    ):
        with pytest.raises(MixerzooError) as raised:
            reach()
        assert str(raised.value).startswith(f"storage '{storage}': ")
        assert "\n" not in str(raised.value)
        assert str(raised.value).endswith("give another --storage")


def test_optuna_is_quiet(opened, go, capfd):
    go(opened(make_model()), Evaluator(make_model()), trials=2)
    assert capfd.readouterr() == ("", "")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
