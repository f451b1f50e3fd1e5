"""Claims: no plan is evaluated by two processes, and what a dead one had is evaluated by exactly one other."""

import json
import os
import signal
import threading
import time
from collections import Counter
from contextlib import ExitStack

import optuna
import pytest
from optuna.trial import TrialState
from test_study import Evaluator, all_plans, make_model

from mixerzoo.errors import MixerzooError
from mixerzoo_search import workers
from mixerzoo_search.claims import CLAIM, LOST, SOURCE, WITHDRAWN, claim, close_lost, next_plan
from mixerzoo_search.prior import Prior
from mixerzoo_search.study import disconnect, open_study, run_study, without_password
from mixerzoo_search.workers import WORKER, Worker, holding

TRIALS = 12

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="starts processes by forking")


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path}/study.db"


@pytest.fixture
def model():
    return make_model(4)


def opened(url, model, **changes):
    return open_study(
        url, "mine", **{"model": model, "prior": Prior.from_damage({}), "budget_ms": 9.0, "seed": 0} | changes
    )


def take_part(url, model, folder, *, leads, trials=TRIALS, seconds=0.0, before=lambda asked: None):
    """Work on the study; return the plans that were evaluated here."""
    evaluate = Evaluator(model)

    def slowly(plan, source):
        result = evaluate(plan, source)
        before(evaluate.asked)
        time.sleep(seconds)
        return result

    run_study(
        opened(url, model),
        slowly,
        model=model,
        seeds=all_plans(model)[:3],
        budget_ms=9.0,
        trials=trials,
        minutes=None,
        worker=Worker(folder),
        leads=leads,
    )
    return [plan.key for plan in evaluate.plans]


def finished(study):
    """Return the plans of the finished trials; all others must say why they are not."""
    for trial in study.trials:
        assert trial.state in (TrialState.COMPLETE, TrialState.FAIL)
        if trial.state == TrialState.FAIL:
            assert {WITHDRAWN, LOST} & set(trial.user_attrs)
    return [
        json.dumps(trial.params, sort_keys=True)
        for trial in study.trials
        if trial.state == TrialState.COMPLETE
    ]


def assert_each_once(study, evaluated, *, trials=TRIALS):
    plans = finished(study)
    assert len(plans) == len(set(plans)) == trials
    assert Counter(evaluated).most_common(1)[0][1] == 1
    assert len(evaluated) == trials


def test_the_second_claim_on_a_plan_withdraws(url, model, tmp_path):
    study, (first, second) = opened(url, model), (Worker(tmp_path), Worker(tmp_path))
    plan, other = all_plans(model)[:2]
    number = claim(study, plan, "exact", model=model, worker=first, most=9)
    assert number == 0
    assert claim(opened(url, model), plan, "sampler", model=model, worker=second, most=9) is None
    assert claim(opened(url, model), other, "sampler", model=model, worker=second, most=9) == 2
    mine, withdrawn, third = study.trials
    assert (mine.state, withdrawn.state, third.state) == (
        TrialState.RUNNING,
        TrialState.FAIL,
        TrialState.RUNNING,
    )
    assert mine.user_attrs[SOURCE] == "exact"
    assert mine.params == plan.to_json()
    assert withdrawn.user_attrs[WITHDRAWN] == "trial 0 has this plan"
    assert len({trial.user_attrs[CLAIM] for trial in study.trials}) == 3


def test_the_last_trial_is_claimed_once(url, model, tmp_path):
    study, worker = opened(url, model), Worker(tmp_path)
    plans = all_plans(model)[:3]
    found = [claim(study, plan, "exact", model=model, worker=worker, most=2) for plan in plans]
    assert found == [0, 1, None]
    assert study.trials[2].user_attrs[WITHDRAWN] == "there are 2 trials without it"


def test_two_claims_at_the_same_time(url, model, tmp_path):
    """The order in which two processes look does not matter: the one with the higher number always withdraws."""
    study = opened(url, model)
    plan = all_plans(model)[0]
    race, found = threading.Barrier(4), []

    def run():
        mine = opened(url, model)
        race.wait()
        found.append(claim(mine, plan, "exact", model=model, worker=Worker(tmp_path), most=9))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found, key=str) == [0, None, None, None]
    assert [trial.state for trial in study.trials].count(TrialState.RUNNING) == 1


def test_the_living_are_left_alone_and_the_dead_are_not(url, model, tmp_path):
    study, plan = opened(url, model), all_plans(model)[5]
    one, other = Worker(tmp_path), Worker(tmp_path)
    with other.working(study):
        with ExitStack() as stack:
            stack.enter_context(pytest.raises(RuntimeError, match="killed"))
            stack.enter_context(one.working(study))
            number = claim(study, plan, "exact", model=model, worker=one, most=9)
            close_lost(study, other)
            assert study.trials[number].state == TrialState.RUNNING
            raise RuntimeError("killed")
        close_lost(study, other)
        close_lost(study, other)
        assert study.trials[number].state == TrialState.FAIL
        assert study.trials[number].user_attrs[LOST] == "its process ended"
        assert next_plan(study, study.trials, [], model) == (plan, "exact")
        assert claim(study, plan, "exact", model=model, worker=other, most=9) == number + 1
        assert next_plan(study, study.trials, [], model)[0] != plan
        assert len(list(tmp_path.glob("*.lock"))) == 1


def test_a_process_on_another_machine_is_dead_when_it_beats_no_more(url, model, tmp_path, monkeypatch):
    study, clock = opened(url, model), [100.0]
    far, near = Worker(tmp_path / "far"), Worker(tmp_path / "near")
    far.name = "elsewhere.0123"
    monkeypatch.setattr(workers, "BEAT_S", 1e6)
    with far.working(study), near.working(study):
        monkeypatch.setattr(workers.time, "monotonic", lambda: clock[0])
        number = claim(study, all_plans(model)[0], "exact", model=model, worker=far, most=9)
        beats = 1
        for seconds, state, new_beat in (
            (0, TrialState.RUNNING, False),
            (50, TrialState.RUNNING, True),
            (50, TrialState.RUNNING, False),
            (20, TrialState.FAIL, False),
        ):
            clock[0] += seconds
            if new_beat:
                beats += 1
                study.set_user_attr(f"{workers.BEATS} {far.name}", beats)
            close_lost(study, near)
            assert study.trials[number].state == state


def test_a_result_that_comes_after_its_trial_was_given_up_is_dropped(url, model, tmp_path):
    study = opened(url, model)

    def given_up(asked):
        if len(asked) == 1:
            study.tell(0, state=TrialState.FAIL)

    evaluated = take_part(url, model, tmp_path, leads=True, trials=3, before=given_up)
    assert len(evaluated) == 4
    assert evaluated[0] == evaluated[1]
    states = [trial.state for trial in study.trials]
    assert states == [TrialState.FAIL, *[TrialState.COMPLETE] * 3]


def test_threads_share_a_study(url, model, tmp_path):
    opened(url, model).set_user_attr("open", True)
    evaluated, race = [], threading.Barrier(3)

    def run(leads):
        race.wait()
        evaluated.extend(take_part(url, model, tmp_path, leads=leads, seconds=0.005))

    threads = [threading.Thread(target=run, args=(number == 0,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_each_once(opened(url, model), evaluated)


def in_child(function):
    """Run a function in a process of its own; return its id."""
    child = os.fork()
    if not child:
        code = 1
        try:
            function()
            code = 0
        finally:
            os._exit(code)
    return child


def share(url, model, folder, *, kill=None):
    """Let three processes share a study, and kill one when it is at its so-and-so-manieth plan; return the plans.

    Until then, the others take as many plans as it has at most: however slow it is, some are left for it.
    """
    study = opened(url, model)
    study.set_user_attr("open", True)
    disconnect(study._storage)  # processes that are forked must not share a connection
    folder.mkdir(exist_ok=True)
    killed = folder / "killed"

    def run(number):
        def before(asked):
            if kill and len(asked) >= kill:
                if number == 1:
                    killed.touch()
                    os.kill(os.getpid(), signal.SIGKILL)
                while not killed.exists():
                    time.sleep(0.01)
            with (folder / f"{number}.txt").open("a") as file:
                file.write(f"{asked[-1][0].key}\n")

        try:
            take_part(url, model, folder, leads=number == 0, trials=TRIALS, seconds=0.1, before=before)
        finally:
            killed.touch()  # the others do not wait for one that failed

    children = [in_child(lambda number=number: run(number)) for number in range(3)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [0, -signal.SIGKILL if kill else 0, 0]
    return [key for file in folder.glob("*.txt") for key in file.read_text().split()]


@needs_fork
def test_processes_share_a_study(url, model, tmp_path):
    evaluated = share(url, model, tmp_path / "workers")
    assert_each_once(opened(url, model), evaluated)


@needs_fork
@pytest.mark.parametrize(
    "kill", [2, pytest.param(1, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
)
def test_what_a_killed_process_had_is_evaluated_by_one_other(url, model, tmp_path, kill):
    evaluated = share(url, model, tmp_path / "workers", kill=kill)
    study = opened(url, model)
    assert_each_once(study, evaluated)
    (lost,) = [trial for trial in study.trials if LOST in trial.user_attrs]
    again = [
        trial for trial in study.trials if trial.params == lost.params and trial.state == TrialState.COMPLETE
    ]
    assert len(again) == 1
    assert again[0].user_attrs[SOURCE] == lost.user_attrs[SOURCE]
    assert again[0].user_attrs[WORKER] != lost.user_attrs[WORKER]


def test_a_process_that_takes_part_ends_when_the_one_that_leads_does(url, model, tmp_path):
    study = opened(url, model)
    study.set_user_attr("open", True)

    def enough(asked):
        if len(asked) == 2:
            study.set_user_attr("open", False)

    assert len(take_part(url, model, tmp_path, leads=False, before=enough)) == 2


def test_the_study_of_another_search_is_refused(url, model):
    opened(url, model, owner="one")
    opened(url, model, owner="one")
    with pytest.raises(MixerzooError, match="has a study 'mine' of another search; give a run directory"):
        opened(url, model, owner="other")


def test_a_password_is_not_shown():
    assert without_password("postgresql://me:se:cr@et@host:5/db") == "postgresql://me:***@host:5/db"
    for plain in ("sqlite:////a:b@c/d.db", "postgresql://me@host/db", "nonsense"):
        assert without_password(plain) == plain


@needs_fork
def test_a_lock_is_not_kept_by_what_its_process_forks(tmp_path):
    file, (told, tells), (waits, ends) = tmp_path / "one.lock", os.pipe(), os.pipe()

    def linger():
        os.write(tells, b"x")
        os.read(waits, 1)

    with holding(file):
        child = in_child(linger)
        os.read(told, 1)
    try:
        with holding(file, wait=False) as mine:
            assert mine
    finally:
        os.write(ends, b"x")
        os.waitpid(child, 0)
        for end in (told, tells, waits, ends):
            os.close(end)


def test_optuna_is_asked_for_nothing_while_a_plan_is_chosen(url, model):
    """A plan is chosen in a copy: the study has only whole ones."""
    study = opened(url, model)
    plan, source = next_plan(study, [], [], model)
    assert source == "sampler"
    assert plan in all_plans(model)
    assert study.trials == []
    optuna.logging.set_verbosity(optuna.logging.ERROR)
