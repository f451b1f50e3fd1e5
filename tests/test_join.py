"""Several processes on one search: one leads, others take part and take over, and no trial is lost or doubled."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import tiny_search
from click.testing import CliRunner
from tiny_search import check_summary

from mixerzoo.cli import main
from mixerzoo.errors import MixerzooError
from mixerzoo.opening import open_teacher
from mixerzoo.tracking import Tracker
from mixerzoo_search import join, search
from mixerzoo_search.claims import LOST, WITHDRAWN
from mixerzoo_search.evaluate import Evaluator
from mixerzoo_search.run_directory import RunDirectory
from mixerzoo_search.study import connect
from mixerzoo_search.workers import WORKER

optuna = pytest.importorskip("optuna")
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="starts processes by forking")

SCRIPT = Path(__file__).parent / "tiny_search.py"
TRIALS = 12
SECONDS = 240.0


@pytest.fixture(scope="module", autouse=True)
def _tiny_world():
    with tiny_search.tiny_world():
        open_teacher("tiny")  # so that the processes that are forked need no imports any more
        yield


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """The data, and an MLflow store, which takes seconds to make."""
    folder = tmp_path_factory.mktemp("start")
    tiny_search.write_npz(folder / "data.npz")
    Tracker(f"sqlite:///{folder}/mlflow.db", "mixerzoo tiny").close()
    return folder


@pytest.fixture
def here(start, tmp_path, monkeypatch):
    for name in ("data.npz", "mlflow.db"):
        (tmp_path / name).write_bytes((start / name).read_bytes())
    monkeypatch.chdir(tmp_path)
    evaluate = Evaluator.evaluate

    def slowly(self, plan, *args, **options):
        with open(tmp_path / "evaluated.txt", "a") as file:
            file.write(f"{os.getpid()} {plan.key}\n")
        time.sleep(0.15)
        if Path("gate").exists():  # where two take part, none gets far without the other
            wait_for(lambda: len({pid for pid, _ in evaluated()}) > 1)
        return evaluate(self, plan, *args, **options)

    monkeypatch.setattr(Evaluator, "evaluate", slowly)
    return tmp_path


def options(**changes):
    fast = tiny_search.FAST | {"trials": TRIALS, "finetune_minutes": 0, "mixers": tiny_search.MIXERS}
    return fast | {"budget": "60%", "out": "run", "tracking_uri": "sqlite:///mlflow.db"} | changes


def lead(**changes):
    return search("tiny", "data.npz", **options(**changes))


def in_child(name, function, **arguments):
    """Run a function in a process of its own, which writes what it returns, or its error; return its id."""
    child = os.fork()
    if not child:
        code = 1
        try:
            found = function(**arguments)
            told = getattr(found, "evaluated", None)
            Path(f"{name}.json").write_text(json.dumps({"leads": told is None, "evaluated": told}))
            code = 0
        except BaseException as error:
            Path(f"{name}.json").write_text(json.dumps({"error": repr(error)}))
        finally:
            os._exit(code)
    return child


def ended(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def told(name):
    return json.loads(Path(f"{name}.json").read_text())


def wait_for(condition):
    until = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def evaluated():
    file = Path("evaluated.txt")
    return [line.split() for line in file.read_text().splitlines()] if file.exists() else []


def assert_none_lost_or_doubled(storage="sqlite:///run/study.db", *, killed=0):
    """There are so many finished trials, all of other plans; what a killed process was at was evaluated once more."""
    study = optuna.load_study(study_name="run", storage=connect(storage))
    complete = [trial for trial in study.trials if trial.state.name == "COMPLETE"]
    plans = [json.dumps(trial.params, sort_keys=True) for trial in complete]
    assert len(plans) == len(set(plans)) == TRIALS
    others = [trial for trial in study.trials if trial not in complete]
    assert all(trial.state.name == "FAIL" for trial in others)
    assert all({WITHDRAWN, LOST} & set(trial.user_attrs) for trial in others)
    lost = [trial for trial in others if LOST in trial.user_attrs]
    assert len(lost) <= killed
    times = Counter(key for _, key in evaluated())
    assert set(times.values()) <= {1, 2}
    assert sum(number == 2 for number in times.values()) <= killed
    summary = json.loads(Path("run/summary.json").read_text())
    check_summary(summary)
    assert summary["met"]
    assert summary["evaluations"] >= TRIALS
    assert RunDirectory(Path("run")).record()["phase"] == "finished"
    return [trial.user_attrs[WORKER] for trial in complete]


def test_two_processes_share_the_trials_and_one_finishes(here):
    Path("gate").touch()
    leader = in_child("leader", lead)
    wait_for((here / "run" / "run.json").exists)
    joiner = in_child("joiner", join, run="run")
    assert (ended(leader), ended(joiner)) == (0, 0), (told("leader"), told("joiner"))
    whose = Counter(assert_none_lost_or_doubled())
    assert len(evaluated()) == TRIALS
    assert len(whose) == 2
    assert told("leader")["leads"]
    assert told("joiner")["evaluated"] in whose.values()
    assert not list(here.rglob("*.lock")) or {p.name for p in here.rglob("*.lock")} == {"library.lock"}
    with tiny_search.mlflow_client(here) as client:
        (experiment,) = [found for found in client.search_experiments() if found.name != "Default"]
        children = client.search_runs([experiment.experiment_id], "tags.`mlflow.parentRunId` != ''")
    summary = json.loads(Path("run/summary.json").read_text())
    assert len({child.info.run_name for child in children}) == len(children) == summary["evaluations"]


def test_another_search_of_the_same_is_refused_and_takes_part_where_it_says_so(here):
    Path("gate").touch()
    leader = in_child("leader", lead)
    wait_for(evaluated)
    before = (here / "run" / "run.json").read_bytes()
    with pytest.raises(MixerzooError, match="another process is at this search; add --join to take part"):
        lead()
    for changes, text in (
        ({"batch_size": 4}, "--batch-size 4: run 'run' has --batch-size 1"),
        ({"budget": "40%"}, "--budget 40%: run 'run' has --budget 60%"),
        ({"mixers": ("none",)}, "--mixers none: run 'run' has --mixers static,pool,linear,none,mlp_slice"),
    ):
        with pytest.raises(MixerzooError, match=text):
            join(model="tiny", data="data.npz", **options(**changes))
    assert (here / "run" / "run.json").read_bytes() == before
    words = ["search", "--model", "tiny", "--data", "data.npz", "--budget", "60%", "--out", "run", "--join"]
    said = CliRunner().invoke(main, words)
    assert said.exit_code == 0, said.output
    assert said.stdout.startswith("took part in run: evaluated ")
    assert ended(leader) == 0, told("leader")
    assert_none_lost_or_doubled()


def test_the_working_directory_can_be_joined(here, monkeypatch):
    found = lead(trials=1)
    uri = f"sqlite:///{here}/mlflow.db"
    monkeypatch.chdir(here / "run")
    Path("evaluated.txt").unlink(missing_ok=True)
    again = join(".", model="tiny", data=here / "data.npz", tracking_uri=uri)
    assert again.summary["best"] == found.summary["best"]
    assert {path.name for path in here.glob(".run*")} == set()


def test_what_cannot_be_joined_is_refused(here):
    with pytest.raises(MixerzooError, match=r"'run' is not a run directory: it has no run\.json"):
        join("run")
    with pytest.raises(MixerzooError, match="give one of budget_ms"):
        join()
    assert not (here / "run").exists()


@pytest.mark.slow
def test_a_process_that_joins_nobody_leads(here):
    first = in_child("first", join, model="tiny", data="data.npz", **options())
    second = in_child("second", join, model="tiny", data="data.npz", **options())
    assert (ended(first), ended(second)) == (0, 0), (told("first"), told("second"))
    assert_none_lost_or_doubled()
    assert told("first")["leads"] or told("second")["leads"]


@pytest.mark.slow
def test_a_machine_that_the_search_was_not_measured_on_takes_no_part(here):
    leader = in_child("leader", lead)
    wait_for((here / "run" / "run.json").exists)
    joiner = in_child("joiner", join_from_elsewhere)
    assert (ended(leader), ended(joiner)) == (0, 1)
    assert "latencies are those of another machine (device name" in told("joiner")["error"]


def join_from_elsewhere():
    from mixerzoo_search import beginning

    environment = beginning.environment
    beginning.environment = lambda conditions: environment(conditions) | {"device_name": "another"}
    return join("run")


@pytest.mark.parametrize("after", [3, pytest.param(7, marks=pytest.mark.slow)])
def test_where_the_process_that_leads_is_killed_another_goes_on(here, after):
    Path("gate").touch()
    leader = in_child("leader", lead)
    wait_for((here / "run" / "run.json").exists)
    joiner = in_child("joiner", join, run="run")
    wait_for(lambda: len({pid for pid, _ in evaluated()}) == 2 and len(evaluated()) >= after)
    os.kill(leader, signal.SIGKILL)
    assert (ended(leader), ended(joiner)) == (-9, 0), told("joiner")
    assert told("joiner")["leads"]
    assert_none_lost_or_doubled(killed=1)


@pytest.mark.slow
@pytest.mark.parametrize("after", [1, 3])
def test_where_a_process_that_takes_part_is_killed_the_other_goes_on(here, after):
    Path("gate").touch()
    leader = in_child("leader", lead)
    wait_for((here / "run" / "run.json").exists)
    joiner = in_child("joiner", join, run="run")
    wait_for(lambda: sum(pid == str(joiner) for pid, _ in evaluated()) >= after)
    os.kill(joiner, signal.SIGKILL)
    assert (ended(leader), ended(joiner)) == (0, -9), told("leader")
    assert_none_lost_or_doubled(killed=1)


@pytest.mark.slow
def test_where_it_is_killed_before_the_study_another_goes_on(here):
    leader = in_child("leader", lead)
    wait_for((here / "run" / "statistics.json").exists)
    joiner = in_child("joiner", join, run="run")
    os.kill(leader, signal.SIGKILL)
    assert (ended(leader), ended(joiner)) == (-9, 0), told("joiner")
    assert_none_lost_or_doubled(killed=1)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("whom", [0, 1])
def test_two_commands_on_one_study_one_killed(start, tmp_path, whom):
    """The same through the command line, in processes that share nothing but files."""
    for name in ("data.npz", "mlflow.db"):
        (tmp_path / name).write_bytes((start / name).read_bytes())
    words = [
        "search",
        "--model",
        "tiny",
        "--data",
        "data.npz",
        "--budget",
        "60%",
        "--out",
        "run",
        "--threads",
        "1",
    ]
    words += ["--mixers", ",".join(tiny_search.MIXERS), "--images", "40", "--trials", "60"]
    words += ["--distill-steps", "0", "--finetune-minutes", "0", "--join"]
    processes = [
        subprocess.Popen(
            [sys.executable, SCRIPT, *words],
            cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
        )
        for _ in range(2)
    ]
    storage = f"sqlite:///{tmp_path}/run/study.db"

    def working():
        record = tmp_path / "run" / "run.json"
        if not record.exists() or json.loads(record.read_text()).get("phase") != "study":
            assert [process.poll() for process in processes] == [None, None]
            return set()
        study = optuna.load_study(study_name="run", storage=connect(storage))
        return {
            trial.user_attrs[WORKER]
            for trial in study.get_trials(deepcopy=False)
            if trial.state.name == "COMPLETE"
        }

    try:
        wait_for(lambda: len(working()) == 2)
        processes[whom].kill()
        codes = [process.wait() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert codes[whom] == -9
    assert codes[1 - whom] == 0
    study = optuna.load_study(study_name="run", storage=connect(storage))
    plans = [json.dumps(t.params, sort_keys=True) for t in study.trials if t.state.name == "COMPLETE"]
    assert len(plans) == len(set(plans)) == 60
    check_summary(json.loads((tmp_path / "run" / "summary.json").read_text()))
