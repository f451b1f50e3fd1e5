"""What a search needs to take seconds: a host that knows the tiny teacher by name, its data, and latency by rule.

Run as a script it is the command line with that host in it: tests that kill a search need a process of their own.
"""

import json
import math
import os
import signal
import sys
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import tiny
from mlflow import MlflowClient

from mixerzoo import hookimpl
from mixerzoo.errors import MixerzooError
from mixerzoo.hosts import Replacement, count_params
from mixerzoo.hosts.timm_vit import TimmVitHost
from mixerzoo.latency import REFERENCE, Stopwatch, Timing
from mixerzoo.plan import Plan
from mixerzoo.registry import temporary_plugin
from mixerzoo_search.pareto import non_dominated

MIXERS = ("static", "pool", "linear", "none", "mlp_slice")
# Enough for every phase to have something to do.
FAST = {"trials": 10, "images": 40, "distill_steps": 4, "finetune_minutes": 0.004, "threads": 1}
OUTSIDE_MS, ATTENTION_MS, MLP_MS = 0.5, 1.0, 0.8
CLASSES = 10

ROW = {"plan", "latency_ms", "predicted_ms", "params", "accuracy", "agreement", "loss"}
PHASES = {"capture", "distill", "latency", "score", "exact", "study", "finetune"}


class TinyHost(TimmVitHost):
    """Loads `tiny` and, without a head, `tiny_embedding`; everything else is timm's."""

    name = "tiny"

    def model_names(self):
        return ("tiny", "tiny_embedding")

    def load(self, name, checkpoint):
        if checkpoint is not None:
            raise MixerzooError("the tiny model has its own weights")
        return tiny.tiny_vit(num_classes=CLASSES if name == "tiny" else 0)

    def accepts(self, model):
        return False

    def architecture(self, model):
        return {"model": "tiny", "num_classes": model.num_classes}

    def create(self, architecture):
        return tiny.tiny_vit(num_classes=architecture["num_classes"])


class TinyPlugin:
    @hookimpl
    def register_hosts(self, register):
        register(TinyHost())


def pictures(count=80, *, seed=0):
    """Return smooth random images (count, 16, 16), uint8."""
    images = tiny.tiny_images(count, seed=seed)[:, 0].numpy()
    return np.clip(128 + 50 * images, 0, 255).astype(np.uint8)


def write_npz(path, *, count=80, labels=True):
    """Write pictures as an .npz file, with labels (which are random) or without."""
    arrays = {"x": pictures(count)}
    if labels:
        arrays["y"] = np.arange(count) % CLASSES
    np.savez(path, **arrays)
    return path


def ruled_ms(model):
    """Return a latency that follows from a student's modules alone."""
    ms = OUTSIDE_MS
    for block in model.blocks:
        for module, own in ((block.attn, ATTENTION_MS), (block.mlp, MLP_MS)):
            if isinstance(module, Replacement):
                ms += own * (0.05 + 0.9 * min(1.0, count_params(module) / 6000))
            else:
                ms += own
    return ms


def ruled_time(self, students, *, rounds=None, on_round=lambda done: None):
    """Stand in for Stopwatch.time: every student runs once, and takes what the rule says."""
    del rounds
    base = ruled_ms(self.teacher.model)
    found = {REFERENCE: Timing(median=base, low=base, high=base, ratio=1.0, error=0.0)}
    for name, model in students.items():
        self.prepare(model)()
        ms = ruled_ms(model)
        found[name] = Timing(median=ms, low=ms, high=ms, ratio=ms / base, error=0.0)
    on_round(1)
    return found


@contextmanager
def tiny_world():
    """The tiny host is registered, latency follows a rule, and MLflow is where a command says."""
    with pytest.MonkeyPatch.context() as patch, temporary_plugin(TinyPlugin(), name="tiny"):
        patch.setattr(Stopwatch, "time", ruled_time)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield


def check_row(row, *, sites, labelled=True):
    assert set(row) == ROW
    assert list(row["plan"]) == sites
    Plan.from_json(row["plan"])
    assert row["latency_ms"] > 0
    assert row["predicted_ms"] > 0
    assert isinstance(row["params"], int)
    assert row["params"] > 0
    assert 0 <= row["agreement"] <= 1
    assert row["loss"] >= 0
    assert (0 <= row["accuracy"] <= 1) if labelled else row["accuracy"] is None


def check_summary(summary, *, labelled=True):
    """The schema: exactly these keys, numbers that JSON has, latencies above 0, fractions in [0, 1]."""
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert set(summary) == {
        "schema", "teacher", "budget_ms", "met", "best", "test", "pareto", "hypervolume", "evaluations",
        "latency_model", "score_model", "finetuning", "wall_s", "environment",
    }  # fmt: skip
    teacher = summary["teacher"]
    assert set(teacher) == {"name", "sites", "params", "latency_ms", "accuracy"}
    assert summary["schema"] == 1
    assert isinstance(teacher["sites"], int)
    assert isinstance(teacher["params"], int)
    assert teacher["latency_ms"] > 0
    assert (0 <= teacher["accuracy"] <= 1) if labelled else teacher["accuracy"] is None
    assert summary["budget_ms"] > 0
    assert summary["met"] is (summary["best"] is not None)
    sites = list(summary["pareto"][0]["plan"])
    assert len(sites) == teacher["sites"]
    rows = summary["pareto"] + ([summary["best"]] if summary["met"] else [])
    for row in rows:
        check_row(row, sites=sites, labelled=labelled)
    front = [(row["latency_ms"], row["loss"]) for row in summary["pareto"]]
    assert front == sorted(front)
    assert len(non_dominated(front)) == len(front)
    assert set(summary["test"]) == {"images", "accuracy_interval"}
    assert summary["test"]["images"] > 0
    if labelled and summary["met"]:
        low, high = summary["test"]["accuracy_interval"]
        assert -1 <= low < high <= 1
    else:
        assert summary["test"]["accuracy_interval"] is None
    assert 0 <= summary["hypervolume"] <= 1
    assert isinstance(summary["evaluations"], int)
    assert summary["evaluations"] >= len(front)
    assert set(summary["latency_model"]) == {"mape", "max_error", "spearman", "plans"}
    assert 0 <= summary["latency_model"]["mape"] <= summary["latency_model"]["max_error"]
    assert summary["latency_model"]["plans"] >= 20
    assert set(summary["score_model"]) == {"spearman", "plans"}
    for model in ("latency_model", "score_model"):
        assert -1 <= summary[model]["spearman"] <= 1
    tuned = summary["finetuning"]
    assert set(tuned) == {"plans", "seconds", "spearman", "rounds"}
    assert tuned["spearman"] is None or -1 <= tuned["spearman"] <= 1
    assert [len(row["plans"]) for row in tuned["rounds"][:1]] == ([tuned["plans"]] if tuned["plans"] else [])
    assert set(summary["wall_s"]) == PHASES | {"total"}
    assert all(seconds >= 0 for seconds in summary["wall_s"].values())
    assert math.isclose(summary["wall_s"]["total"], sum(summary["wall_s"][name] for name in PHASES))
    assert {"device", "threads", "dtype", "batch_size", "runtime", "versions"} <= set(summary["environment"])


@contextmanager
def mlflow_client(folder):
    """Look into the store that a search left in a folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of what MLflow is made of
        client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    yield client
    client._tracking_client.store.engine.dispose()


def main(arguments):
    """Run the command line with the tiny host, and latency by rule."""
    from mixerzoo.cli import main as cli

    Stopwatch.time = ruled_time
    with temporary_plugin(TinyPlugin(), name="tiny"):
        cli(arguments)


def import_all():
    """Import what a search imports on its way, and let timm make its list of models."""
    import matplotlib.pyplot
    import optuna.storages
    from mlflow.store.tracking import sqlalchemy_store

    from mixerzoo.opening import open_teacher
    from mixerzoo_search import exact, pipeline

    del matplotlib, optuna, sqlalchemy_store, exact, pipeline
    with temporary_plugin(TinyPlugin(), name="tiny"):
        open_teacher("tiny")


def serve():
    """Run commands read from standard input in processes of their own, which need no imports any more.

    A line in is JSON: the arguments, the folder to run in, and when to kill: after so many seconds, as soon as a
    file of this pattern is there, or null. A line out is JSON: the exit code (or minus the signal), and the
    seconds it took.
    """
    import_all()
    for line in sys.stdin:
        arguments, folder, when = json.loads(line)
        began = time.monotonic()
        child = os.fork()
        if not child:
            code = 1
            try:
                os.chdir(folder)
                with open("printed.txt", "ab") as printed:
                    os.dup2(printed.fileno(), 1)
                    os.dup2(printed.fileno(), 2)
                main(arguments)
            except SystemExit as end:
                code = end.code or 0
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        done, status = os.waitpid(child, os.WNOHANG)
        while not done:
            spent = time.monotonic() - began
            due = any(Path(folder).glob(when)) if isinstance(when, str) else when is not None and spent > when
            if due:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.002)
            done, status = os.waitpid(child, os.WNOHANG)
        print(json.dumps([os.waitstatus_to_exitcode(status), time.monotonic() - began]), flush=True)


if __name__ == "__main__":
    if sys.argv[1:] == ["serve"]:
        serve()
    else:
        main(sys.argv[1:])
