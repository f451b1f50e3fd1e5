"""`mixerzoo compare`: what was measured, side by side, and a warning for everything that may not be compared."""

import io
import json
import shutil
from pathlib import Path

import pytest
import tiny_run
import tiny_search
from click.testing import CliRunner
from PIL import Image
from tiny_run import refused

from mixerzoo.cli import main
from mixerzoo.compare.comparison import compare, short_names
from mixerzoo.compare.picture import compare_picture
from mixerzoo.export.run import export_student
from mixerzoo.figures import read_figures
from mixerzoo.files import write_json
from mixerzoo.student_source import find_student


@pytest.fixture(scope="module", autouse=True)
def _tiny_world():
    with tiny_search.tiny_world():
        yield


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with two runs of one teacher on the same data."""
    monkeypatch.chdir(tmp_path)
    tiny_run.write_run("runs/one")
    tiny_run.write_run("runs/two", choices={"blocks.0.attn": "none@1"}, latency_ms=2.05, accuracy=0.8)
    return tmp_path


def run(*words):
    return CliRunner().invoke(main, ["compare", *words], catch_exceptions=False)


def told(*words):
    result = run(*words, "--json")
    assert result.exit_code == 0, (result.stderr, result.exception)
    assert result.stderr == ""
    return json.loads(result.stdout)


def test_runs_are_side_by_side(here):
    found = told("runs/one", "runs/two")
    assert found["notes"] == []
    one, two = found["students"]
    assert (one["name"], two["name"]) == ("one", "two")
    assert (one["accuracy"], two["accuracy"]) == (0.9, 0.8)
    assert one["share"] == pytest.approx(3.0 / 4.1)
    assert two["share"] == pytest.approx(0.5)
    assert (one["replaced"], two["replaced"], one["sites"]) == (3, 1, 4)
    for row in found["students"]:
        size = (here / row["path"] / "best" / "model.safetensors").stat().st_size
        assert row["mib"] == pytest.approx(size / 2**20, abs=1e-3)
        summary = json.loads((here / row["path"] / "summary.json").read_text())
        assert row["params"] == summary["best"]["params"]
        assert row["teacher_params"] == summary["teacher"]["params"]


def test_the_table_has_the_teacher_and_every_figure(here):
    result = run("runs/one", "runs/two")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].split() == [
        "student", "replaced", "accuracy", "less", "the", "teacher's,", "95", "%", "agreement", "latency", "of",
        "teacher", "parameters", "on", "disk",
    ]  # fmt: skip
    assert lines[1].split()[:5] == ["tiny", "(teacher)", "92.00%", "4.10", "ms"]
    change = ["-3.4", "to", "-0.6"]
    assert lines[2].split()[:12] == ["one", "3", "of", "4", "90.00%", *change, "95.00%", "3.00", "ms", "73%"]
    assert lines[3].split()[:12] == ["two", "1", "of", "4", "80.00%", *change, "95.00%", "2.05", "ms", "50%"]
    assert len(lines) == 4
    assert all(line.rstrip().endswith("MiB") for line in lines[2:])


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("threads", 4, "threads 1 (one), 4 (other)"),
        ("dtype", "bfloat16", "dtype float32 (one), bfloat16 (other)"),
        ("device", "cuda", "device cpu (one), cuda (other)"),
        (
            "device_name",
            "a better one",
            "device name a processor (one), a better one (other)",
        ),
        ("batch_size", 8, "batch size 1 (one), 8 (other)"),
        ("runtime", "onnxruntime", "runtime eager (one), onnxruntime (other)"),
    ],
)
def test_other_conditions_are_told(here, name, value, text):
    tiny_run.write_run("runs/other", environment={name: value})
    assert told("runs/one", "runs/other")["notes"] == [f"latencies do not compare: {text}"]
    assert f"latencies do not compare: {text}" in run("runs/one", "runs/other").stdout


def test_other_data_and_other_teachers_are_told(here):
    tiny_search.write_npz(here / "more.npz", count=90)
    tiny_run.write_run("runs/data", data="more.npz")
    (note,) = told("runs/one", "runs/data")["notes"]
    assert note.startswith("accuracy and agreement do not compare: data data.npz ")
    assert "more.npz " in note
    tiny_run.write_run("runs/teacher", model="tiny_embedding", accuracy=None)
    (note,) = told("runs/one", "runs/teacher")["notes"]
    assert note.startswith("agreement does not compare: teacher tiny ")
    assert "tiny_embedding " in note


def result_of(folder, content, *, source="runs/one/best"):
    shutil.copytree(source, folder)
    write_json(Path(folder) / "result.json", content)


REFIT = {
    "schema": 1,
    "kept": "after",
    "test": {
        "before": {"loss": 0.01, "agreement": 0.95, "accuracy": 0.9},
        "after": {
            "loss": 0.008,
            "agreement": 0.97,
            "accuracy": 0.91,
            "change_low": -0.02,
            "change_high": 0.01,
        },
    },
    "validation": {},
}


def test_a_refit_has_its_own_figures_and_the_latency_of_its_plan(here):
    result_of("runs/one/refit", REFIT)
    result_of("runs/two/refit", REFIT | {"kept": "before"})
    one, refit, other = told("runs/one", "runs/one/refit", "runs/two/refit")["students"]
    assert (one["name"], refit["name"], other["name"]) == ("runs/one", "one/refit", "two/refit")
    assert (refit["accuracy"], refit["agreement"], refit["loss"]) == (0.91, 0.97, 0.008)
    assert (refit["change_low"], refit["change_high"]) == (-0.02, 0.01)
    assert (one["change_low"], one["change_high"]) == tuple(tiny_run.CHANGE)
    assert other["change_low"] is None  # of an earlier version
    assert refit["latency_ms"] == one["latency_ms"] == 3.0
    assert refit["params"] == one["params"]
    assert (other["accuracy"], other["latency_ms"]) == (0.9, None)  # another plan, which was never timed


def test_a_pruned_student_has_its_own_latency(here):
    (here / "runs/one/pruned").mkdir()
    own = {"latency_ms": 2.5, "teacher_ms": 4.2, "params": 77, "target": 0.6}
    result_of("runs/one/pruned/pruned-60", REFIT | own)
    of = json.loads((here / "runs/one/run.json").read_text())["identity"]
    identity = {"data": of["data_fingerprint"], "teacher": of["teacher_fingerprint"]}
    environment = tiny_run.ENVIRONMENT | {"threads": 2}
    write_json(here / "runs/one/pruned/prune.json", {"environment": environment, "identity": identity})
    found = told("runs/one", "runs/one/pruned/pruned-60")
    pruned = found["students"][1]
    assert (pruned["latency_ms"], pruned["teacher_ms"], pruned["params"]) == (2.5, 4.2, 77)
    assert (pruned["accuracy"], pruned["share"]) == (0.91, pytest.approx(2.5 / 4.2))
    assert found["notes"] == ["latencies do not compare: threads 1 (one), 2 (pruned-60)"]
    table = run("runs/one", "runs/one/pruned/pruned-60").stdout
    assert "tiny (teacher of one)" in table
    assert "tiny (teacher of pruned-60)" in table


def test_a_finalist_was_judged_on_other_images(here):
    plan = json.loads(Path("runs/one/best/plan.json").read_text())["plan"]
    row = {
        "plan": plan, "loss": 0.02, "agreement": 0.9, "accuracy": 0.85, "latency_ms": 2.9, "params": 123,
        "predicted_ms": 3.0, "predicted_loss": 0.01, "source": "refit",
    }  # fmt: skip
    (here / "runs/one/finalists").mkdir()
    result_of("runs/one/finalists/abc-refit", row)
    found = told("runs/one", "runs/one/finalists/abc-refit")
    assert found["students"][1]["accuracy"] == 0.85
    assert found["students"][1]["teacher_accuracy"] is None
    (note,) = found["notes"]
    assert note == ("accuracy and agreement do not compare: images test (one), study (abc-refit)")


def test_a_folder_without_figures_has_a_size_and_parameters(here):
    shutil.copytree("runs/one/best", "alone")
    found = told("runs/one", "alone")
    one, alone = found["students"]
    assert (alone["accuracy"], alone["latency_ms"], alone["share"]) == (None, None, None)
    assert (alone["params"], alone["mib"]) == (one["params"], one["mib"])
    assert found["notes"] == [
        "accuracy and agreement were not measured: alone",
        "latency was not measured: alone",
    ]
    assert " - " in run("runs/one", "alone").stdout


def test_what_was_exported_brings_its_figures(here):
    export_student(Path("runs/one"), "hub", out=Path("published"), images=4, timed=False)
    export_student(Path("runs/one"), "safetensors", out=Path("one.safetensors"), images=4, timed=False)
    found = told("runs/one", "published", "one.safetensors")
    assert found["notes"] == []
    one, *others = found["students"]
    for row in others:
        for name in (
            "accuracy",
            "change_low",
            "agreement",
            "latency_ms",
            "share",
            "params",
            "teacher_ms",
            "conditions",
        ):
            assert row[name] == one[name], name


def test_far_has_figures_and_no_latency(here):
    write_json(
        here / "runs/one/far.json",
        {
            "teacher": {"accuracy": 0.92, "params": 1000},
            "student": {"params": 900},
            "measured": {"stage 2": {"loss": 0.1, "agreement": 0.7, "accuracy": 0.6}},
        },
    )
    (here / "runs/one/summary.json").unlink()
    figures = read_figures(find_student(here / "runs/one"))
    assert (figures.accuracy, figures.params, figures.latency_ms) == (0.6, 900, None)
    assert (figures.teacher_accuracy, figures.teacher_params, figures.conditions) == (0.92, 1000, None)


@pytest.mark.parametrize(
    ("folder", "path"), [("runs/one", "best"), ("runs/one/best", "."), ("runs/one", ".")]
)
def test_the_run_of_a_student_is_found_from_anywhere(here, monkeypatch, folder, path):
    monkeypatch.chdir(here / folder)
    (row,) = told(path)["students"]
    assert (row["accuracy"], row["name"]) == (
        0.9,
        "best" if folder.endswith("best") or path == "best" else "one",
    )


def test_a_missing_plugin_costs_a_figure_and_nothing_else(here):
    shutil.copytree("runs/one/best", "alone")
    tiny_run.change("alone/plan.json", plugins={"theirs": "mixerzoo-theirs 1.2"})
    (row,) = told("alone")["students"]
    assert row["params"] is None


def test_the_picture_is_a_png_with_all_of_them(here):
    shutil.copytree("runs/one/best", "alone")
    result = run("runs/one", "runs/two", "alone", "--picture", "compare.png")
    assert result.exit_code == 0
    assert "picture    compare.png" in result.stdout
    with Image.open(here / "compare.png") as image:
        assert image.format == "PNG"
        assert image.width > image.height > 200
    found = compare([Path("runs/one"), Path("runs/two"), Path("alone")])
    assert compare_picture(found) == (here / "compare.png").read_bytes()
    with Image.open(io.BytesIO(compare_picture(compare([Path("alone")])))) as few:
        assert few.height < image.height


def test_names_are_as_short_as_they_may_be():
    assert short_names([Path("/a/x/best"), Path("/a/y/best")]) == ["x/best", "y/best"]
    assert short_names([Path("/a/x")]) == ["x"]
    assert short_names([Path("/a/x"), Path("/a/x")]) == ["/a/x", "/a/x"]


def spoiled(name, content):
    return lambda here: (here / "runs" / "one" / name).write_text(content)


WRONG = {
    "no such run": (None, ["runs/one", "nowhere"], ["'nowhere': no such run or student"]),
    "not a run": (None, ["runs"], ["'runs' is neither a run directory nor a student"]),
    "a picture of another kind": (None, ["runs/one", "--picture", "a.jpg"], ["--picture a.jpg", ".png"]),
    "a place that is none": (
        None,
        ["runs/one", "--picture", "/dev/null/a.png"],
        ["--picture /dev/null/a.png", "cannot be written"],
    ),
    "no JSON": (spoiled("summary.json", "{"), ["runs/one"], ["summary.json", "not readable as JSON"]),
    "a list": (spoiled("summary.json", "[]"), ["runs/one"], ["summary.json", "not a run of mixerzoo"]),
    "figures that are none": (
        spoiled("summary.json", '{"teacher": 3, "best": 4}'),
        ["runs/one"],
        ["'runs/one': its figures cannot be read"],
    ),
    "a plan that is none": (spoiled("best/plan.json", '{"plan": 3}'), ["runs/one"], ["its plan is none"]),
}


@pytest.mark.parametrize(("spoil", "words", "texts"), WRONG.values(), ids=WRONG)
def test_a_mistake_costs_one_line(here, spoil, words, texts):
    if spoil is not None:
        spoil(here)
    refused(run(*words), *texts)
