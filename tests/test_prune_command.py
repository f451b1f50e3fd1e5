"""`mixerzoo prune`: a family of students that really are smaller, resumable, and one line for what it cannot do."""

import json
import shutil

import pytest
import tiny_search
import torch
from click.testing import CliRunner

import mixerzoo
from mixerzoo.cli import main
from mixerzoo.errors import MixerzooError
from mixerzoo.hosts import assemble, count_params
from mixerzoo.locks import held, lock_of
from mixerzoo.opening import open_teacher
from mixerzoo.plan import Candidate, Plan
from mixerzoo.pruning.targets import Thresholds
from mixerzoo.student import Student, make_replacement, save_student
from mixerzoo.temporary import temporary_of
from mixerzoo_search import search
from mixerzoo_search.prune import work as prune_module
from mixerzoo_search.prune.family import Family
from mixerzoo_search.run_directory import RunDirectory

FILES = {"README.md", "model.safetensors", "plan.json", "result.json"}
QUICK = ("--steps", "6", "--finetune-steps", "4", "--quiet", "--threads", "1")


@pytest.fixture(scope="module", autouse=True)
def _tiny_world():
    with tiny_search.tiny_world():
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with data and a finished run: all attention replaced, MLPs kept."""
    folder = tmp_path_factory.mktemp("prune")
    tiny_search.write_npz(folder / "data.npz")
    words = [
        "--recipe",
        "far",
        "--model",
        "tiny",
        "--data",
        "data.npz",
        "--epochs",
        "2",
        "--out",
        "run",
        "--quiet",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        told = CliRunner().invoke(main, ["distill", *words], catch_exceptions=False)
    assert told.exit_code == 0, told.stderr
    return folder


@pytest.fixture
def here(place, tmp_path, monkeypatch):
    """A copy of it to work in."""
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words, quick=QUICK):
    return CliRunner().invoke(main, ["prune", "run", *quick, *words], catch_exceptions=False)


def refused(result, *texts, code=2):
    """That exit code, and one line on standard error that says all of `texts`."""
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr.startswith("mixerzoo: ")
    assert result.stderr.count("\n") == 1
    for text in texts:
        assert text in result.stderr


def record(folder):
    content = json.loads((folder / "prune.json").read_text())
    assert json.dumps(content, allow_nan=False)
    return content


@pytest.fixture(scope="module")
def pruned(place):
    """What a whole run of the command left, and what it printed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        told = run("--targets", "70%", "45%", "--out", "family")
        assert told.exit_code == 0, told.stderr
    return place / "family", told


def test_every_target_becomes_a_student_that_loads_and_is_smaller(pruned):
    folder, told = pruned
    assert {path.name for path in folder.iterdir()} == {"prune.json", "penalised", "pruned-70", "pruned-45"}
    images = torch.randn(3, 1, 16, 16)
    sizes = []
    for name, target in (("pruned-70", 0.7), ("pruned-45", 0.45)):
        assert {path.name for path in (folder / name).iterdir()} == FILES
        result = json.loads((folder / name / "result.json").read_text())
        assert json.dumps(result, allow_nan=False)
        model = mixerzoo.load(folder / name)
        assert model(images).shape == (3, 10)
        assert result["params"] == count_params(model)
        assert result["latency_share"] <= target
        assert result["latency_ms"] == pytest.approx(result["latency_share"] * result["teacher_ms"])
        assert set(result["phases"]) == {"cut", "refitted", "finetuned"}
        best = min(phase["validation"]["loss"] for phase in result["phases"].values())
        assert result["validation"]["after"]["loss"] == pytest.approx(best, rel=1e-4)
        sizes.append(result["params"])
        assert f"{result['test']['after']['agreement']:.2%}" in told.stdout
    assert sizes[0] > sizes[1]
    content = record(folder)
    assert content["before"]["params"] > sizes[0]
    assert list(content["students"]) == ["70", "45"]
    plan = json.loads((folder / "pruned-45" / "plan.json").read_text())["plan"]
    assert any("[" in candidate for candidate in plan.values())


def test_the_same_command_changes_nothing_and_more_targets_are_added(place, pruned, monkeypatch):
    folder, _ = pruned
    monkeypatch.chdir(place)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert run("--targets", "70%,45%", "--out", "family").exit_code == 0
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert run("--targets", "62.5%", "--out", "family").exit_code == 0
    assert (folder / "pruned-62.5" / "result.json").exists()
    kept = {
        path: data for path, data in before.items() if path.parent.name.startswith(("pruned", "penalised"))
    }
    assert all(path.read_bytes() == data for path, data in kept.items())
    shutil.rmtree(folder / "pruned-62.5")


def test_it_is_logged(place, pruned):
    with tiny_search.mlflow_client(place) as client:
        runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
        found = {r.info.run_name: r for r in runs}
    student = found["pruned-45"]
    family = next(r for r in runs if r.info.run_id == student.data.tags["mlflow.parentRunId"])
    assert family.data.tags["mixerzoo.source"] == "prune"
    assert "train_loss" in family.data.metrics
    assert {"latency_share", "params", "loss", "test_agreement", "cut.loss"} <= set(student.data.metrics)


def test_what_was_killed_goes_on(here):
    """Killed while the second student is distilled, the first is not touched again, and the result is the same."""
    whole = run("--targets", "70%,45%", "--out", "whole")
    assert whole.exit_code == 0, whole.stderr
    with pytest.MonkeyPatch.context() as patch:
        real = prune_module.Pruner.tuned

        def stops(self, student, **options):
            if any(options["checkpoint"].parent.glob("pruned-70")):
                raise KeyboardInterrupt
            return real(self, student, **options)

        patch.setattr(prune_module.Pruner, "tuned", stops)
        assert run("--targets", "70%,45%", "--out", "parts").exit_code != 0
    assert (here / "parts" / ".pruning-45" / "phases.json").exists()
    first = (here / "parts" / "pruned-70" / "model.safetensors").stat().st_mtime_ns
    told = run("--targets", "70%,45%", "--out", "parts")
    assert told.exit_code == 0, told.stderr
    assert (here / "parts" / "pruned-70" / "model.safetensors").stat().st_mtime_ns == first
    one, other = (record(here / name)["students"]["45"] for name in ("whole", "parts"))
    assert one["sizes"] == other["sizes"]
    assert one["test"] == other["test"]


def run_of(folder):
    """Return the MLflow run of a family, and the names of its children."""
    with tiny_search.mlflow_client(folder.parent) as client:
        found = client.get_run(record(folder)["mlflow_run_id"])
        children = client.search_runs(
            [found.info.experiment_id], f"tags.`mlflow.parentRunId` = '{found.info.run_id}'"
        )
    return found, [child.info.run_name for child in children]


@pytest.mark.parametrize("moment", ["note_penalised", "note_student"])
def test_what_was_written_and_not_noted_is_noted_and_logged_by_the_next_start(here, monkeypatch, moment):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Family, moment, killed)
        assert run("--targets", "45%", "--out", "mine").exit_code != 0
    family = here / "mine"
    left = temporary_of(family / "pruned-45")
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    if moment == "note_student":
        monkeypatch.setattr(prune_module.Work, "_pruned", None)
    told = run("--targets", "45%", "--out", "mine")
    assert told.exit_code == 0, told.stderr
    assert {path.name for path in family.iterdir()} == {"prune.json", "penalised", "pruned-45"}
    content = record(family)
    assert content["penalised"]["steps"] == 6
    assert list(content["students"]) == ["45"]
    assert "curve" not in json.dumps(content)
    found, children = run_of(family)
    assert (found.info.status, children) == ("FINISHED", ["pruned-45"])


def test_a_target_that_fails_after_the_training_takes_no_other_with_it(here, monkeypatch):
    real = Thresholds.reach

    def reach(self, target, **options):
        if target == 0.7:
            raise MixerzooError("the student takes 69.9% of it as it is; give a lower target")
        return real(self, target, **options)

    monkeypatch.setattr(Thresholds, "reach", reach)
    told = run("--targets", "70%,45%", "--out", "mine")
    refused(told, "69.9% of it as it is")
    assert list(record(here / "mine")["students"]) == ["45"]


def test_a_target_that_was_reached_is_not_checked_again(here, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(prune_module.Pruner, "tuned", None)
        with pytest.raises(TypeError):
            run("--targets", "45%", "--out", "mine")
    monkeypatch.setattr(Thresholds, "demand_reachable", None)
    told = run("--targets", "45%", "--out", "mine")
    assert told.exit_code == 0, told.stderr


def test_two_processes_do_not_prune_into_one_folder(here):
    with held(lock_of(here / "mine"), wait=False):
        refused(run("--targets", "45%", "--out", "mine"), "'mine': another process prunes there")
    assert not (here / "mine").exists()


def test_parameters_and_operations_can_be_targets_too(here):
    quick = ("--steps", "0", "--finetune-steps", "0", "--quiet", "--threads", "1")
    for by in ("params", "flops"):
        told = run("--targets", "60%", "--by", by, "--out", by, quick=quick)
        assert told.exit_code == 0, told.stderr
        result = record(here / by)["students"]["60"]
        of = {"params": result["params"], "flops": result["flops"]}[by]
        teacher = {"params": count_params(tiny_search.tiny.tiny_vit()), "flops": None}[by]
        assert teacher is None or of <= 0.6 * teacher
        assert not (here / by / "penalised").exists()
        assert set(result["phases"]) == {"cut", "refitted"}


def test_another_pruning_in_the_folder_is_refused(place, pruned, monkeypatch):
    monkeypatch.chdir(place)
    refused(
        run("--targets", "50%", "--penalty", "0.5", "--out", "family"),
        "penalty is 0.1 there, 0.5 here",
        "--out",
    )
    refused(run("--targets", "50%", "--out", "run"), "holds no pruned students")


def test_a_pruning_that_was_killed_while_it_began_goes_on(tmp_path):
    family = Family(tmp_path / "family", {"by": "latency"})
    family.path.mkdir()
    temporary_of(family.path / "prune.json").write_text('{"half')
    family.check()
    family.note(run="a")
    family.check()


def test_targets_out_of_reach_are_refused_before_anything_is_written(here):
    refused(run("--targets", "3%", "--out", "none"), "target 0.03", "out of reach", "give at least", code=3)
    refused(run("--targets", "99%", "--out", "none"), "as it is", "lower target")
    assert not (here / "none").exists()


@pytest.mark.parametrize(
    ("words", "texts"),
    [
        (("--targets", "80"), ("--targets 80", "80%,60%")),
        (("--targets", "120%"), ("--targets 120%",)),
        (("--targets", ","), ("at least one share",)),
        (("--steps", "5", "--minutes", "1"), ("one of --minutes and --steps",)),
        (("--penalty", "-1"), ("--penalty -1",)),
        (("--images", "3"), ("--images 3",)),
        (("--threads", "0"), ("--threads 0",)),
        (("60%",), ("'60%'", "--targets")),
    ],
)
def test_bad_arguments_are_one_line(here, words, texts):
    refused(run(*words, quick=()), *texts)
    assert not (here / "run" / "pruned").exists()


def test_a_student_without_units_is_refused(here):
    plan = {f"blocks.{i}.{part}": "none@1" for i in range(2) for part in ("attn", "mlp")}
    teacher = open_teacher("tiny")
    choices = {
        site: make_replacement(Candidate.parse(text), teacher.site(site)) for site, text in plan.items()
    }
    student = Student(plan=Plan.from_json(plan), model=assemble(teacher.model, choices))
    save_student(here / "bare", student, teacher)
    refused(run("--plan", "bare", "--targets", "60%"), "no site of this student can be pruned")


@pytest.mark.slow
def test_the_best_student_of_a_search_is_pruned_on_the_scale_of_its_run(here):
    options = tiny_search.FAST | {"finetune_minutes": 0, "mixers": tiny_search.MIXERS}
    found = search("tiny", "data.npz", budget="80%", out="searched", **options).summary
    told = CliRunner().invoke(main, ["prune", "searched", *QUICK, "--targets", "40%"], catch_exceptions=False)
    assert told.exit_code == 0, told.stderr
    row = record(here / "searched" / "pruned")["students"]["40"]
    assert row["teacher_ms"] == found["teacher"]["latency_ms"]
    assert row["latency_ms"] < found["best"]["latency_ms"]
    # Another number of threads, or another machine, has another scale.
    RunDirectory(here / "searched").note(teacher_ms=99.0)
    counted = ("--by", "params", "--targets", "40%", "--steps", "0", "--finetune-steps", "0", "--quiet")
    for threads, ms in (("1", 99.0), ("2", found["teacher"]["latency_ms"])):
        words = ["prune", "searched", *counted, "--threads", threads, "--out", threads]
        assert CliRunner().invoke(main, words, catch_exceptions=False).exit_code == 0
        content = record(here / threads)
        assert content["before"]["teacher_ms"] == content["students"]["40"]["teacher_ms"] == ms
