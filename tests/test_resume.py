"""A search that is killed at any moment goes on with the same command, and keeps all that it had finished."""

import hashlib
import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
import tiny_search
from tiny_search import check_summary

from mixerzoo.errors import MixerzooError
from mixerzoo.latency import Stopwatch, reuse
from mixerzoo.registry import temporary_plugin
from mixerzoo.tracking import Tracker
from mixerzoo_search import candidates, evaluate, finish, pipeline, search
from mixerzoo_search.run_directory import RunDirectory

SCRIPT = Path(__file__).parent / "tiny_search.py"
TRIALS = 8
COMMAND = [
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
COMMAND += ["--mixers", ",".join(tiny_search.MIXERS), "--images", "40", "--trials", str(TRIALS)]
COMMAND += ["--distill-steps", "4", "--finetune-minutes", "0.004"]

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="starts processes by forking")


@pytest.fixture(scope="module")
def run():
    """Run the command in a folder, and kill it when told to if it still runs; return (exit code, seconds)."""
    with subprocess.Popen(
        [sys.executable, SCRIPT, "serve"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as server:

        def ran(folder, kill=None):
            server.stdin.write(json.dumps([COMMAND, str(folder), kill]) + "\n")
            server.stdin.flush()
            code, took = json.loads(server.stdout.readline())
            return code, took

        yield ran
        server.stdin.close()


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A folder to start from: the data, and an MLflow store, which takes seconds to make."""
    folder = tmp_path_factory.mktemp("start")
    tiny_search.write_npz(folder / "data.npz")
    Tracker(f"sqlite:///{folder}/mlflow.db", "mixerzoo tiny").close()
    (folder / "mlflow.db").rename(folder / "store")
    return folder


@pytest.fixture(scope="module")
def whole(run, start, tmp_path_factory):
    """A run that nobody disturbed, and the seconds it took."""
    folder = prepared(tmp_path_factory.mktemp("whole"), start)
    code, took = run(folder)
    assert code == 0, (folder / "printed.txt").read_text()
    return folder, took


def prepared(folder, start):
    shutil.copy(start / "data.npz", folder)
    shutil.copy(start / "store", folder / "mlflow.db")
    return folder


def index_of(folder):
    return {path.stem: json.loads(path.read_text()) for path in (folder / "library").glob("*.json")}


def library_files(folder):
    """Return key -> (checksum, time of writing) of every candidate that counts as finished; all must be whole."""
    found = {}
    for key, entry in index_of(folder).items():
        file = folder / "library" / f"{key}.safetensors"
        assert hashlib.sha256(file.read_bytes()).hexdigest() == entry["sha256"]
        found[key] = (entry["sha256"], file.stat().st_mtime_ns)
    return found


def finished_trials(folder):
    """Return number -> result of every finished trial."""
    path = folder / "run" / "study.db"
    if not path.exists():
        return {}
    with closing(sqlite3.connect(path)) as database:
        if not database.execute(
            "select 1 from sqlite_master where name = 'trial_user_attributes'"
        ).fetchall():
            return {}
        return dict(
            database.execute(
                "select number, value_json from trials join trial_user_attributes using (trial_id) "
                "where state = 'COMPLETE' and key = 'result'"
            )
        )


def kept(folder):
    """Return name -> content of all that is finished; nothing may ever leave it or change."""
    found = {f"library {key}": value for key, value in library_files(folder).items()}
    found |= {f"trial {number}": value for number, value in finished_trials(folder).items()}
    for path in sorted((folder / "run").rglob("*.json")) if (folder / "run").exists() else ():
        content = json.loads(path.read_text())  # never half of one
        name = str(path.relative_to(folder / "run"))
        if name == "scores.json":
            found |= {f"score {key}": value for key, value in content.items()}
        elif name == "latency.json":
            rows = content["change_ms"].items()
            found |= {
                f"latency {site} {candidate}": ms for site, row in rows for candidate, ms in row.items()
            }
        elif name in ("latency_check.json", "statistics.json"):
            found[name] = content
        elif name == "stepped.json":  # grows round by round
            found |= {f"stepped {at}": pair for at, pair in enumerate(content["chosen"])}
        elif name == "run.json":
            found["identity"] = content["identity"]
            found["teacher_ms"] = content["teacher_ms"]
        elif path.name == "result.json":
            found[name] = (content, path.stat().st_mtime_ns)
    return found


def kill_and_resume(run, folder, moments):
    """Kill the command at each of the moments, starting it anew each time; then let it end. Returns the kills."""
    before, kills = {}, 0
    for moment in [*moments, None]:
        code, _ = run(folder, moment)
        assert code in (0, -9), (folder / "printed.txt").read_text()
        kills += code == -9
        after = kept(folder)
        assert {name: after.get(name) for name in before} == before
        before = after
    assert code == 0
    return kills


def assert_whole(folder, undisturbed):
    """The result is complete, and what it was made of is what the undisturbed run made."""
    summary = json.loads((folder / "run" / "summary.json").read_text())
    check_summary(summary)
    assert summary["met"]
    assert len(finished_trials(folder)) == TRIALS
    for name in ("best/plan.json", "best/model.safetensors", "best/README.md", "report.html", "report.png"):
        assert (folder / "run" / name).stat().st_size > 0
    assert {key: entry["sha256"] for key, entry in index_of(folder).items()} == {
        key: entry["sha256"] for key, entry in index_of(undisturbed).items()
    }
    scores = [json.loads((place / "run" / "scores.json").read_text()) for place in (folder, undisturbed)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)
    with tiny_search.mlflow_client(folder) as client:
        experiments = [found for found in client.search_experiments() if found.name != "Default"]
        assert [found.name for found in experiments] == ["mixerzoo tiny"]
        children = client.search_runs([experiments[0].experiment_id], "tags.`mlflow.parentRunId` != ''")
        parent = client.get_run(json.loads((folder / "run" / "run.json").read_text())["mlflow_run_id"])
    assert parent.info.status == "FINISHED"
    mine = [found for found in children if found.data.tags["mlflow.parentRunId"] == parent.info.run_id]
    finished = [found for found in mine if {"loss", "on_frontier"} <= set(found.data.metrics)]
    assert len({found.info.run_name for found in finished}) >= summary["evaluations"]


def delays_for(seed, kills, took, *, share):
    dice = random.Random(seed)
    return [took * dice.uniform(0.02, 2 * share) for _ in range(kills)]


@needs_fork
@pytest.mark.parametrize("seed", [0])
def test_a_killed_search_goes_on(run, start, whole, tmp_path, seed):
    undisturbed, took = whole
    folder = prepared(tmp_path, start)
    kills = kill_and_resume(run, folder, delays_for(seed, 5, took, share=0.25))
    assert kills >= 3
    assert_whole(folder, undisturbed)


@needs_fork
@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_search_that_is_killed_twenty_times_goes_on(run, start, whole, tmp_path, seed):
    undisturbed, took = whole
    folder = prepared(tmp_path, start)
    kills = kill_and_resume(run, folder, delays_for(seed, 20, took, share=0.1))
    assert kills >= 10
    assert_whole(folder, undisturbed)


# In the order in which a search makes them.
MOMENTS = (
    ".mlflow.db.*.tmp", "mlflow.db", "run/run.json", "run/latency.json", "run/statistics.json",
    "library/*.json", "run/scores.json", "run/stepped.json", "run/latency_check.json", "run/study.db",
    "run/finalists.json", "run/finalists/*/plan.json", "run/best/model.safetensors", "run/report.html",
    "run/summary.json",
)  # fmt: skip


@needs_fork
def test_a_search_goes_on_from_every_phase(run, whole, start, tmp_path):
    undisturbed, _ = whole
    shutil.copy(start / "data.npz", tmp_path)
    kills = kill_and_resume(run, tmp_path, MOMENTS)
    assert kills == len(MOMENTS)
    assert_whole(tmp_path, undisturbed)


@pytest.fixture
def here(start, tmp_path, monkeypatch):
    """A folder of its own, with the tiny host and latency by rule in this process."""
    prepared(tmp_path, start)
    monkeypatch.setattr(Stopwatch, "time", tiny_search.ruled_time)
    with temporary_plugin(tiny_search.TinyPlugin(), name="tiny"):
        yield tmp_path


def go(folder, store="mlflow.db", **changes):
    options = {"mixers": tiny_search.MIXERS, "budget": "60%"} | tiny_search.FAST | {"trials": 4} | changes
    uri = f"sqlite:///{folder}/{store}"
    return search("tiny", folder / "data.npz", tracking_uri=uri, **{"out": folder / "run"} | options)


def mlflow_runs(folder, path):
    """Return the parent run of a run directory and the names of its children."""
    with tiny_search.mlflow_client(folder) as client:
        parent = client.get_run(json.loads((path / "run.json").read_text())["mlflow_run_id"])
        children = client.search_runs(
            [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
        )
    return parent, sorted(found.info.run_name for found in children)


def without_time(summary):
    return {name: value for name, value in summary.items() if name != "wall_s"}


def test_a_finished_search_evaluates_nothing_again(here, monkeypatch):
    first = go(here)
    before = kept(here), mlflow_runs(here, first.path)[1]

    def again(*_, **__):
        raise AssertionError("this was done already")

    for module, name in (
        (candidates, "distill"), (reuse, "measure_in_place"), (finish, "finetune"), (finish, "refit_students"),
        (evaluate.Evaluator, "evaluate"), (evaluate.Evaluator, "final_latency"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, again)
    second = go(here)
    assert without_time(second.summary) == without_time(first.summary)
    assert (kept(here), mlflow_runs(here, second.path)[1]) == before


def test_more_trials_make_a_search_longer(here):
    go(here, trials=2)
    before = kept(here)
    result = go(here, trials=5)
    after = kept(here)
    assert {name: after.get(name) for name in before} == before
    assert len(finished_trials(here)) == 5
    assert result.summary["evaluations"] >= 5
    # Fewer than there are is no reason to throw any away.
    assert go(here, trials=2).summary["evaluations"] >= 5


@pytest.mark.parametrize("moment", ["write_text", "write_report"])
def test_a_longer_search_that_is_killed_leaves_no_student_beside_another_summary(here, monkeypatch, moment):
    first = go(here, trials=2)
    before = {path.name: path.read_bytes() for path in first.best.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, moment, interrupt)
        with pytest.raises(KeyboardInterrupt):
            go(here, trials=5)
    assert not (first.path / "summary.json").exists()
    if moment == "write_text":  # the weights of the new student were written, its card was not
        assert {path.name: path.read_bytes() for path in first.best.iterdir()} == before
    left = first.path / ".best.1.tmp"
    left.mkdir()
    result = go(here, trials=5)
    assert json.loads((result.best / "plan.json").read_text())["plan"] == result.summary["best"]["plan"]
    assert not left.exists()


def test_an_interrupted_search_is_marked_and_goes_on_in_the_same_run(here, monkeypatch):
    evaluate_plan, calls = evaluate.Evaluator.evaluate, []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return evaluate_plan(*args, **kwargs)

    monkeypatch.setattr(evaluate.Evaluator, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        go(here)
    parent, children = mlflow_runs(here, here / "run")
    assert parent.info.status == "KILLED"
    assert len(children) == len(finished_trials(here)) == 2
    result = go(here)
    again, children = mlflow_runs(here, here / "run")
    assert (again.info.run_id, again.info.status) == (parent.info.run_id, "FINISHED")
    assert len(children) == result.summary["evaluations"]
    plans = [args[1] for args in calls]
    done = plans[:2] + plans[3:]  # the third was in flight
    assert len(set(done)) == len(done)


def test_a_plan_whose_logging_was_killed_is_logged(here, monkeypatch):
    log = Tracker._log

    def killed(self, run_id, *, params=None, metrics=None, **step):
        if metrics and "loss" in metrics:
            raise KeyboardInterrupt
        log(self, run_id, params=params, metrics=metrics, **step)

    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "_log", killed)
        with pytest.raises(KeyboardInterrupt):
            go(here)
    parent, left = mlflow_runs(here, here / "run")
    assert len(left) == len(finished_trials(here)) == 1
    go(here)
    with tiny_search.mlflow_client(here) as client:
        children = client.search_runs(
            [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
        )
    with_figures = [child.info.run_name for child in children if "loss" in child.data.metrics]
    assert left[0] in with_figures
    assert len(with_figures) == len(set(with_figures))


def test_a_study_of_another_search_is_refused_before_anything_is_measured(here):
    storage = f"sqlite:///{here}/shared.db"
    first = go(here, trials=2, storage=storage)
    with pytest.raises(MixerzooError, match="has a study 'run' of another search; give a run directory"):
        go(here, out=here / "other" / "run", budget="70%", storage=storage)
    assert not (here / "other").exists()
    assert without_time(go(here, trials=2, storage=storage).summary) == without_time(first.summary)


def move_elsewhere(folder, **changes):
    """Let a run be one of another machine."""
    run = RunDirectory(folder / "run")
    run.note(environment=run.record()["environment"] | {"device_name": "another"} | changes)


@pytest.mark.parametrize("changes", [{}, {"versions": {"torch": "1.0"}}])
def test_a_search_does_not_go_on_on_another_machine(here, monkeypatch, changes):
    with monkeypatch.context() as patch:
        patch.setattr(evaluate.Evaluator, "evaluate", interrupt)
        with pytest.raises(KeyboardInterrupt):
            go(here)
    move_elsewhere(here, **changes)
    before = all_files(here)
    with pytest.raises(MixerzooError) as raised:
        go(here)
    for text in ("are those of another machine (", " there, ", f"--from {here / 'run'} and another --out"):
        assert text in str(raised.value)
    assert "\n" not in str(raised.value)
    assert raised.value.exit_code == 2
    assert all_files(here) == before


def interrupt(*_, **__):
    raise KeyboardInterrupt


def all_files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_finished_search_answers_on_another_machine_and_is_made_no_longer_there(here):
    first = go(here, trials=2)
    move_elsewhere(here)
    before = all_files(here)
    assert go(here, trials=2).summary == first.summary
    with pytest.raises(MixerzooError, match="are those of another machine"):
        go(here, trials=3)
    assert all_files(here) == before


def test_a_run_that_does_not_say_where_it_was_measured_goes_on(here):
    first = go(here, trials=2)
    record = json.loads((first.path / "run.json").read_text())
    del record["environment"]
    (first.path / "run.json").write_text(json.dumps(record))
    assert without_time(go(here, trials=2).summary) == without_time(first.summary)


def spoil(teacher, students, batches, *, on_site):
    """Stand in for a refit that makes students worse."""
    for one in students:
        for site in one.mixers:
            for parameter in one.student.get_submodule(site).parameters():
                parameter.data.mul_(-3)


@pytest.mark.parametrize("worse", [False, True])
@pytest.mark.parametrize(
    ("moment", "judged"), [("_better", 0), ("_better", 1), ("write_json", 0), ("write_json", 1)]
)
def test_refits_outlive_a_process_that_is_killed_while_they_are_judged(
    here, monkeypatch, moment, judged, worse
):
    if worse:
        monkeypatch.setattr(finish, "refit_students", spoil)
    options = {"finetune_minutes": 0}  # those lead somewhere else on a busy machine
    whole = go(here, out=here / "whole", **options)
    sources = [
        json.loads(path.read_text())["source"] for path in (here / "whole/finalists").glob("*/result.json")
    ]
    assert ("refit" in sources) != worse
    undisturbed, calls = getattr(finish, moment), []

    def interrupted(*args):
        calls.append(args)
        if len(calls) > judged:
            raise KeyboardInterrupt
        return undisturbed(*args)

    monkeypatch.setattr(finish, moment, interrupted)
    with pytest.raises(KeyboardInterrupt):
        go(here, **options)
    folders = list((here / "run/finalists").iterdir())
    assert len(folders) > 1
    assert sum((folder / "result.json").exists() for folder in folders) == judged

    def again(*_, **__):
        raise AssertionError("they were refitted already")

    monkeypatch.setattr(finish, moment, undisturbed)
    monkeypatch.setattr(finish, "refit_students", again)
    resumed = go(here, **options)
    assert resumed.summary["best"] == whole.summary["best"]
    for folder in folders:
        for name in ("model.safetensors", "result.json"):
            assert (folder / name).read_bytes() == (
                here / "whole/finalists" / folder.name / name
            ).read_bytes()


def test_a_new_mlflow_store_gets_everything(here, start):
    first = go(here)
    shutil.copy(start / "store", here / "mlflow.db")
    second = go(here)
    assert without_time(second.summary) == without_time(first.summary)
    parent, children = mlflow_runs(here, second.path)
    assert parent.info.status == "FINISHED"
    assert len(children) == second.summary["evaluations"]


def test_what_a_killed_process_left_behind_breaks_nothing(here):
    first = go(here, trials=2)
    key = next(iter(index_of(here)))
    for folder in ("run", "library", "run/best", "run/finalists"):
        for name in (".run.json.1.tmp", ".summary.json.2.tmp", f".{key}.safetensors.3.tmp"):
            (here / folder / name).write_bytes(b'{"half": ')
    (here / "library" / f"{key}.lock").write_bytes(b"")
    (here / "library" / f"{key[::-1]}.safetensors").write_bytes(b"")
    (here / "library" / "stranger.json").write_bytes(b"")
    (here / "run" / "finalists" / "half").mkdir()
    (here / ".mlflow.db.4.tmp").write_bytes(b"half")
    assert without_time(go(here, trials=2).summary) == without_time(first.summary)


def test_a_candidate_whose_entry_is_damaged_is_made_again_and_no_other(here, distilled):
    first = go(here, trials=2)
    before = library_files(here)
    key = next(key for key, entry in index_of(here).items() if entry["params"])
    (here / "library" / f"{key}.json").write_text('{"half": ')
    distilled.clear()
    second = go(here, trials=2)
    assert len(distilled) == 1
    after = library_files(here)
    assert {name: sha for name, (sha, _) in after.items()} == {name: sha for name, (sha, _) in before.items()}
    assert [name for name in after if after[name] != before[name]] == [key]
    assert without_time(second.summary) == without_time(first.summary)


# One library for several runs


@pytest.fixture
def distilled(monkeypatch):
    """Gradient steps of every candidate that is distilled from here on."""
    made, distill = [], candidates.distill

    def recorded(spec, width, site, captured, recipe, *, start=None, wider=None, targets=None):
        made.append(recipe.steps)
        return distill(spec, width, site, captured, recipe, start=start, wider=wider, targets=targets)

    monkeypatch.setattr(candidates, "distill", recorded)
    return made


def test_another_run_takes_its_candidates_from_the_library(here, distilled):
    first = go(here)
    assert json.loads((first.path / "run.json").read_text())["library"] == "../library"
    assert 0 in distilled
    before = library_files(here)
    distilled.clear()
    go(here, out=here / "other", budget="80%")
    assert 0 not in distilled
    assert before.items() <= library_files(here).items()
    go(here, out=here / "third", seed=1, trials=2)
    assert 0 in distilled


def test_what_a_search_finds_does_not_depend_on_what_is_in_the_library(here, distilled):
    options = {"finetune_minutes": 0}
    go(here, out=here / "wide", budget="50%", **options)
    go(here, out=here / "narrow", budget="80%", **options)
    made = list(distilled)
    shared = go(here, out=here / "shared", **options)
    assert len(distilled) - len(made) < len(made)
    own = go(here, out=here / "own", library=here / "empty", **options)
    assert (shared.path / "stepped.json").read_text() == (own.path / "stepped.json").read_text()
    scores = [json.loads((result.path / "scores.json").read_text()) for result in (shared, own)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)
    assert shared.summary["best"]["plan"] == own.summary["best"]["plan"]


def test_a_run_goes_on_with_the_library_that_it_was_given_or_with_another_one(here, distilled):
    first = go(here, trials=2, library=here / "far" / "mine")
    record = json.loads((first.path / "run.json").read_text())
    assert record["library"] == "../far/mine"
    number = len(distilled)
    assert without_time(go(here, trials=2).summary) == without_time(first.summary)
    assert len(distilled) == number
    assert not (here / "library").exists()
    assert without_time(go(here, trials=2, library=here / "new").summary) == without_time(first.summary)
    assert len(distilled) == 2 * number
    assert RunDirectory(first.path).library == here / "new"


def test_a_run_outside_the_folder_of_its_library_names_it_in_full(here, tmp_path_factory):
    library = tmp_path_factory.mktemp("elsewhere") / "library"
    first = go(here, trials=2, library=library)
    assert json.loads((first.path / "run.json").read_text())["library"] == str(library)


def test_something_else_is_not_taken_for_a_library(here):
    (here / "library").mkdir()
    (here / "library" / "module.py").write_text("")
    with pytest.raises(MixerzooError, match="library' holds something else; give another --library"):
        go(here)
    with pytest.raises(MixerzooError, match=r"data\.npz' holds something else"):
        go(here, library=here / "data.npz")
    with pytest.raises(MixerzooError, match="is the library's; give another --out or --library"):
        go(here, library=here / "run")
    assert not (here / "run").exists()
    assert [path.name for path in (here / "library").iterdir()] == ["module.py"]


@needs_fork
@pytest.mark.slow
def test_two_searches_at_the_same_time_make_every_candidate_once(start, whole, tmp_path):
    undisturbed, _ = whole
    commands = []
    for name in ("run", "other"):
        words = [*COMMAND, "--library", "library"]
        words[words.index("run")] = name
        words += ["--tracking-uri", f"sqlite:///{tmp_path}/{name}.db"]
        shutil.copy(start / "store", tmp_path / f"{name}.db")
        commands.append(words)
    shutil.copy(start / "data.npz", tmp_path)
    processes = [
        subprocess.Popen(
            [sys.executable, SCRIPT, *words],
            cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
        )
        for words in commands
    ]
    assert [process.wait() for process in processes] == [0, 0]
    made = {key: sha for key, (sha, _) in library_files(tmp_path).items()}
    assert made == {key: sha for key, (sha, _) in library_files(undisturbed).items()}
    scores = [json.loads((tmp_path / name / "scores.json").read_text()) for name in ("run", "other")]
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)
