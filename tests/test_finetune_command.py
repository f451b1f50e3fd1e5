"""`mixerzoo finetune`: never worse, it goes on where it stopped, and one line for whatever it cannot do."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import tiny_search
import torch
from click.testing import CliRunner

import mixerzoo
from mixerzoo import locks
from mixerzoo.cli import main
from mixerzoo.errors import MixerzooError
from mixerzoo.finetune import loop, rates
from mixerzoo.student import load_student
from mixerzoo.temporary import temporary_of
from mixerzoo_search import image_parts, search
from mixerzoo_search.finetuning import run as command
from mixerzoo_search.finetuning.folder import TuningFolder
from mixerzoo_search.finetuning.images import PreparedImages
from mixerzoo_search.finetuning.settings import FinetuneSettings
from mixerzoo_search.opened_run import open_run

SCRIPT = Path(__file__).parent / "tiny_search.py"
FILES = {"README.md", "model.safetensors", "plan.json", "result.json"}
WITH_STEPS = ("--steps", "60", "--lr", "0.003")


@pytest.fixture(scope="module", autouse=True)
def _tiny_world():
    with tiny_search.tiny_world():
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with data, a finished run, and in it a student that has much to gain: `run/mine`."""
    folder = tmp_path_factory.mktemp("finetune")
    tiny_search.write_npz(folder / "data.npz")
    options = tiny_search.FAST | {"finetune_minutes": 0, "mixers": tiny_search.MIXERS, "trials": 4}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        search("tiny", "data.npz", budget="60%", out="run", **options)
        plan = {f"blocks.{at}.attn": "linear@1" for at in range(2)}
        (folder / "plan.json").write_text(json.dumps(plan | {"blocks.0.mlp": "none@1"}))
        words = ["refit", "run", "--plan", "plan.json", "--out", "run/mine", "--images", "20"]
        assert CliRunner().invoke(main, words, catch_exceptions=False).exit_code == 0
    return folder


@pytest.fixture
def here(place, tmp_path, monkeypatch):
    """A copy of it to work in."""
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words):
    return CliRunner().invoke(main, ["finetune", *words], catch_exceptions=False)


def refused(result, *texts):
    """Exit code 2, and one line on standard error that says all of `texts`."""
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("mixerzoo: ")
    assert result.stderr.count("\n") == 1
    for text in texts:
        assert text in result.stderr


def written(folder):
    """Return the result in a folder, which must be whole and nothing else."""
    assert {path.name for path in folder.iterdir()} == FILES
    result = json.loads((folder / "result.json").read_text())
    assert json.dumps(result, allow_nan=False)
    mixerzoo.load(folder)
    return result


def weights(folder):
    return load_student(folder).model.state_dict()


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def mlflow_runs(here):
    """Return the fine-tunings in MLflow, with their curves by metric."""
    with tiny_search.mlflow_client(here) as client:
        (experiment,) = [e for e in client.search_experiments() if e.name == "mixerzoo tiny"]
        found = client.search_runs([experiment.experiment_id], "tags.`mixerzoo.source` = 'finetune'")
        return [
            (one, {name: client.get_metric_history(one.info.run_id, name) for name in one.data.metrics})
            for one in found
        ]


def test_a_student_is_better_for_it_and_the_one_given_is_left_alone(here):
    before = weights(here / "run" / "mine")
    told = run("run/mine", *WITH_STEPS)
    assert told.exit_code == 0, told.stderr
    result = written(here / "run" / "mine-finetuned")
    assert same(weights(here / "run" / "mine"), before)
    assert result["kept"] == "after"
    assert result["validation"]["after"]["loss"] < 0.9 * result["validation"]["before"]["loss"]
    assert (result["steps"], result["stopped"], result["images"]) == (60, None, 48)
    assert len(result["curve"]) == 60
    head, old, new, _, where = told.stdout.splitlines()
    assert "agreement" in head
    assert [line.split()[0] for line in (old, new)] == ["before", "after"]
    assert f"{result['test']['after']['loss']:.4g}" in new.split()
    assert str(Path("run/mine-finetuned")) in where
    card = (here / "run" / "mine-finetuned" / "README.md").read_text()
    assert "60 steps" in card
    assert f"{result['test']['after']['loss']:.4g}" in card


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_result_says_what_was_computed_in(here, dtype):
    assert run("run/mine", "--steps", "2", "--dtype", dtype).exit_code == 0
    assert written(here / "run" / "mine-finetuned")["environment"]["dtype"] == dtype


def test_images_decide_that_no_state_was_chosen_on(here, monkeypatch):
    monkeypatch.setattr(image_parts, "FINAL_IMAGES", 2)
    assert run("run/mine", "--steps", "5").exit_code == 0
    validation = written(here / "run" / "mine-finetuned")["validation"]
    context = open_run(here / "run", None, None).context
    assert len(context.image_parts.final) == 2 < len(context.image_parts.choice)
    assert not set(context.image_parts.final) & set(context.image_parts.choice)
    judge = context.make_judge(context.image_parts.choice, keep="images")
    for name, folder in (("before", "mine"), ("after", "mine-finetuned")):
        student = mixerzoo.load(here / "run" / folder)
        assert validation[name]["loss"] == pytest.approx(judge.evaluate(student).loss, rel=1e-5)


def test_mlflow_has_the_curves_once_as_a_child_of_the_search(here):
    assert run("run/mine", *WITH_STEPS).exit_code == 0
    result = written(here / "run" / "mine-finetuned")
    ((one, curves),) = mlflow_runs(here)
    record = json.loads((here / "run" / "run.json").read_text())
    assert one.data.tags["mlflow.parentRunId"] == record["mlflow_run_id"]
    assert one.info.status == "FINISHED"
    steps = [row["step"] for row in result["curve"]]
    assert [point.step for point in curves["train_loss"]] == steps
    assert [point.value for point in curves["lr"]] == [row["lr"] for row in result["curve"]]
    checked = [row["step"] for row in result["curve"] if row["held_out"] is not None]
    assert [point.step for point in curves["held_out_loss"]] == checked
    assert one.data.metrics["loss"] == pytest.approx(result["validation"]["after"]["loss"])
    assert one.data.params["count.linear"] == "2"


def test_the_best_of_a_run_is_the_default_and_minutes_do_too(here):
    told = run("run", "--minutes", "0.01", "--json", "--images", "30", "--batch-size", "8")
    assert told.exit_code == 0, told.stderr
    result = written(here / "run" / "finetuned")
    assert json.loads(told.stdout) == result
    assert result["settings"]["minutes"] == 0.01
    assert result["images"] == 30
    plans = [json.loads((here / "run" / name / "plan.json").read_text()) for name in ("best", "finetuned")]
    assert plans[0] == plans[1]


def test_the_same_command_again_trains_nothing(here, monkeypatch):
    first = run("run/mine", "--steps", "5")
    files = {path.name: path.stat().st_mtime_ns for path in (here / "run" / "mine-finetuned").iterdir()}

    def again(*_, **__):
        raise AssertionError("this was done already")

    monkeypatch.setattr(command, "train", again)
    assert run("run/mine", "--steps", "5").stdout == first.stdout
    now = {path.name: path.stat().st_mtime_ns for path in (here / "run" / "mine-finetuned").iterdir()}
    assert now == files
    refused(run("run/mine", "--steps", "6"), "another fine-tuning (steps is 5 there, 6 here)", "--out")
    refused(run("run", "--steps", "5", "--out", "run/mine-finetuned"), "student is", "--out")


def test_an_interrupted_one_goes_on_in_the_same_run(here, monkeypatch):
    assert run("run/mine", *WITH_STEPS, "--out", "whole").exit_code == 0
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(loop, "SAVE_SHARE", 1e9)
    step = loop.Training._step

    def interrupted(self, share):
        if self.standing.step == 30:
            raise KeyboardInterrupt
        return step(self, share)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Training, "_step", interrupted)
        assert run("run/mine", *WITH_STEPS, "--out", "parts").exit_code == 1
    (one, _), _ = sorted(mlflow_runs(here), key=lambda found: found[0].info.status != "KILLED")
    assert one.info.status == "KILLED"
    assert {"finetune.json", "checkpoint.json"} <= {path.name for path in (here / "parts").iterdir()}
    with pytest.raises(MixerzooError):
        mixerzoo.load(here / "parts")
    refused(run("run/mine", "--steps", "7", "--out", "parts"), "another fine-tuning (steps is 60 there")
    assert run("run/mine", *WITH_STEPS, "--out", "parts").exit_code == 0
    parts, whole = written(here / "parts"), written(here / "whole")
    assert same(weights(here / "parts"), weights(here / "whole"))
    assert parts["validation"] == whole["validation"]
    found = mlflow_runs(here)
    assert len(found) == 2
    for one, curves in found:
        assert one.info.status == "FINISHED"
        assert [point.step for point in curves["train_loss"]] == list(range(1, 61))


def test_a_kill_behind_the_result_leaves_only_the_end_to_do(here, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(command.Curves, "conclude", lambda *_: (_ for _ in ()).throw(RuntimeError("killed")))
        with pytest.raises(RuntimeError):
            run("run/mine", "--steps", "5")
    monkeypatch.setattr(command, "train", None)
    assert run("run/mine", "--steps", "5").exit_code == 0
    written(here / "run" / "mine-finetuned")
    ((one, _),) = mlflow_runs(here)
    assert one.info.status == "FINISHED"
    assert "test_loss" in one.data.metrics


def test_what_does_not_help_is_undone_and_what_is_not_finite_is_said(here, monkeypatch):
    monkeypatch.setattr(loop, "EARLY", 0)  # else the first steps would be taken back
    monkeypatch.setattr(loop, "CHECKS", 1)
    monkeypatch.setattr(rates, "PROMISE", float("inf"))  # else no tensor would get such a rate
    told = run("run/mine", "--steps", "5", "--lr", "1e30")
    assert told.exit_code == 0
    assert "kept as it was" in told.stdout
    assert "ended early: the " in told.stdout
    assert "lower --lr than 1e+30" in told.stdout
    result = written(here / "run" / "mine-finetuned")
    assert result["kept"] == "before"
    assert result["stopped"]
    assert same(weights(here / "run" / "mine-finetuned"), weights(here / "run" / "mine"))


def test_labels_have_a_weight_where_there_are_any(here):
    assert run("run/mine", "--steps", "3", "--labels", "3", "--out", "with").exit_code == 0
    assert run("run/mine", "--steps", "3", "--out", "without").exit_code == 0
    rows = [written(here / name)["curve"] for name in ("with", "without")]
    # The labels of these images are random: the teacher itself is off by more than the rest of the loss.
    assert rows[0][0]["loss"] > rows[1][0]["loss"] + 3


def test_a_student_outside_of_its_run_names_it(here):
    shutil.copytree(here / "run" / "mine", here / "away")
    refused(run("away", "--steps", "3"), "student 'away' is in no run directory", "--run")
    assert run("away", "--steps", "3", "--run", "run").exit_code == 0
    written(here / "away-finetuned")
    assert run("run/best", "--steps", "3").exit_code == 0
    written(here / "run" / "finetuned")
    assert run("run/finetuned", "--steps", "3").exit_code == 0
    written(here / "run" / "finetuned-finetuned")


def test_a_teacher_that_was_an_object_is_given_in_python(here):
    record = json.loads((here / "run" / "run.json").read_text())
    record["identity"]["model"] = "VisionTransformer"
    (here / "run" / "run.json").write_text(json.dumps(record))
    refused(run("run", "--steps", "3"), "unknown model 'VisionTransformer'")
    found = command.finetune_run(Path("run/mine"), FinetuneSettings(steps=3), model=tiny.tiny_vit())
    assert found.path == Path("run/mine-finetuned")


def test_a_student_of_fars_recipe_goes_on_too(here):
    words = ["distill", "--recipe", "far", "--model", "tiny", "--data", "data.npz", "--batch-size", "8"]
    words += ["--epochs", "2", "--out", "far"]
    assert CliRunner().invoke(main, words, catch_exceptions=False).exit_code == 0
    assert run("far", "--steps", "30", "--lr", "0.003").exit_code == 0
    result = written(here / "far" / "finetuned")
    assert result["validation"]["after"]["loss"] < result["validation"]["before"]["loss"]


def without_labels(here):
    path = here / "run" / "run.json"
    tiny_search.write_npz(here / "data.npz", labels=False)
    record = json.loads(path.read_text())
    data = mixerzoo.opening.open_data("data.npz").fingerprint[:16]
    path.write_text(json.dumps(record | {"identity": record["identity"] | {"data_fingerprint": data}}))


def other_teacher(here):
    path = here / "run" / "run.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"identity": record["identity"] | {"teacher_fingerprint": "x"}}))


WRONG = {
    "no run": (None, ["nowhere"], ["'nowhere': no such run or student"]),
    "unfinished": (
        lambda here: (here / "run" / "summary.json").unlink(),
        ["run"],
        ["run 'run' is not finished"],
    ),
    "no best": (
        lambda here: (here / "run" / "summary.json").write_text('{"met": false}'),
        ["run"],
        ["no best student"],
    ),
    "other teacher": (other_teacher, ["run"], ["teacher 'tiny'", "no longer"]),
    "both": (None, ["run", "--steps", "3", "--minutes", "1"], ["one of --minutes 10 and --steps"]),
    "steps": (None, ["run", "--steps", "0"], ["--steps 0: give at least 1"]),
    "minutes": (None, ["run", "--minutes", "-1"], ["--minutes -1"]),
    "endless": (None, ["run", "--minutes", "inf"], ["--minutes inf"]),
    "lr": (None, ["run", "--lr", "0"], ["--lr 0"]),
    "images": (None, ["run", "--images", "3"], ["--images 3", "at least 20"]),
    "batch": (None, ["run", "--batch-size", "0"], ["--batch-size 0"]),
    "seed": (None, ["run", "--seed", "-1"], ["--seed -1"]),
    "labels": (None, ["run", "--labels", "-1"], ["--labels -1"]),
    "no labels": (without_labels, ["run", "--labels", "1"], ["data 'data.npz' has no labels"]),
    "dtype": (None, ["run", "--dtype", "int8"], ["--dtype int8", "bfloat16"]),
    "device": (None, ["run", "--device", "meta"], ["device 'meta'"]),
    "tracking": (None, ["run", "--tracking-uri", "http://127.0.0.1:9"], ["http://127.0.0.1:9"]),
    "something else": (
        lambda here: (here / "run" / "finetuned").mkdir() or (here / "run" / "finetuned" / "x").touch(),
        ["run"],
        ["holds no fine-tuned student", "--out"],
    ),
    "a refit": (None, ["run", "--out", "run/mine"], ["holds no fine-tuned student", "--out"]),
    "no folder": (None, ["run", "--out", "data.npz/x"], ["'data.npz/x' cannot be written", "--out"]),
}


@pytest.mark.parametrize(("spoil", "words", "texts"), WRONG.values(), ids=WRONG)
def test_a_mistake_costs_one_line_and_leaves_nothing(here, spoil, words, texts):
    if spoil is not None:
        spoil(here)
    before = sorted(here.rglob("*"))
    refused(run(*words), *texts)
    assert sorted(here.rglob("*")) == before


def test_two_do_not_train_in_one_folder(here):
    with locks.held(here / "run" / ".finetuned.lock", wait=False):
        refused(run("run", "--steps", "3"), "another process trains there", "--out")
    assert not (here / "run" / "finetuned").exists()


def test_a_training_that_was_killed_while_it_began_goes_on(tmp_path):
    folder = TuningFolder(tmp_path / "tuned", {"steps": 3})
    folder.path.mkdir()
    temporary_of(folder.path / "finetune.json").write_text('{"half')
    assert folder.result() is None
    folder.note(run="a")
    assert folder.record() == {"identity": {"steps": 3}, "run": "a"}


def test_images_are_prepared_once_while_there_is_room(here, monkeypatch):
    data = open_run(here / "run", None, None).context.data
    config = tiny.tiny_teacher().image
    images = PreparedImages(data, range(10), config, kept_bytes=4 * 4 * 16 * 16)
    seen = [images.batch(rows) for rows in ([0, 1, 2], [3, 4, 0], [4, 2])]
    straight = mixerzoo.data.load_images(data, range(10), config)
    for batch, rows in zip(seen, ([0, 1, 2], [3, 4, 0], [4, 2]), strict=True):
        assert torch.equal(batch, straight[rows])
    assert len(images._kept) == 4
    assert len(images) == 10


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="starts processes by forking")
def test_ten_kills_change_nothing(here):
    words = ["finetune", "run/mine", "--steps", "3000", "--lr", "0.001"]
    dice = random.Random(0)
    with subprocess.Popen(
        [sys.executable, SCRIPT, "serve"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as server:

        def serve(out, when):
            server.stdin.write(json.dumps([[*words, "--out", out], str(here), when]) + "\n")
            server.stdin.flush()
            return json.loads(server.stdout.readline())

        code, took = serve("whole", None)
        assert code == 0, (here / "printed.txt").read_text()
        kills = 0
        for number in range(40):
            when = "parts/checkpoint.json" if number == 0 else dice.uniform(0.5, max(2.5, took / 6))
            code, _ = serve("parts", when)
            assert code in (0, -9), (here / "printed.txt").read_text()
            kills += code == -9
            if kills == 10 or code == 0:
                break
        assert kills == 10
        assert serve("parts", None)[0] == 0, (here / "printed.txt").read_text()
        server.stdin.close()
    parts, whole = written(here / "parts"), written(here / "whole")
    files = [(here / name / "model.safetensors").read_bytes() for name in ("parts", "whole")]
    assert files[0] == files[1]
    assert parts["validation"] == whole["validation"]
    curves = [[row | {"seconds": 0} for row in result["curve"]] for result in (parts, whole)]
    assert curves[0] == curves[1]
    steps = [[point.step for point in found["train_loss"]] for _, found in mlflow_runs(here)]
    assert steps[0] == steps[1] == [row["step"] for row in whole["curve"]]
