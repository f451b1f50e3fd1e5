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

from mixerzoo.latency import Stopwatch
from mixerzoo.registry import temporary_plugin
from mixerzoo_search import candidates, evaluate, finish, search, timing

SCRIPT = Path(__file__).parent / "tiny_search.py"
TRIALS = 8
COMMAND = ["search", "--model", "tiny", "--data", "data.npz", "--budget", "60%", "--out", "run", "--threads", "1"]
COMMAND += ["--mixers", ",".join(tiny_search.MIXERS), "--images", "40", "--trials", str(TRIALS)]
COMMAND += ["--distill-steps", "4", "--finetune-minutes", "0.004"]

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="starts processes by forking")


@pytest.fixture(scope="module")
def run():
    """Run a command in a folder, and kill it after some seconds if it still runs; return (exit code, seconds)."""
    with subprocess.Popen(
        [sys.executable, SCRIPT, "serve"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as server:

        def ran(folder, seconds=None):
            server.stdin.write(json.dumps([COMMAND, str(folder), seconds]) + "\n")
            server.stdin.flush()
            code, took = json.loads(server.stdout.readline())
            return code, took

        yield ran
        server.stdin.close()


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """A run that nobody disturbed, and the seconds it took."""
    folder = tmp_path_factory.mktemp("whole")
    tiny_search.write_npz(folder / "data.npz")
    code, took = run(folder)
    assert code == 0, (folder / "printed.txt").read_text()
    return folder, took


def index_of(folder):
    path = folder / "run" / "library" / "index.json"
    return json.loads(path.read_text()) if path.exists() else {}


def library_files(folder):
    """Return key -> (checksum, time of writing) of every candidate that counts as finished; all must be whole."""
    found = {}
    for key, entry in index_of(folder).items():
        file = folder / "run" / "library" / f"{key}.safetensors"
        assert hashlib.sha256(file.read_bytes()).hexdigest() == entry["sha256"]
        found[key] = (entry["sha256"], file.stat().st_mtime_ns)
    return found


def finished_trials(folder):
    """Return number -> result of every finished trial."""
    path = folder / "run" / "study.db"
    if not path.exists():
        return {}
    with closing(sqlite3.connect(path)) as database:
        if not database.execute("select 1 from sqlite_master where name = 'trial_user_attributes'").fetchall():
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
        elif name in ("latency.json", "latency_check.json", "statistics.json", "stepped.json"):
            found[name] = content
        elif name == "run.json":
            found["identity"] = content["identity"]
            found["teacher_ms"] = content["teacher_ms"]
        elif path.name == "result.json":
            found[name] = (content, path.stat().st_mtime_ns)
    return found


def kill_and_resume(run, folder, delays):
    """Kill the command after each of the delays, starting it anew each time; then let it end. Returns the kills."""
    before, kills = {}, 0
    for delay in delays:
        code, _ = run(folder, delay)
        assert code in (0, -9), (folder / "printed.txt").read_text()
        kills += code == -9
        after = kept(folder)
        print('KILL', code, len(after), len(finished_trials(folder)), [p.name for p in folder.iterdir()])
        assert {name: after.get(name) for name in before} == before
        before = after
        if code == 0:
            break
    code, _ = run(folder)
    assert code == 0, (folder / "printed.txt").read_text()
    after = kept(folder)
    assert {name: after.get(name) for name in before} == before
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
    finished = [found for found in mine if "on_frontier" in found.data.metrics]
    assert len({found.info.run_name for found in finished}) >= summary["evaluations"]


def delays_for(seed, kills, took, *, share):
    dice = random.Random(seed)
    return [took * dice.uniform(0.02, 2 * share) for _ in range(kills)]


@needs_fork
@pytest.mark.parametrize("seed", [0])
def test_a_killed_search_goes_on(run, whole, tmp_path, seed):
    undisturbed, took = whole
    shutil.copy(undisturbed / "data.npz", tmp_path)
    kills = kill_and_resume(run, tmp_path, delays_for(seed, 5, took, share=0.25))
    assert kills >= 3
    assert_whole(tmp_path, undisturbed)


@needs_fork
@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_search_that_is_killed_twenty_times_goes_on(run, whole, tmp_path, seed):
    undisturbed, took = whole
    shutil.copy(undisturbed / "data.npz", tmp_path)
    kills = kill_and_resume(run, tmp_path, delays_for(seed, 20, took, share=0.1))
    assert kills >= 10
    assert_whole(tmp_path, undisturbed)
