from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mixerzoo.errors import MixerzooError
from mixerzoo.plan import Candidate, Plan
from mixerzoo.tracking import PARENT_TAG, Tracker, open_ui, resolve_uri

PLAN = Plan.from_json({"blocks.0.attn": "keep", "blocks.1.attn": "static@1", "blocks.2.attn": "static@0.5"})


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


@pytest.fixture(scope="module")
def tracker(store: str) -> Iterator[Tracker]:
    made = Tracker(store, "digits")
    yield made
    made.close()


def test_a_search_becomes_a_parent_and_its_plans_children(tracker: Tracker, tmp_path: Path) -> None:
    parent = tracker.start_parent("vit-5ms", {"budget_ms": 5.0, "seed": 0}, {"teacher": "vit"})
    child = tracker.log_child(
        parent,
        "A1-S2",
        plan=PLAN,
        short_name="A1-S2",
        metrics={"loss": 0.1, "accuracy": None, "latency_ms": 4.5, "agreement": float("nan")},
        tags={"source": "exact"},
    )
    tracker.update_child_metric(child, "on_frontier", 1.0)
    report = tmp_path / "report.html"
    report.write_text("<p>hello")
    folder = tmp_path / "best"
    folder.mkdir()
    (folder / "plan.json").write_text(json.dumps(PLAN.to_json()))
    tracker.log_artifacts(parent, [report, folder, tmp_path / "missing.png"])
    tracker.finish(parent, metrics={"hypervolume": 1.5})

    client = tracker._client
    run = client.get_run(child)
    assert run.data.tags[PARENT_TAG] == parent
    assert run.data.tags["source"] == "exact"
    assert run.data.params == {
        "plan": "A1-S2",
        "count.keep": "1",
        "count.static": "2",
        "blocks.0.attn": "keep",
        "blocks.1.attn": "static@1",
        "blocks.2.attn": "static@0.5",
    }
    assert run.data.metrics == {"loss": 0.1, "latency_ms": 4.5, "on_frontier": 1.0}
    assert run.info.status == "FINISHED"
    run = client.get_run(parent)
    assert run.data.params == {"budget_ms": "5.0", "seed": "0"}
    assert run.data.metrics == {"hypervolume": 1.5}
    assert run.info.status == "FINISHED"
    assert {item.path for item in client.list_artifacts(parent)} == {"report.html", "best"}
    assert [item.path for item in client.list_artifacts(parent, "best")] == ["best/plan.json"]
    artifacts = Path(tracker.uri.removeprefix("sqlite:///")).parent / "mlartifacts"
    assert (artifacts / "digits" / parent / "artifacts" / "report.html").exists()


def test_a_parent_is_resumed(tracker: Tracker) -> None:
    parent = tracker.start_parent("again", {})
    child = tracker.log_child(parent, "first", plan=PLAN, short_name="A1-S2", metrics={})
    tracker.finish(parent, "KILLED")
    other = Tracker(tracker.uri, "digits")
    assert other.resume_parent(parent)
    assert other._client.get_run(parent).info.status == "RUNNING"
    assert other.children(parent) == {"first": child}
    assert not other.resume_parent("0" * 32)
    elsewhere = Tracker(tracker.uri, "another experiment")
    assert not elsewhere.resume_parent(parent)


def test_a_child_that_a_killed_process_left_without_figures_does_not_count(tracker: Tracker) -> None:
    parent = tracker.start_parent("killed", {})
    tracker._client.create_run(tracker.experiment_id, run_name="half", tags={PARENT_TAG: parent})
    whole = tracker.log_child(parent, "whole", plan=PLAN, short_name="A1-S2", metrics={})
    assert tracker.children(parent) == {"whole": whole}


def test_more_sites_than_mlflow_takes_at_once(tracker: Tracker) -> None:
    plan = Plan(tuple((f"layer[{at}].attn", Candidate("static")) for at in range(250)))
    parent = tracker.start_parent("large", {f"p{at}": "x" * 7000 for at in range(120)})
    child = tracker.log_child(parent, "c", plan=plan, short_name="S250", metrics={"loss": 1.0})
    assert len(tracker._client.get_run(child).data.params) == 252
    params = tracker._client.get_run(parent).data.params
    assert len(params) == 120
    assert len(params["p0"]) == 6000


def test_a_deleted_experiment_is_restored(store: str, tracker: Tracker) -> None:
    first = Tracker(store, "deleted")
    first._client.delete_experiment(first.experiment_id)
    assert Tracker(store, "deleted").experiment_id == first.experiment_id


def test_an_unreachable_server_is_named_at_once() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(MixerzooError, match=rf"http://me:\*\*\*@127.0.0.1:{port}'.*--tracking-uri") as caught:
        Tracker(f"http://me:secret@127.0.0.1:{port}", "digits")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("uri", ["sqlite:////no/such/folder/mlflow.db", "nonsense://x"])
def test_a_bad_store_is_one_line(uri: str) -> None:
    with pytest.raises(MixerzooError, match=uri) as caught:
        Tracker(uri, "digits")
    assert "\n" not in str(caught.value)


def test_a_failed_upload_names_the_store(
    tracker: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full\nand more")

    parent = tracker.start_parent("upload", {})
    monkeypatch.setattr(tracker._client, "log_artifact", fail)
    file = tmp_path / "x.txt"
    file.write_text("x")
    with pytest.raises(
        MixerzooError, match=r"cannot upload artifacts to the MLflow store .*mlflow.db': disk full;"
    ):
        tracker.log_artifacts(parent, [file])


def test_the_default_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert resolve_uri(None) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server")
    assert resolve_uri(None) == "http://server"
    assert resolve_uri("sqlite:///x.db") == "sqlite:///x.db"


def test_a_new_store_is_made_without_a_word(tmp_path: Path) -> None:
    code = """
        import mlflow.tracking  # noqa
        from mixerzoo.tracking import Tracker
        tracker = Tracker(None, "digits")
        tracker.finish(tracker.start_parent("p", {}))
        assert mlflow.active_run() is None
    """
    environment = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "mlflow.db").exists()


def test_the_module_is_light() -> None:
    code = "import sys, mixerzoo.tracking; sys.exit('mlflow' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_ui_says_why_it_cannot_start(store: str, tracker: Tracker, tmp_path: Path) -> None:
    with pytest.raises(MixerzooError, match="run `mixerzoo search` first"):
        open_ui(f"sqlite:///{tmp_path}/none.db", 5000)
    with pytest.raises(MixerzooError, match="open it in a browser"):
        open_ui("http://127.0.0.1:9", 5000)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(MixerzooError, match=f"port {port} is taken"):
            open_ui(store, port)


def test_the_ui_is_the_light_one_on_this_machine_only(
    store: str, tracker: Tracker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[tuple[list[str], dict[str, str]]] = []

    def call(command: list[str], env: dict[str, str]) -> int:
        calls.append((command, env))
        return len(calls) - 1

    monkeypatch.setattr(subprocess, "call", call)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    open_ui(store, port)
    assert f"http://127.0.0.1:{port}/" in capsys.readouterr().out
    command, env = calls[0]
    assert command[-8:] == [
        "--workers",
        "1",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--backend-store-uri",
        store,
    ]
    assert env["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
    with pytest.raises(MixerzooError, match="exit code 1"):
        open_ui(store, port)
