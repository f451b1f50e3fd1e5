"""What people see, in a browser: the report of a search, offline, and its runs in the pages of MLflow."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from html import unescape
from urllib.parse import quote

import pytest
import tiny_search
from click.testing import CliRunner

from mixerzoo.cli import main

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next((path for name in BROWSERS if (path := shutil.which(name))), None)
OFFLINE = "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"
COMPARED = 4  # runs
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason=f"there is none of {', '.join(BROWSERS)}"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The directory of a finished search; its store is `mlflow.db` beside it."""
    folder = tmp_path_factory.mktemp("browser")
    words = [
        *("search", "--budget", "60%", "--model", "tiny", "--out", str(folder / "run"), "--quiet"),
        *("--data", str(tiny_search.write_npz(folder / "data.npz"))),
        *("--tracking-uri", f"sqlite:///{folder / 'mlflow.db'}", "--mixers", ",".join(tiny_search.MIXERS)),
    ]
    for name, value in tiny_search.FAST.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    with tiny_search.tiny_world():
        result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    return folder / "run"


def shown(url, folder, *, until):
    """Return the text of the page once it has all of `until`, and the document that the browser made of it."""
    text = page = ""
    for wait_ms in (5_000, 20_000, 60_000):  # of the page's own clock
        page = subprocess.run(
            [
                *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", OFFLINE),
                *(f"--user-data-dir={folder}", f"--virtual-time-budget={wait_ms}", "--dump-dom", url),
            ],
            capture_output=True,
            text=True,
            timeout=300,
            check=True,
        ).stdout
        body = re.sub(r"<(script|style)\b.*?</\1>", " ", page, flags=re.DOTALL)
        text = " ".join(unescape(re.sub(r"<[^>]*>", " ", body)).split())
        if all(word in text for word in until):
            break
    missing = [word for word in until if word not in text]
    assert not missing, f"{url} does not show {missing}: {text[:2000]}"
    return text, page


def test_the_report_shows_the_frontier_without_a_network(run, tmp_path):
    summary = json.loads((run / "summary.json").read_text())
    _, page = shown((run / "report.html").as_uri(), tmp_path, until=["tiny", f"{summary['budget_ms']:.3g}"])
    marks = page.count('class="point"')  # what plotly draws for every mark
    assert marks >= summary["evaluations"], "the evaluations are not drawn"
    assert len(summary["pareto"]) > 1


@contextlib.contextmanager
def served(store):
    """Serve a store on loopback; yields the address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store, "--workers", "1"]
    server = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            with contextlib.suppress(urllib.error.URLError, OSError):
                urllib.request.urlopen(f"{address}/health", timeout=5).close()
                break
            assert server.poll() is None, "the server has ended"
            time.sleep(0.2)
        yield address
    finally:
        os.killpg(server.pid, signal.SIGTERM)  # its workers too
        server.wait(30)


def test_mlflow_shows_the_runs_side_by_side(run, tmp_path):
    store = f"sqlite:///{run.parent / 'mlflow.db'}"
    with tiny_search.mlflow_client(run.parent) as client:
        (experiment,) = [e for e in client.search_experiments() if e.name != "Default"]
        runs = client.search_runs([experiment.experiment_id])
    parent = next(r for r in runs if "mlflow.parentRunId" not in r.data.tags)
    children = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id][:COMPARED]
    assert len(children) == COMPARED
    site = next(name for name in children[0].data.params if name.startswith("blocks."))
    with served(store) as address:
        shown(
            f"{address}/#/experiments/{experiment.experiment_id}",
            tmp_path / "list",
            until=[experiment.name, parent.info.run_name],
        )
        ids, experiments = (
            quote(json.dumps(row, separators=(",", ":")))
            for row in ([r.info.run_id for r in children], [experiment.experiment_id])
        )
        shown(
            f"{address}/#/compare-runs?runs={ids}&experiments={experiments}",
            tmp_path / "compare",
            until=["Parallel Coordinates Plot", site, *(r.info.run_name for r in children)],
        )
