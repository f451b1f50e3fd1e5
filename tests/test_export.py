"""`mixerzoo export`: what is written computes what the student does, takes any batch, and serves on its own."""

import io
import json
import math
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_run
import tiny_search
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors import safe_open
from tiny_run import refused
from torch import nn

import mixerzoo
from mixerzoo import Caps, MixerSpec, hookimpl
from mixerzoo.cli import main
from mixerzoo.data import ImageConfig, load_images, open_npz
from mixerzoo.export.hub import base_model
from mixerzoo.export.onnx import PACKAGES
from mixerzoo.export.parity import batches_of, compare_outputs
from mixerzoo.export.preprocess import Preprocess
from mixerzoo.export.run import export_student
from mixerzoo.files import read_json
from mixerzoo.hosts import Teacher, as_teacher
from mixerzoo.hosts.timm_vit import TimmVitHost
from mixerzoo.latency import Rounds
from mixerzoo.opening import open_data
from mixerzoo.predict.predictor import _prepared
from mixerzoo.registry import temporary_plugin
from mixerzoo.student import load_student, read_plan, save_student
from mixerzoo.temporary import temporary_of

NAMES = [f"kind {number}" for number in range(10)]  # of the classes, as the run has them


class Another(nn.Module):
    """Computes something else where it is exported."""

    def forward(self, x):
        return x * 1.01 if torch.compiler.is_compiling() else x


class OneBatch(nn.Module):
    """Is exported for one batch size alone."""

    def forward(self, x):
        return x if x.shape[0] == 2 else 2 * x


class Plugin:
    @hookimpl
    def register_mixers(self, register):
        caps = Caps(any_length=True, exportable=True)
        for name, build in (("another", lambda: Another()), ("one_batch", lambda: OneBatch())):
            register(MixerSpec(name=name, build=build, summary="", caps=caps))


@pytest.fixture(scope="module", autouse=True)
def _tiny_world():
    with (
        tiny_search.tiny_world(),
        temporary_plugin(Plugin(), name="mixerzoo-odd"),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr("mixerzoo.export.run.ROUNDS", Rounds(least=2, most=2))
        yield


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with data and a run in it."""
    monkeypatch.chdir(tmp_path)
    write_named_run()
    return tmp_path


@pytest.fixture(scope="module")
def onnx(tmp_path_factory):
    """A folder in which a run was exported as ONNX, and what was printed."""
    for package in PACKAGES:
        pytest.importorskip(package, reason="needs the extra onnx")
    folder = tmp_path_factory.mktemp("onnx")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_named_run()
        result = run("run", "--format", "onnx", "--threads", "1")
    assert result.exit_code == 0, (result.stderr, result.exception)
    return folder, result


def write_named_run():
    tiny_run.write_run("run")
    tiny_run.change("run/run.json", classes=NAMES)


def run(*words):
    return CliRunner().invoke(main, ["export", *words], catch_exceptions=False)


def quick(*words):
    result = run(*words, "--no-latency", "--json")
    assert result.exit_code == 0, (result.stderr, result.exception)
    return json.loads(result.stdout)


def real_images(count):
    return tiny_search.pictures(count)


def served(folder, batch):
    """Run the exported file as somebody would who has nothing of mixerzoo."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(folder / "run" / "export" / "model.onnx", options)
    return session, session.run(None, {"images": batch.numpy()})[0]


# ONNX


def test_the_onnx_file_computes_what_the_student_does_at_any_batch(onnx):
    folder, _ = onnx
    student = mixerzoo.load(folder / "run")
    for batch in (1, 3, 7):
        images = tiny.tiny_images(batch)
        session, found = served(folder, images)
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(found), student(images), rtol=0, atol=1e-4)
    (taken,), (given,) = session.get_inputs(), session.get_outputs()
    assert (taken.name, taken.shape, taken.type) == ("images", ["batch", 1, 16, 16], "tensor(float)")
    assert (given.name, given.shape) == ("logits", ["batch", 10])


def test_what_serving_takes_is_beside_the_file_and_in_it(onnx):
    folder, _ = onnx
    export = folder / "run" / "export"
    assert {path.name for path in export.iterdir()} == {"model.onnx", "model.onnx.json"}
    about = read_json(export / "model.onnx.json")
    assert about["preprocess"] == {
        "mode": "L",
        "crop_mode": "center",
        "resize": [16, 16],
        "interpolation": "bilinear",
        "crop": [16, 16],
        "scale": 1 / 255,
        "mean": [0.5],
        "std": [0.5],
    }
    assert about["classes"] == NAMES
    assert about["plan"] == read_json(folder / "run" / "best" / "plan.json")["plan"]
    session, _ = served(folder, tiny.tiny_images(1))
    inside = session.get_modelmeta().custom_metadata_map
    for name in ("preprocess", "classes", "plan", "input", "output"):
        assert json.loads(inside[name]) == about[name]
    assert inside["teacher"] == "tiny"


def test_what_is_printed_has_sizes_the_difference_and_latencies(onnx):
    _, result = onnx
    assert re.search(r"^files +0\.\d{3} MiB   run/export/model\.onnx$", result.stdout, re.MULTILINE)
    found = re.search(
        r"difference (\S+) at most, (\S+) of the outputs' range, on (\d+) images", result.stdout
    )
    assert 0 <= float(found[2]) <= float(found[1]) <= 1e-4
    assert int(found[3]) == 80  # there are no more
    assert "same top class on 100.00%" in result.stdout
    assert "batches    of 1, 3, " in result.stdout
    assert re.search(
        r"latency    [\d.]+ ms -> [\d.]+ ms under onnxruntime \(\d+% of the teacher\); "
        r"the student in eager PyTorch [\d.]+ ms",
        result.stdout,
    )
    assert result.stderr == ""


@pytest.mark.parametrize("package", PACKAGES)
def test_a_missing_package_is_named(here, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    before = tiny_run.files(here)
    refused(run("run", "--format", "onnx"), f"package '{package}'", "pip install 'mixerzoo[onnx]'")
    assert tiny_run.files(here) == before


# torch.export


def test_the_exported_program_computes_what_the_student_does_at_any_batch(here):
    found = run("run", "--format", "torch-export", "--images", "20", "--threads", "1", "--json")
    assert found.exit_code == 0, (found.stderr, found.exception)
    told = json.loads(found.stdout)
    assert told["parity"]["images"] == 20
    assert told["parity"]["batch_sizes"] == [1, 3, 16]
    assert told["parity"]["agreement"] == 1
    assert told["latency"]["runtime"] == "torch.export"
    assert min(told["latency"][name] for name in ("exported_ms", "teacher_ms", "eager_ms")) > 0
    assert told["latency"]["environment"]["threads"] == 1
    path = here / "run" / "export" / "model.pt2"
    assert told["files_mib"].keys() == {"run/export/model.pt2", "run/export/model.pt2.json"}
    assert told["mib"] == pytest.approx(sum(told["files_mib"].values()), abs=2e-3)
    extra = {"about.json": ""}
    program = torch.export.load(path, extra_files=extra).module()
    assert json.loads(extra["about.json"]) == read_json(here / "run" / "export" / "model.pt2.json")
    student = mixerzoo.load("run")
    for batch in (1, 5):
        images = tiny.tiny_images(batch)
        with torch.no_grad():
            torch.testing.assert_close(program(images), student(images), rtol=0, atol=1e-4)


def test_any_folder_of_a_student_will_do(here):
    (here / "run" / "best").rename(here / "run" / "refit")
    found = quick("run/refit", "--format", "safetensors", "--out", "served", "--images", "4")
    assert found["path"] == "served/model.safetensors"
    assert {path.name for path in (here / "served").iterdir()} == {"model.safetensors"}


# One safetensors file


def test_one_file_holds_weights_and_plan(here):
    found = quick("run", "--format", "safetensors", "--out", "student.safetensors")
    assert found["parity"]["difference"] == 0
    images = tiny.tiny_images(3)
    with torch.no_grad():
        assert torch.equal(mixerzoo.load("student.safetensors")(images), mixerzoo.load("run")(images))
    content = read_plan(Path("student.safetensors"))
    assert content["plan"] == read_json(here / "run" / "best" / "plan.json")["plan"]
    assert content["classes"] == NAMES
    with safe_open("student.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(mixerzoo.load("run").state_dict())
    assert {path.name for path in here.iterdir()} == {"data.npz", "run", "student.safetensors"}


def test_data_to_compare_on_name_no_classes(here):
    for number, image in enumerate(real_images(40)):
        folder = here / "other" / f"other {number % 10}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{number}.png")
    quick("run", "--format", "torch-export", "--data", "other", "--images", "4")
    assert read_json(here / "run" / "export" / "model.pt2.json")["classes"] == NAMES
    (here / "run" / "best").rename("alone")  # the run is not known, and so are the names
    quick("alone", "--format", "torch-export", "--data", "other", "--images", "4", "--out", "alone.pt2")
    assert read_json(here / "alone.pt2.json")["classes"] == []


def test_one_file_may_be_exported_again(here):
    quick("run", "--format", "safetensors", "--out", "student.safetensors")
    refused(
        run("student.safetensors", "--format", "hub", "--no-latency"), "its data, are not known", "--data"
    )
    quick("student.safetensors", "--format", "hub", "--data", "data.npz", "--out", "published")
    assert load_student(here / "published").plan == load_student(here / "student.safetensors").plan
    refused(
        run(
            "student.safetensors",
            "--format",
            "safetensors",
            "--data",
            "data.npz",
            "--out",
            "student.safetensors",
        ),
        "is the student itself",
    )


def test_weights_without_a_plan_are_no_student(here):
    weights = here / "run" / "best" / "model.safetensors"
    refused(run(str(weights), "--format", "hub"), "weights without a plan", "--format safetensors")


# A folder for a hub


def test_the_folder_for_a_hub_loads_and_its_card_is_valid(here):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    found = quick("run", "--format", "hub", "--out", "published")
    folder = here / "published"
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
        "plan.json",
    }
    assert found["parity"]["difference"] == 0
    images = tiny.tiny_images(3)
    with torch.no_grad():
        assert torch.equal(mixerzoo.load(folder)(images), mixerzoo.load("run")(images))
    card = huggingface_hub.ModelCard.load(folder / "README.md")
    assert card.data.library_name == "mixerzoo"
    assert card.data.pipeline_tag == "image-classification"
    assert {"mixerzoo", "pool", "linear_attention", "mlp_slice"} <= set(card.data.tags)
    assert card.data.license is None
    assert card.data.base_model is None  # the tiny teacher is on no hub
    measured = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert measured == {"accuracy": 0.9, "agreement": 0.95, "latency": 3.0}
    for text in ("92.00% | 90.00%", "4.1 | 3 (73%)", "`blocks.1.attn` | `pool@1`", "mixerzoo==", "threads 1"):
        assert text in card.text
    config = read_json(folder / "config.json")
    assert config["image_size"] == [16, 16]
    assert config["preprocess"]["mean"] == [0.5]
    assert config["num_classes"] == len(config["id2label"]) == 10
    assert config["plugins"] == {"mixerzoo": mixerzoo.__version__, "tiny": "0"}


def test_a_downloaded_folder_of_links_loads(here):
    quick("run", "--format", "hub", "--out", "published")
    (here / "snapshot").mkdir()
    for path in (here / "published").iterdir():
        (here / "snapshot" / path.name).symlink_to(path)
    mixerzoo.load(here / "snapshot")


def test_a_folder_is_never_replaced(here):
    quick("run", "--format", "hub", "--out", "published")
    (here / "published" / "README.md").write_text("license: mine")
    refused(run("run", "--format", "hub", "--out", "published"), "'published' exists", "--out")
    assert (here / "published" / "README.md").read_text() == "license: mine"


def test_the_base_model_is_the_name_of_pretrained_weights_on_the_hub():
    def content(name):
        return {"host": "timm", "architecture": {"model": name}}

    assert base_model("vit_small_patch14_dinov2.lvd142m", content("vit_small_patch14_dinov2")) == (
        "timm/vit_small_patch14_dinov2.lvd142m"
    )
    assert base_model("digits_vit", content("digits_vit")) is None
    assert base_model("VisionTransformer", content("vit_small_patch14_dinov2")) is None
    assert base_model("tiny", {"host": "tiny", "architecture": {"model": "tiny"}}) is None


# Embeddings, and teachers that no name builds


def test_a_student_that_embeds_is_compared_without_classes(here):
    tiny_run.write_run("embeds", model="tiny_embedding")
    found = quick("embeds", "--format", "torch-export")
    assert found["parity"]["agreement"] is None
    about = read_json(here / "embeds" / "export" / "model.pt2.json")
    assert about["output"] == {"name": "embedding", "shape": ["batch", 24], "dtype": "float32"}
    assert about["classes"] == []


def test_a_teacher_that_cannot_be_built_is_given_in_python(tmp_path):
    teacher: Teacher = as_teacher(tiny.tiny_vit(), TimmVitHost(), name="mine")
    save_student(tmp_path / "student", tiny_run.make_student(teacher), teacher)
    data = str(tiny_search.write_npz(tmp_path / "data.npz"))
    with pytest.raises(mixerzoo.MixerzooError, match=r"'mine' cannot be built by name"):
        export_student(tmp_path / "student", "hub", data=data)
    model = tiny.tiny_vit(seed=5).train()
    found = export_student(
        tmp_path / "student", "hub", data=data, model=model, threads=1, images=20, batch_size=2
    )
    assert (found.latency.runtime, found.latency.to_json()["eager_ms"]) == ("eager", None)
    assert "model=TEACHER" in (found.path / "README.md").read_text()
    assert found.parity.passed
    assert found.latency.environment["batch_size"] == 2
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


# What can be rounding


def wide(x):
    return 8 * (20 * x.mean((2, 3))).sin()


class Coarse(nn.Module):
    """A student whose outputs, -8 to 8, are some 3e-4 from exact in float32; `stubborn` insists on that."""

    def __init__(self, stubborn=False):
        super().__init__()
        self.stubborn = stubborn
        self.register_buffer("far", torch.tensor(5000.3))

    def forward(self, x):
        assert not (self.stubborn and x.dtype == torch.float64)
        return (wide(x) + self.far) - self.far


@pytest.fixture
def compared(tmp_path):
    data = open_npz(str(tiny_search.write_npz(tmp_path / "data.npz")))
    config = as_teacher(tiny.tiny_vit(), TimmVitHost(), name="mine").image

    def compare(student, exported, **options):
        return compare_outputs(student, exported, data, config, images=10, classifier=True, **options)

    return compare


def test_a_difference_that_float32_makes_is_rounding(compared):
    student = Coarse()
    found = compared(student, wide)
    assert 1e-4 < found.difference < 5e-4
    assert found.rounding == pytest.approx(found.difference, rel=0.1)
    assert found.exact < 1e-5
    assert found.passed
    assert "from float64 the student is" in found.text()
    again = compared(student, student)
    assert (again.difference, again.rounding, again.passed) == (0, None, True)


@pytest.mark.parametrize("off", [2e-3, 0.5])
def test_a_difference_that_float32_does_not_make_is_none(compared, off):
    found = compared(Coarse(), lambda x: wide(x) + off)
    assert found.exact == pytest.approx(off, rel=0.01)
    assert not found.passed


def test_a_student_of_large_errors_does_not_excuse_its_file(compared):
    class Coarser(Coarse):
        def forward(self, x):
            return super().forward(x * 1e-3) * 1e2

    found = compared(Coarser(), lambda x: 1e2 * wide(1e-3 * x))
    assert found.exact < found.rounding
    assert found.relative > 1e-4
    assert not found.passed


def test_a_given_tolerance_is_all_that_counts(compared):
    found = compared(Coarse(), wide, tolerance=1e-6)
    assert (found.rounding, found.exact, found.tolerance, found.passed) == (None, None, 1e-6, False)


def test_what_cannot_be_had_in_float64_is_held_to_the_tolerance(compared):
    found = compared(Coarse(stubborn=True), wide)
    assert (found.rounding, found.tolerance, found.passed) == (None, 1e-4, False)


# What is refused, and what leaves nothing behind


@pytest.mark.parametrize("format", ["onnx", "torch-export"])
def test_mixers_that_cannot_be_exported_are_named_with_their_sites(here, format):
    tiny_run.write_run("other", choices={"blocks.0.attn": "gated_delta@1", "blocks.1.attn": "pool@1"})
    before = tiny_run.files(here)
    refused(
        run("other", "--format", format),
        f"'other' cannot be exported as {format}",
        "'gated_delta' at blocks.0.attn)",
        "--format safetensors",
        "--runtime onnxruntime",
    )
    assert tiny_run.files(here) == before
    quick("other", "--format", "safetensors")


@pytest.mark.parametrize("format", [pytest.param("onnx", marks=pytest.mark.slow), "torch-export"])
def test_a_file_that_computes_something_else_is_not_left_in_place(here, format):
    tiny_run.write_run("odd", choices={"blocks.0.attn": "another@1"})
    (here / "out").mkdir()
    name = {"onnx": "model.onnx", "torch-export": "model.pt2"}[format]
    (here / "out" / name).write_text("an earlier one")
    before = tiny_run.files(here)
    result = run("odd", "--format", format, "--out", "out", "--images", "8")
    refused(result, f"'odd' as {format} computes something else", "0.0001 can be rounding", code=1)
    assert tiny_run.files(here) == before
    found = quick("odd", "--format", format, "--images", "8", "--tolerance", "100")
    assert found["parity"]["difference"] > 1e-4


def test_a_mixer_of_one_batch_size_is_refused(here):
    tiny_run.write_run("odd", choices={"blocks.0.attn": "one_batch@1"})
    before = tiny_run.files(here)
    refused(
        run("odd", "--format", "torch-export"),
        "'odd' cannot be exported as torch-export (",
        "--format safetensors",
    )
    assert tiny_run.files(here) == before


def test_a_file_that_its_runtime_does_not_open_is_refused(here, monkeypatch):
    for package in PACKAGES:
        pytest.importorskip(package, reason="needs the extra onnx")

    def lacks(*_args):
        raise RuntimeError("NOT_IMPLEMENTED : Could not find an implementation for STFT(17)\nnode")

    before = tiny_run.files(here)
    monkeypatch.setattr("mixerzoo.export.formats.open_session", lacks)
    refused(
        run("run", "--format", "onnx"),
        "'run' as onnx does not open under onnxruntime (RuntimeError: NOT_IMPLEMENTED",
        "--format safetensors or hub takes it",
    )
    assert tiny_run.files(here) == before


def test_what_a_killed_process_of_the_same_number_left_is_in_nobodys_way(here):
    target = Path("served") / "student.safetensors"
    left = temporary_of(target)
    left.mkdir(parents=True)
    (left / target.name).write_text("half")
    quick("run", "--format", "safetensors", "--out", str(target))
    assert list(target.parent.iterdir()) == [target]
    mixerzoo.load(target)


def test_an_empty_folder_is_filled_also_where_one_stands(here, monkeypatch):
    (here / "published").mkdir()
    monkeypatch.chdir(here / "published")
    found = quick("../run", "--format", "hub", "--out", ".", "--data", "../data.npz")
    assert {path.name for path in Path().iterdir()} == {
        "model.safetensors", "plan.json", "config.json", "README.md",
    }  # fmt: skip
    assert set(found["files_mib"]) == {str(path.resolve()) for path in Path().iterdir()}
    assert {path.name for path in here.iterdir()} == {"data.npz", "run", "published"}
    mixerzoo.load(".")


def test_a_stop_leaves_nothing(here, monkeypatch):
    def stopped(*_args, **_kwargs):
        raise KeyboardInterrupt

    before = tiny_run.files(here)
    monkeypatch.setattr("mixerzoo.export.run.compare_outputs", stopped)
    with pytest.raises(KeyboardInterrupt):
        export_student(Path("run"), "safetensors")
    assert tiny_run.files(here) == before


def unfinished(here):
    (here / "run" / "summary.json").unlink()
    for path in (here / "run" / "best").iterdir():
        path.unlink()


def no_best(here):
    unfinished(here)
    (here / "run" / "summary.json").write_text(json.dumps({"met": False, "best": None}))


def no_data(here):
    (here / "data.npz").unlink()


def full(here):
    (here / "model.onnx").mkdir()


def lacking(here):
    plugins = {"theirs": "mixerzoo-theirs 1.2", "its": "mixerzoo-theirs 1.2", "pool": "mixerzoo 0.1.0"}
    tiny_run.change(here / "run" / "best" / "plan.json", plugins=plugins)


WRONG = {
    "no such run": (None, ["nowhere"], ["'nowhere': no such run or student"]),
    "not a run": (None, ["."], ["'.' is neither a run directory nor a student"]),
    "a file": (None, ["data.npz"], ["'data.npz': not a student"]),
    "unfinished": (unfinished, ["run"], ["run 'run' is not finished"]),
    "no best": (no_best, ["run"], ["run 'run' has no best student"]),
    "format": (None, ["run", "--format", "onxx"], ["--format onxx", "did you mean 'onnx'?"]),
    "images": (None, ["run", "--images", "3"], ["--images 3", "at least 4"]),
    "tolerance": (None, ["run", "--tolerance", "0"], ["--tolerance 0", "positive"]),
    "threads": (None, ["run", "--threads", "0"], ["--threads 0", "at least 1"]),
    "batch": (None, ["run", "--batch-size", "0"], ["--batch-size 0", "at least 1"]),
    "data that have gone": (no_data, ["run"], ["data 'data.npz'", "run 'run'", "--data"]),
    "no such data": (None, ["run", "--data", "there"], ["data 'there'", "no such folder"]),
    "suffix": (None, ["run", "--out", "model.zip"], ["--out model.zip", "ends in .onnx"]),
    "a folder in its place": (full, ["run", "--out", "model.onnx"], ["'model.onnx' exists"]),
    "a place that is none": (
        None,
        ["run", "--format", "safetensors", "--out", "/dev/null/a.safetensors"],
        ["'/dev/null/a.safetensors' cannot be written", "--out"],
    ),
    "a plugin that is missing": (
        lacking,
        ["run"],
        ["needs mixer 'theirs' of mixerzoo-theirs 1.2, mixer 'its' of mixerzoo-theirs 1.2; install that"],
    ),
}


@pytest.mark.parametrize(("spoil", "words", "texts"), WRONG.values(), ids=WRONG)
def test_a_mistake_costs_one_line_and_leaves_nothing(here, spoil, words, texts):
    if spoil is not None:
        spoil(here)
    before = tiny_run.files(here)
    words = words if "--format" in words else [*words, "--format", "onnx"]
    refused(run(*words), *texts)
    assert tiny_run.files(here) == before
    assert not (here / "run" / "export").exists()


# The parts


@pytest.mark.parametrize("count", [4, 5, 20, 21, 200])
def test_every_image_is_in_one_batch_and_there_are_one_and_three(count):
    batches = list(batches_of(count))
    assert [number for batch in batches for number in batch] == list(range(count))
    assert [len(batch) for batch in batches[:2]] == [1, 3]
    assert all(batches)


CONFIGS = {
    "square": ImageConfig(size=(3, 24, 24), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4)),
    "cropped": ImageConfig(
        size=(3, 24, 24), mean=(0.5,) * 3, std=(0.2,) * 3, interpolation="bilinear", crop_pct=0.9
    ),
    "oblong": ImageConfig(size=(3, 16, 24), mean=(0.5,) * 3, std=(0.2,) * 3, crop_pct=0.95),
    "squashed": ImageConfig(size=(3, 24, 24), mean=(0.5,) * 3, std=(0.2,) * 3, crop_mode="squash"),
    "squashed and cropped": ImageConfig(
        size=(3, 16, 24), mean=(0.5,) * 3, std=(0.2,) * 3, crop_pct=0.9, crop_mode="squash"
    ),
    "grey": ImageConfig(size=(1, 20, 20), mean=(0.5,), std=(0.25,), interpolation="nearest"),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("size", [(24, 24), (37, 23), (9, 50), (101, 100), (20, 21)])
def test_pillow_and_numpy_prepare_images_as_timm_does(config, size):
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    steps = Preprocess.of(config)
    expected = _prepared([image], config)[0].numpy()
    np.testing.assert_allclose(steps(image), expected, atol=1e-5)
    assert Preprocess.from_json(json.loads(json.dumps(steps.to_json()))) == steps


def test_crop_modes_that_pillow_and_numpy_do_not_prepare_are_refused(here):
    image = read_json(here / "run" / "best" / "plan.json")["image"]
    tiny_run.change("run/best/plan.json", image=image | {"crop_mode": "border"})
    before = tiny_run.files(here)
    refused(run("run", "--format", "torch-export"), "crop mode 'border'", "--format safetensors")
    assert tiny_run.files(here) == before
    quick("run", "--format", "safetensors", "--out", "student.safetensors")


def test_what_was_written_without_a_crop_mode_is_center():
    steps = Preprocess.of(CONFIGS["cropped"])
    older = {name: value for name, value in steps.to_json().items() if name != "crop_mode"}
    assert Preprocess.from_json(older) == steps
    with pytest.raises(ValueError, match="crop mode border"):
        Preprocess.from_json(older | {"crop_mode": "border"})


def test_data_are_prepared_alike(here):
    data = open_data("data.npz")
    config = load_teacher_image()
    steps = Preprocess.of(config)
    expected = load_images(data, range(6), config).numpy()
    np.testing.assert_allclose(np.stack([steps(data.image(at)) for at in range(6)]), expected, atol=1e-6)


def load_teacher_image():
    return ImageConfig(size=(1, 16, 16), mean=(0.5,), std=(0.5,), interpolation="bilinear")


def test_what_is_not_finite_is_a_difference(here):
    class Nan(nn.Module):
        def forward(self, x):
            return x * math.nan

    class NanPlugin:
        @hookimpl
        def register_mixers(self, register):
            register(
                MixerSpec(name="nothing_left", build=lambda: Nan(), summary="", caps=Caps(exportable=True))
            )

    with temporary_plugin(NanPlugin(), name="nan"):
        tiny_run.write_run("nan", choices={"blocks.0.attn": "nothing_left@1"})
        refused(run("nan", "--format", "safetensors"), "computes something else", "nan", code=1)


# The README's path


def readme_section():
    """Return the commands and the server of the README's section on serving."""
    text = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    section = text[text.index("<!-- serve it -->") :].partition("\n## ")[0]
    (commands,) = re.findall(r"^```sh\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    (server,) = re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    lines = [line.partition("#")[0].split() for line in commands.splitlines()]
    return [line for line in lines if line], server


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_readme_s_path_from_a_run_to_a_server_works_as_written(tmp_path, monkeypatch):
    for package in PACKAGES:
        pytest.importorskip(package, reason="needs the extra onnx")
    monkeypatch.chdir(tmp_path)
    (_, search, *budget), *commands = readme_section()[0]
    assert (search, budget) == ("search", ["--budget", "65%"])
    # What that search would find, but for the mixers in it.
    choices = {"blocks.1.attn": "none@1", "blocks.6.mlp": "none@1"}
    tiny_run.write_run("runs/digits_vit-65%", model="digits_vit", data="digits", choices=choices)
    data = open_data("digits")
    student, config = (
        mixerzoo.load("runs/digits_vit-65%"),
        ImageConfig(size=(1, 32, 32), mean=(0.5,), std=(0.5,), interpolation="bilinear"),
    )
    with torch.no_grad():
        answers = student(load_images(data, data.splits.test[:60], config)).argmax(-1).tolist()
    seven = data.splits.test[answers.index(7)]
    data.image(seven).save("seven.png")
    for _, *words in commands:
        result = CliRunner().invoke(main, words, catch_exceptions=False)
        assert result.exit_code == 0, (words, result.stderr)
    assert result.stdout.splitlines()[1].split()[:2] == ["seven.png", "7"]

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    source = readme_section()[1]
    assert source.count("8000") == 1
    (tmp_path / "serve.py").write_text(source.replace("8000", str(port)))
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with subprocess.Popen(
        [sys.executable, "-W", "error", "serve.py"], env=kept, stderr=subprocess.PIPE
    ) as server:
        try:
            for at, answer in [(seven, 7), *zip(data.splits.test[:20], answers, strict=False)]:
                content = io.BytesIO()
                data.image(at).save(content, format="png")
                assert asked(server, port, content.getvalue()) == {"class": str(answer)}
        finally:
            server.terminate()
    imported = re.findall(r"^(?:from|import) (\w+)", source, re.MULTILINE)
    assert set(imported) == {"io", "json", "http", "numpy", "onnxruntime", "PIL"}


def asked(server, port, content):
    """Send an image to the server, once it is there, and return its answer."""
    for _ in range(600):
        assert server.poll() is None, server.stderr.read().decode()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}", data=content) as answer:
                return json.loads(answer.read())
        except urllib.error.URLError:
            time.sleep(0.1)
    raise AssertionError("the server does not answer")
