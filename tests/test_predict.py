"""`mixerzoo predict`: images of any kind, by the student itself or by the exported file; broken ones are named."""

import json
import shutil

import numpy as np
import pytest
import tiny_run
import tiny_search
import torch
from click.testing import CliRunner
from PIL import Image
from tiny_run import refused

import mixerzoo
from mixerzoo import Caps, MixerSpec, hookimpl
from mixerzoo.classes import class_names
from mixerzoo.cli import main
from mixerzoo.export.onnx import PACKAGES
from mixerzoo.export.run import export_student
from mixerzoo.images import open_image
from mixerzoo.predict.predictor import open_predictor
from mixerzoo.predict.predictor import predict as predict_images
from mixerzoo.registry import temporary_plugin
from mixerzoo.student_source import find_student


@pytest.fixture(scope="module", autouse=True)
def _tiny_world():
    with tiny_search.tiny_world():
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a run, its data, and an image of each kind."""
    folder = tmp_path_factory.mktemp("predict")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        tiny_run.write_run("run")
    grey = tiny_search.pictures(1)[0]
    Image.fromarray(grey).save(folder / "L.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "I16.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "I16.tiff")
    Image.fromarray(grey.astype(np.int32)).save(folder / "I.tiff")
    Image.fromarray(grey.astype(np.float32) / 255).save(folder / "F.tiff")
    Image.fromarray(grey).convert("RGB").save(folder / "RGB.png")
    Image.fromarray(grey).convert("RGBA").save(folder / "RGBA.png")
    Image.fromarray(grey).convert("LA").save(folder / "LA.png")
    Image.fromarray(grey).convert("P").save(folder / "P.png", transparency=bytes(range(256)))
    Image.fromarray(grey).convert("CMYK").save(folder / "CMYK.tiff")
    Image.fromarray(grey).convert("1").save(folder / "1.png")
    Image.fromarray(grey).save(folder / "frames.gif", save_all=True, append_images=[Image.new("L", (16, 16))])
    (folder / "broken.png").write_bytes(b"not a picture")
    (folder / "short.png").write_bytes((folder / "RGB.png").read_bytes()[:150])
    return folder


@pytest.fixture
def here(place, tmp_path, monkeypatch):
    """A copy of it to work in."""
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def inside(place, monkeypatch):
    """The folder itself, for what changes nothing in it."""
    monkeypatch.chdir(place)
    return place


def run(*words):
    return CliRunner().invoke(main, ["predict", *words], catch_exceptions=False)


def told(*words):
    result = run(*words, "--json")
    assert result.exit_code == 0, (result.stderr, result.exception)
    return json.loads(result.stdout)


def shares(row):
    return {guess["index"]: guess["probability"] for guess in row["classes"]}


def test_the_probabilities_are_the_student_s(inside):
    (row,) = told("run", "L.png", "--top", "10")["images"]
    pixels = torch.from_numpy(np.asarray(Image.open("L.png")).copy())[None, None] / 255
    with torch.no_grad():
        expected = mixerzoo.load("run")((pixels - 0.5) / 0.5)[0].softmax(-1)
    found = shares(row)
    assert sorted(found) == list(range(10))
    assert list(found.values()) == sorted(found.values(), reverse=True)
    for index, share in found.items():
        assert share == pytest.approx(float(expected[index]), abs=1e-5)
    assert sum(found.values()) == pytest.approx(1, abs=1e-4)
    assert row["file"] == "L.png"
    assert all(guess["class"] == str(guess["index"]) for guess in row["classes"])


SAME = [
    "I16.png",
    "I16.tiff",
    "I.tiff",
    "F.tiff",
    "RGB.png",
    "RGBA.png",
    "LA.png",
    "P.png",
    "CMYK.tiff",
    "frames.gif",
]


def test_images_of_every_mode_are_the_same_image(inside):
    rows = told("run", "L.png", *SAME, "--top", "10")["images"]
    assert [row["file"] for row in rows] == ["L.png", *SAME]
    expected = shares(rows[0])
    for row in rows[1:]:
        for index, share in shares(row).items():
            assert share == pytest.approx(expected[index], abs=0.02), row["file"]


@pytest.mark.parametrize("name", ["L.png", *SAME, "1.png"])
def test_every_mode_has_eight_bits_in_the_end(inside, name):
    image = open_image(inside / name).convert("L")
    assert image.mode == "L"
    if name not in ("1.png", "P.png"):
        gap = np.abs(np.asarray(image, dtype=int) - np.asarray(Image.open("L.png"), dtype=int))
        assert gap.max() <= 2, name


def test_the_table_shows_the_top_classes(inside):
    result = run("run", "L.png", "RGB.png", "--top", "2")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["image", "class", "probability"]
    assert len(lines) == 5
    assert lines[1].startswith("L.png ")
    assert lines[2].startswith(" ")
    assert lines[3].startswith("RGB.png ")
    assert all(line.rstrip().endswith("%") for line in lines[1:])


def test_more_classes_than_there_are(inside):
    (row,) = told("run", "L.png", "--top", "1000")["images"]
    assert len(row["classes"]) == 10


def test_broken_images_are_named_and_the_others_go_on(inside):
    result = run("run", "broken.png", "L.png", "short.png", "nowhere.png", "run")
    assert result.exit_code == 0
    assert "L.png" in result.stdout
    named = result.stderr.splitlines()
    assert len(named) == 4
    for name, why, line in zip(
        ["broken.png", "short.png", "nowhere.png", "run"],
        ["not an image", "", "no such file", "a folder"],
        named,
        strict=True,
    ):
        assert line.startswith(f"mixerzoo: image '{name}': ")
        assert why in line
    found = json.loads(run("run", "broken.png", "L.png", "--json").stdout)
    assert [row["file"] for row in found["images"]] == ["L.png"]
    assert [row["file"] for row in found["unreadable"]] == ["broken.png"]


def test_nothing_to_read_is_code_2(inside):
    result = run("run", "broken.png", "nowhere.png")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.splitlines()[-1] == "mixerzoo: none of the 2 images can be read; give image files"


def test_many_images_go_in_batches(here):
    for number, image in enumerate(tiny_search.pictures(70)):
        Image.fromarray(image).save(f"{number:02}.png")
    names = [f"{number:02}.png" for number in range(70)]
    rows = told("run", *names, "--top", "1")["images"]
    assert [row["file"] for row in rows] == names
    assert (
        told("run", names[-1], "--top", "1")["images"][0]["classes"][0]["class"]
        == rows[-1]["classes"][0]["class"]
    )


# Names of classes


def test_class_folders_name_the_classes(here):
    for number, image in enumerate(tiny_search.pictures(40)):
        folder = here / "animals" / f"animal {number % 10}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{number}.png")
    tiny_run.write_run("zoo", data="animals")
    (row,) = told("zoo", "L.png", "--top", "10")["images"]
    assert {guess["class"] for guess in row["classes"]} == {f"animal {number}" for number in range(10)}
    assert all(guess["class"] == f"animal {guess['index']}" for guess in row["classes"])
    expected = tuple(f"animal {number}" for number in range(10))
    for number in range(10):  # something else is there now, and then nothing
        (here / "animals" / f"animal {number}").rename(here / "animals" / f"plant {number}")
    assert class_names(find_student(here / "zoo"), mixerzoo.load("zoo")) == expected
    shutil.rmtree(here / "animals")
    assert class_names(find_student(here / "zoo"), mixerzoo.load("zoo")) == expected
    shutil.copytree("zoo/best", "alone")  # whose run is not known: by number
    (row,) = told("alone", "L.png", "--top", "1")["images"]
    assert row["classes"][0]["class"] == str(row["classes"][0]["index"])


def test_a_checkpoint_of_one_s_own_has_other_classes_than_the_weights_of_that_name(here):
    tiny_run.write_run("digits", model="digits_vit", data="digits", choices={"blocks.0.attn": "pool@1"})
    student = mixerzoo.load("digits")
    tiny_run.change("digits/run.json", identity={"checkpoint": "mine.safetensors"}, classes=[])
    assert class_names(find_student(here / "digits"), student) == ()
    tiny_run.change("digits/run.json", classes=list("abcdefghij"))
    assert class_names(find_student(here / "digits"), student) == tuple("abcdefghij")


def test_digits_are_named_without_their_run(here):
    tiny_run.write_run("digits", model="digits_vit", data="digits", choices={"blocks.0.attn": "pool@1"})
    shutil.copytree("digits/best", "alone")
    source = find_student(here / "alone")
    assert source.run is None
    assert class_names(source, mixerzoo.load("alone")) == tuple("0123456789")


def test_pretrained_weights_of_imagenet_name_its_classes(here):
    tiny_run.change("run/best/plan.json", teacher="vit_base_patch16_224.augreg_in21k_ft_in1k")
    tiny_run.change("run/run.json", identity={"checkpoint": None})

    class Imagenet:
        num_classes = 1000

    names = class_names(find_student(here / "run"), Imagenet())
    assert len(names) == 1000
    assert "goldfish" in names[1]
    tiny_run.change("run/run.json", identity={"checkpoint": "mine.safetensors"})
    assert class_names(find_student(here / "run"), Imagenet()) == ()


# The exported file


@pytest.fixture(scope="module")
def exported(place):
    for package in PACKAGES:
        pytest.importorskip(package, reason="needs the extra onnx")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        found = export_student(place / "run", "onnx", out=place / "served.onnx", images=8, timed=False)
    return found.path


def test_an_exported_file_sees_what_the_student_sees(exported, here):
    images = ["L.png", "I16.png", "RGBA.png"]
    for one, other in zip(
        told("run", *images, "--top", "10")["images"],
        told("served.onnx", *images, "--top", "10")["images"],
        strict=True,
    ):
        for index, share in shares(one).items():
            assert shares(other)[index] == pytest.approx(share, abs=1e-4)
    (here / "served.onnx.json").unlink()  # the file itself knows as much
    again = told("served.onnx", "L.png", "--top", "1")["images"][0]["classes"]
    assert again == told("run", "L.png", "--top", "1")["images"][0]["classes"]


def test_the_file_beside_it_is_what_counts(exported, here):
    about = json.loads((here / "served.onnx.json").read_text())
    tiny_run.change("served.onnx.json", classes=[f"number {at}" for at in range(10)])
    (row,) = told("served.onnx", "L.png", "--top", "1")["images"]
    assert row["classes"][0]["class"].startswith("number ")
    tiny_run.change("served.onnx.json", classes=["few"])
    refused(run("served.onnx", "L.png"), "has 10 classes, and names for 1")
    tiny_run.change("served.onnx.json", classes=[], preprocess=about["preprocess"] | {"mode": "XYZ"})
    refused(run("served.onnx", "L.png"), "'served.onnx': how its images are prepared is not known")
    (here / "served.onnx.json").write_text("[]")
    refused(run("served.onnx", "L.png"), "'served.onnx.json'", "not what mixerzoo export writes")


def test_an_exported_file_of_embeddings_is_told_what_to_do_with_it(exported, here):
    about = json.loads((here / "served.onnx.json").read_text())
    tiny_run.change("served.onnx.json", output=about["output"] | {"name": "embedding"})
    refused(
        run("served.onnx", "L.png"), "'served.onnx' gives embeddings, not classes; onnxruntime gives them"
    )


# Mistakes


def embeds(_here):
    tiny_run.write_run("embeds", model="tiny_embedding")


def no_onnx(here):
    (here / "none.onnx").write_bytes(b"not a model")


WRONG = {
    "no such run": (None, ["nowhere", "L.png"], ["'nowhere': no such run or student"]),
    "something else": (None, ["data.npz", "L.png"], ["'data.npz'", ".onnx file"]),
    "no such model": (None, ["nowhere.onnx", "L.png"], ["'nowhere.onnx': no such file"]),
    "no model": (no_onnx, ["none.onnx", "L.png"], ["'none.onnx': not a model that ONNX Runtime takes"]),
    "top": (None, ["run", "L.png", "--top", "0"], ["--top 0", "at least 1"]),
    "embeddings": (embeds, ["embeds", "L.png"], ["'embeds' gives embeddings, not classes", "mixerzoo.load"]),
}


@pytest.mark.parametrize(("spoil", "words", "texts"), WRONG.values(), ids=WRONG)
def test_a_mistake_costs_one_line(here, spoil, words, texts):
    if spoil is not None:
        spoil(here)
    refused(run(*words), *texts)


def test_onnxruntime_alone_is_needed_for_a_file(here, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    (here / "some.onnx").write_bytes(b"")
    refused(run("some.onnx", "L.png"), "package 'onnxruntime'", "pip install 'mixerzoo[onnx]'")


def test_a_student_with_a_missing_plugin_is_told_in_one_line(here):
    class Plugin:
        @hookimpl
        def register_mixers(self, register):
            register(MixerSpec(name="theirs", build=lambda: torch.nn.Identity(), summary="", caps=Caps()))

    with temporary_plugin(Plugin(), name="mixerzoo-theirs"):
        tiny_run.write_run("theirs", choices={"blocks.0.attn": "theirs@1"})
        assert predict_images(open_predictor(here / "theirs"), [here / "L.png"], top=1).found
    refused(run("theirs", "L.png"), "needs mixer 'theirs' of mixerzoo-theirs 0; install that distribution")
