"""`mixerzoo refit`: never worse, written whole or not at all, and one line for whatever it cannot do."""

import copy
import json
import os
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
from mixerzoo.cli import main
from mixerzoo.opening import open_teacher
from mixerzoo.student import load_student
from mixerzoo_search import image_parts, search
from mixerzoo_search.refitting import run as refitting

SCRIPT = Path(__file__).parent / "tiny_search.py"
FILES = {"README.md", "model.safetensors", "plan.json", "result.json"}


@pytest.fixture(scope="module", autouse=True)
def _tiny_world():
    with tiny_search.tiny_world():
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with data and a finished run that was not distilled as a whole."""
    folder = tmp_path_factory.mktemp("refit")
    tiny_search.write_npz(folder / "data.npz")
    options = tiny_search.FAST | {"finetune_minutes": 0, "mixers": tiny_search.MIXERS}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        search("tiny", "data.npz", budget="60%", out="run", **options)
    return folder


@pytest.fixture
def here(place, tmp_path, monkeypatch):
    """A copy of it to work in."""
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words):
    return CliRunner().invoke(main, ["refit", *words], catch_exceptions=False)


def refused(result, *texts):
    """Exit code 2, and one line on standard error that says all of `texts`."""
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("mixerzoo: ")
    assert result.stderr.count("\n") == 1
    for text in texts:
        assert text in result.stderr


def written(folder):
    """Return what a refit left, which must be whole."""
    assert {path.name for path in folder.iterdir()} == FILES
    result = json.loads((folder / "result.json").read_text())
    assert json.dumps(result, allow_nan=False)
    mixerzoo.load(folder)
    return result


def weights(folder):
    return load_student(folder).model.state_dict()


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def library_plan(here):
    """Write a plan of the run that has something to gain."""
    plan = {
        site.name: "linear@1" if site.kind == "attention" else "none@1" for site in open_teacher("tiny").sites
    }
    (here / "plan.json").write_text(json.dumps(plan))
    return plan


def test_the_best_student_is_refitted_and_never_worse(here):
    before = weights(here / "run" / "best")
    told = run("run", "--minutes", "0.01")
    assert told.exit_code == 0, told.stderr
    result = written(here / "run" / "refit")
    assert same(weights(here / "run" / "best"), before)
    after = weights(here / "run" / "refit")
    validation = result["validation"]
    better = validation["after"]["loss"] < validation["before"]["loss"]
    assert result["kept"] == ("after" if better else "before")
    assert same(after, before) is not better
    assert result["minutes"] == 0.01
    summary = json.loads((here / "run" / "summary.json").read_text())
    assert result["test"]["before"]["loss"] == pytest.approx(summary["best"]["loss"], abs=1e-6)
    plan = json.loads((here / "run" / "refit" / "plan.json").read_text())
    assert plan["plan"] == summary["best"]["plan"]


def test_a_plan_gets_its_weights_from_the_library(here):
    plan = library_plan(here)
    told = run("run", "--plan", "plan.json", "--out", "mine", "--images", "45")
    assert told.exit_code == 0, told.stderr
    result = written(here / "mine")
    assert json.loads((here / "mine" / "plan.json").read_text())["plan"] == plan
    assert result["images"] == 45
    assert result["kept"] == "after"
    assert result["validation"]["after"]["loss"] < result["validation"]["before"]["loss"]
    assert not (here / "run" / "refit").exists()


def test_the_folder_of_a_student_does_too(here):
    folder = next((here / "run" / "finalists").glob("*-refit"))
    assert run("run", "--plan", str(folder)).exit_code == 0
    written(here / "run" / "refit")


def test_the_figures_before_and_after_are_printed(here):
    library_plan(here)
    head, before, after, empty, where = run("run", "--plan", "plan.json").stdout.splitlines()
    result = written(here / "run" / "refit")
    assert "loss" in head
    assert "agreement" in head
    assert "accuracy" in head
    for line, name in ((before, "before"), (after, "after")):
        assert line.split()[0] == name
        assert f"{result['test'][name]['loss']:.4g}" in line.split()
        test = result["test"][name]
        assert f"{test['accuracy']:.2%}" in line.split()
        assert f"{100 * test['change_low']:+.1f} to {100 * test['change_high']:+.1f} " in line
    assert empty == ""
    assert str(Path("run/refit")) in where


def test_a_refit_that_does_not_help_is_undone_and_said(here, monkeypatch):
    def spoil(teacher, students, *_, **__):
        (stitched,) = students
        with torch.no_grad():
            for site in stitched.mixers:
                for parameter in stitched.student.get_submodule(site).parameters():
                    parameter.fill_(float("nan"))

    library_plan(here)
    run("run", "--plan", "plan.json", "--out", "good", "--images", "20")
    monkeypatch.setattr(refitting, "refit_students", spoil)
    told = run("run", "--plan", "good")
    assert "kept as it was" in told.stdout
    assert same(weights(here / "run" / "refit"), weights(here / "good"))
    assert written(here / "run" / "refit")["kept"] == "before"


def scaled(student, factor):
    other = copy.deepcopy(student)
    with torch.no_grad():
        other.head.weight.mul_(factor)
    return other


def test_gradient_steps_go_on_where_the_closed_form_ends(here, monkeypatch):
    library_plan(here)
    given = []

    def finetune(teacher, student, images, *, seconds, evaluate, seed, on_progress):
        given.append((seconds, evaluate(student), len(images)))
        better = min((scaled(student, factor) for factor in (0.999, 1.001)), key=evaluate)
        assert evaluate(better) < evaluate(student)
        return better, 0.0

    assert run("run", "--plan", "plan.json", "--out", "closed").exit_code == 0
    monkeypatch.setattr(refitting, "finetune", finetune)
    assert run("run", "--plan", "plan.json", "--minutes", "2").exit_code == 0
    closed, stepped = written(here / "closed"), written(here / "run" / "refit")
    ((seconds, loss, images),) = given
    assert seconds == 120.0
    assert loss == pytest.approx(closed["validation"]["after"]["loss"], abs=1e-6)
    assert images > closed["images"]  # all that are there to distil on
    assert stepped["kept"] == "after"
    head = weights(here / "run" / "refit")["head.weight"]
    factor = head / weights(here / "closed")["head.weight"]
    assert (factor - 1).abs().max() == pytest.approx(1e-3, rel=0.01)


def test_steps_that_helped_only_where_their_best_state_was_chosen_are_undone(here, monkeypatch):
    monkeypatch.setattr(image_parts, "FINAL_IMAGES", 2)
    library_plan(here)

    def finetune(teacher, student, images, **_):
        return scaled(student, -1.0), 0.0

    assert run("run", "--plan", "plan.json", "--out", "closed").exit_code == 0
    monkeypatch.setattr(refitting, "finetune", finetune)
    assert run("run", "--plan", "plan.json", "--minutes", "2").exit_code == 0
    closed, stepped = written(here / "closed"), written(here / "run" / "refit")
    assert stepped["kept"] == closed["kept"] == "after"
    assert stepped["validation"] == closed["validation"]
    assert stepped["test"] == closed["test"]
    assert same(weights(here / "run" / "refit"), weights(here / "closed"))


def test_the_kept_modules_that_were_solved_again_are_in_the_folder(here):
    plan = {"blocks.0.attn": "linear@1"}
    (here / "plan.json").write_text(json.dumps(plan))
    assert run("run", "--plan", "plan.json").exit_code == 0
    assert written(here / "run" / "refit")["kept"] == "after"
    teacher, state = open_teacher("tiny").model.state_dict(), weights(here / "run" / "refit")
    moved = {key for key in teacher.keys() & state.keys() if not torch.equal(teacher[key], state[key])}
    assert {"blocks.0.mlp.fc2.weight", "blocks.1.mlp.fc2.weight"} <= moved
    assert all(key.rpartition(".")[0].endswith(("mlp.fc2", "head")) for key in moved)


def test_mlflow_has_a_child_of_the_run(here):
    def children():
        parent = json.loads((here / "run" / "run.json").read_text())["mlflow_run_id"]
        with tiny_search.mlflow_client(here) as client:
            (experiment,) = [e for e in client.search_experiments() if e.name == "mixerzoo tiny"]
            found = client.search_runs([experiment.experiment_id], f"tags.`mlflow.parentRunId` = '{parent}'")
            return {child.info.run_id: child for child in found}

    library_plan(here)
    before = children()
    assert run("run", "--plan", "plan.json").exit_code == 0
    result = written(here / "run" / "refit")
    (child,) = (child for number, child in children().items() if number not in before)
    assert child.info.run_name.endswith(" refitted")
    assert child.data.metrics["loss"] == pytest.approx(result["validation"]["after"]["loss"])


def test_without_the_store_of_the_run_none_is_made(here):
    library_plan(here)
    (here / "mlflow.db").unlink()
    assert run("run", "--plan", "plan.json").exit_code == 0
    assert not (here / "mlflow.db").exists()


def test_an_earlier_refit_is_replaced_and_nothing_else_is(here):
    library_plan(here)
    assert run("run", "--plan", "plan.json").exit_code == 0
    assert run("run", "--plan", "plan.json", "--images", "20").exit_code == 0
    assert written(here / "run" / "refit")["images"] == 20
    before = sorted((here / "run" / "best").iterdir())
    refused(run("run", "--out", "run/best"), "run/best", "--out")
    assert sorted((here / "run" / "best").iterdir()) == before
    assert not list(here.rglob("*.tmp")) + list(here.rglob("*.old"))


def no_best(here):
    summary = json.loads((here / "run" / "summary.json").read_text())
    (here / "run" / "summary.json").write_text(json.dumps(summary | {"met": False, "best": None}))


def unfinished(here):
    (here / "run" / "summary.json").unlink()


def not_a_run(here):
    (here / "run" / "run.json").write_text("[]")


def other_data(here):
    tiny_search.write_npz(here / "data.npz", count=70)


def plan_of(text):
    return lambda here: (here / "plan.json").write_text(text)


def missing_plugin(here):
    path = here / "run" / "best" / "plan.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"plugins": {"theirs": "mixerzoo-theirs 1.2"}}))


WRONG = {
    "no such run": (None, ["nowhere"], ["'nowhere' is not a run directory"]),
    "not a run": (not_a_run, ["run"], ["not a run of mixerzoo"]),
    "unfinished": (unfinished, ["run"], ["run 'run' is not finished"]),
    "no best": (no_best, ["run"], ["no best student", "--plan"]),
    "other data": (other_data, ["run"], ["data 'data.npz'", "no longer"]),
    "missing plugin": (missing_plugin, ["run"], ["needs mixer 'theirs' of mixerzoo-theirs 1.2; install"]),
    "minutes": (None, ["run", "--minutes", "-1"], ["--minutes -1"]),
    "endless": (None, ["run", "--minutes", "inf"], ["--minutes inf"]),
    "images": (None, ["run", "--images", "3"], ["--images 3", "at least 20"]),
    "no such plan": (None, ["run", "--plan", "x.json"], ["x.json", "no such file"]),
    "no plan": (plan_of("[1]"), ["run", "--plan", "plan.json"], ["not a plan"]),
    "a plan of nothing": (plan_of("{}"), ["run", "--plan", "plan.json"], ["keeps every site"]),
    "a site that is none": (
        plan_of('{"a": "none@1"}'),
        ["run", "--plan", "plan.json"],
        ["'a' is not a site"],
    ),
    "a candidate that is none": (plan_of('{"a": 3}'), ["run", "--plan", "plan.json"], ["candidate '3'"]),
    "not in the library": (
        plan_of('{"blocks.0.attn": "glu_mlp@1"}'),
        ["run", "--plan", "plan.json"],
        ["glu_mlp@1 at blocks.0.attn is not in the library"],
    ),
    "tracking": (None, ["run", "--tracking-uri", "http://127.0.0.1:9"], ["http://127.0.0.1:9"]),
}


@pytest.mark.parametrize(("spoil", "words", "texts"), WRONG.values(), ids=WRONG)
def test_a_mistake_costs_one_line_and_leaves_nothing(here, spoil, words, texts):
    if spoil is not None:
        spoil(here)
    refused(run(*words), *texts)
    assert not (here / "run" / "refit").exists()
    assert not list(here.rglob("*.tmp"))


def test_a_teacher_that_was_an_object_is_given_in_python(here):
    record = json.loads((here / "run" / "run.json").read_text())
    record["identity"]["model"] = "VisionTransformer"
    (here / "run" / "run.json").write_text(json.dumps(record))
    refused(run("run"), "unknown model 'VisionTransformer'")
    found = refitting.refit_run(Path("run"), model=tiny.tiny_vit())
    assert found.path == Path("run/refit")
    assert found.plan.replaced()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="starts processes by forking")
def test_a_kill_leaves_all_of_it_or_nothing(here):
    plan = library_plan(here)
    command = ["refit", "run", "--plan", "plan.json"]
    with subprocess.Popen(
        [sys.executable, SCRIPT, "serve"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as server:

        def serve(when):
            server.stdin.write(json.dumps([command, str(here), when]) + "\n")
            server.stdin.flush()
            return json.loads(server.stdout.readline())

        kills = 0
        for when in (
            0.05,
            0.5,
            "run/.refit.*.tmp",
            "run/.refit.*.tmp/*",
            "run/.refit.*.tmp/plan.json",
            "run/refit",
        ):
            code, _ = serve(when)
            assert code in (0, -9), (here / "printed.txt").read_text()
            kills += code == -9
            if (here / "run" / "refit").exists():
                written(here / "run" / "refit")
        assert kills
        assert serve(None)[0] == 0, (here / "printed.txt").read_text()
        server.stdin.close()
    written(here / "run" / "refit")
    assert json.loads((here / "run" / "refit" / "plan.json").read_text())["plan"] == plan
