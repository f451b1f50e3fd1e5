"""The command line: mistakes cost one line and leave nothing behind; results are printed, progress is not."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_search
from click.testing import CliRunner
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file
from torch import nn

from mixerzoo import Caps, MixerSpec, hookimpl
from mixerzoo.cli import main
from mixerzoo.hosts.timm_vit import _timm
from mixerzoo.latency import Stopwatch
from mixerzoo.listing import families, marks, mixer_table
from mixerzoo.registry import Origin, get_registry, temporary_plugin
from mixerzoo.teachers import digits_vit
from mixerzoo_search.pipeline import SearchResult

SCRIPT = Path(__file__).parent / "tiny_search.py"
SEARCH = ["--model", "tiny", "--mixers", ",".join(tiny_search.MIXERS)]
SEARCH += [
    word for name, value in tiny_search.FAST.items() for word in (f"--{name.replace('_', '-')}", f"{value}")
]


@pytest.fixture(scope="module", autouse=True)
def _tiny_world():
    with tiny_search.tiny_world():
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with everything that commands are pointed at."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny_search.write_npz(folder / "data.npz")
    (folder / "empty").mkdir()
    (folder / "broken").mkdir()
    for number in range(3):
        (folder / "broken" / f"{number}.png").write_bytes(b"not a picture")
    weights = digits_vit.build().state_dict()
    save_file(
        {name: tensor for name, tensor in weights.items() if "blocks.5" not in name}, folder / "short.st"
    )
    resnet = _timm().create_model("test_resnet", pretrained=False, num_classes=0)
    save_file(resnet.state_dict(), folder / "resnet.st")
    (folder / "words.st").write_text("not weights")
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def search(place):
    """Run `mixerzoo search` on the tiny teacher; later words win over earlier ones."""

    def run(*words, budget=("--budget", "60%"), data="data.npz"):
        return CliRunner().invoke(main, ["search", *SEARCH, "--data", str(place / data), *budget, *words])

    return run


def content(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def assert_refused(result, *texts, code=2):
    """One line on standard error that says all of `texts`, nothing on standard output, and the exit code."""
    assert result.exit_code == code, (result.stdout, result.stderr, result.exception)
    assert result.stdout == ""
    assert result.stderr.startswith("mixerzoo: ")
    assert result.stderr.count("\n") == 1
    for text in texts:
        assert text in result.stderr


BAD = {
    "unknown model": (["--model", "digits_vti"], ["unknown model 'digits_vti'", "did you mean 'digits_vit'?"]),
    "unknown mixer": (["--mixers", "static,glu_mpl"], ["unknown mixer 'glu_mpl'", "did you mean 'glu_mlp'?"]),
    "no such data": (["--data", "nowhere"], ["data 'nowhere'", "no such folder"]),
    "no such file of data": (["--data", "nowhere.npz"], ["data 'nowhere.npz'", "not a readable .npz"]),
    "trials": (["--trials", "0"], ["--trials 0", "at least 1"]),
    "images": (["--images", "3"], ["--images 3", "at least 20"]),
    "batch size": (["--batch-size", "0"], ["--batch-size 0", "at least 1"]),
    "threads": (["--threads", "0"], ["--threads 0", "at least 1"]),
    "steps": (["--distill-steps", "-1"], ["--distill-steps -1", "at least 0"]),
    "seed": (["--seed", "-1"], ["--seed -1", "at least 0"]),
    "minutes": (["--minutes", "0"], ["--minutes 0", "a positive number"]),
    "minutes that are none": (["--minutes", "nan"], ["--minutes nan", "a positive number"]),
    "finetune minutes": (["--finetune-minutes", "-1"], ["--finetune-minutes -1", "0 or more"]),
    "endless finetune": (["--finetune-minutes", "inf"], ["--finetune-minutes inf", "0 or more"]),
    "device": (["--device", "nonsense"], ["device 'nonsense'", "--device cpu"]),
    "dtype": (["--dtype", "float23"], ["dtype 'float23'", "float32"]),
    "runtime": (["--runtime", "eagre"], ["unknown runtime 'eagre'", "did you mean 'eager'?"]),
    "widths": (["--widths", "abc"], ["--widths 'abc'", "give numbers"]),
    "widths that no mixer has": (["--mixers", "static", "--widths", "0.33"], ["no candidate", "0.33"]),
    "mixers for no site": (["--mixers", "keep"], ["unknown mixer 'keep'"]),
    "storage": (["--storage", "sqlite:////nowhere/at/all.db"], ["sqlite:////nowhere/at/all.db", "--storage"]),
    "library": (["--library", "/dev/null/library"], ["library '/dev/null/library' cannot be written"]),
    "no storage at all": (["--storage", "nonsense"], ["storage 'nonsense'", "--storage"]),
    "tracking": (["--tracking-uri", "http://127.0.0.1:9"], ["http://127.0.0.1:9", "--tracking-uri"]),
    "tracking file": (["--tracking-uri", "sqlite:////nowhere/at/all.db"], ["/nowhere/at", "--tracking-uri"]),
}  # fmt: skip


@pytest.mark.parametrize(("words", "texts"), BAD.values(), ids=BAD)
def test_a_mistake_costs_one_line_and_leaves_nothing(search, here, words, texts):
    assert_refused(search(*words), *texts)
    assert content(here) == {}


BUDGETS = {
    "0": ["budget", "0", "positive"],
    "-1": ["budget", "-1", "positive"],
    "nan": ["budget", "nan", "positive"],
    "inf": ["budget", "inf", "positive"],
    "abc": ["budget", "abc", "5ms or 60%"],
}


@pytest.mark.parametrize("text", BUDGETS)
@pytest.mark.parametrize("flag", ["--budget-ms", "--budget"])
def test_a_budget_is_a_positive_number(search, here, flag, text):
    assert_refused(search(budget=(flag, text)), *BUDGETS[text])
    assert content(here) == {}


@pytest.mark.parametrize("text", ["0%", "-3%", "nan%", "%", "", "100000%", "100%"])
def test_a_share_is_between_nothing_and_all(search, here, text):
    assert_refused(search(budget=("--budget", text)), f"budget '{text}'", "such as")
    assert content(here) == {}


@pytest.mark.parametrize("budget", [(), ("--budget", "60%", "--budget-ms", "5")])
def test_one_budget_is_given(search, here, budget):
    assert_refused(search(budget=budget), "give one of --budget-ms 5 and --budget 60%")
    assert content(here) == {}


@pytest.mark.parametrize(
    ("data", "text"),
    [("empty", "no image in it"), ("broken", "none of its 3 images can be read (first: 0.png)")],
)
def test_data_without_a_picture(search, here, place, data, text):
    assert_refused(search(data=data), str(place / data), text)
    assert content(here) == {}


@pytest.mark.parametrize(
    ("model", "file", "texts"),
    [
        (
            "digits_vit",
            "short.st",
            ["does not fit model 'digits_vit'", "'blocks.5.attn.proj.bias' is missing"],
        ),
        ("test_vit", "short.st", ["does not fit model 'test_vit'", "'"]),
        (
            "test_vit.r160_in1l",
            "short.st",
            ["model 'test_vit.r160_in1l'", "Invalid pretrained tag", "the dot"],
        ),
        ("digits_vit", "nowhere.st", ["no such file"]),
        ("digits_vit", "words.st", ["not a safetensors file"]),
        ("test_resnet", "resnet.st", ["model 'test_resnet'", "no site"]),
    ],
)
def test_a_checkpoint_that_will_not_do(search, here, place, model, file, texts):
    result = search("--model", model, "--checkpoint", str(place / file))
    named = [str(place / file)] if file != "resnet.st" else []
    assert_refused(result, *named, *texts)
    assert content(here) == {}


def test_a_run_directory_of_something_else_is_left_alone(search, here):
    (here / "mine").mkdir()
    (here / "mine" / "letter.txt").write_text("dear")
    before = content(here)
    assert_refused(search("--out", "mine"), "run directory 'mine' holds something else", "--out")
    (here / "file").write_text("dear")
    assert_refused(search("--out", "file"), "'file' holds something else", "--out")
    (here / "file").unlink()
    (here / "mine" / "run.json").write_text("{}")
    before = content(here)
    assert_refused(search("--out", "mine"), "not a run of mixerzoo", "--out")
    assert content(here) == before


@pytest.fixture(scope="module")
def store(finished):
    """The option that names an MLflow store that is there already: a new one takes seconds to make."""
    return "--tracking-uri", f"sqlite:///{finished[0]}/mlflow.db"


@pytest.fixture(scope="module")
def finished(place, tmp_path_factory):
    """A finished search: where it was run, and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    words = ["search", *SEARCH, "--data", str(place / "data.npz"), "--budget", "60%", "--trials", "3"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, (result.stderr, result.exception)
    return folder, result


def test_the_defaults_are_in_the_working_directory(finished):
    folder, _ = finished
    assert {path.name for path in folder.iterdir()} == {"runs", "mlflow.db", "mlartifacts"}
    assert {path.name for path in (folder / "runs").iterdir()} == {"library", "tiny-60%"}


def test_without_a_terminal_only_the_result_is_printed(finished):
    _, result = finished
    assert result.stderr == ""
    assert result.stdout.startswith("latency    4.10 ms -> ")
    for text in ("accuracy", "agreement", "parameters", "runs/tiny-60%/best", "report.html", "mixerzoo ui"):
        assert text in result.stdout
    assert "\x1b" not in result.stdout
    assert "\r" not in result.stdout


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--seed", "1"], "seed is 0 there, 1 here"),
        (["--mixers", "none"], "mixers is"),
        (["--images", "30"], "images is 40 there, 30 here"),
        (["--budget", "50%"], "budget is 60% there, 50% here"),
    ],
)
def test_a_run_directory_of_another_search_is_left_alone(search, finished, here, words, text):
    folder, _ = finished
    run = folder / "runs" / "tiny-60%"
    before = content(folder)
    assert_refused(search("--out", str(run), *words), "holds another search", text, "give another --out")
    assert content(folder) == before
    assert content(here) == {}


def test_a_budget_out_of_reach_names_the_fastest_plan(search, here, store):
    result = search(*store, budget=("--budget", "5%"))
    assert_refused(result, "budget 5% (0.205 ms)", "N2/N2", "0.68 ms", "4.1 ms", "--budget-ms 0.75", code=3)
    assert not list(here.rglob("best"))


def test_a_budget_that_is_missed_in_the_end_is_code_3(search, here, store, monkeypatch):
    def time(self, students, *, rounds=None, on_round=lambda done: None):
        found = tiny_search.ruled_time(self, students, on_round=on_round)
        if set(students) != {"student"}:
            return found
        return found | {"student": type(found["student"])(median=9, low=9, high=9, ratio=9.0, error=0.0)}

    monkeypatch.setattr(Stopwatch, "time", time)
    result = search(*store, "--trials", "2", "--finetune-minutes", "0")
    assert result.exit_code == 3
    assert result.stdout.startswith("no plan met 2.46 ms")
    assert result.stderr.startswith("mixerzoo: budget 60%")
    assert result.stderr.count("\n") == 1


def test_broken_images_are_named_skipped_and_counted(search, here, store, monkeypatch):
    for number, image in enumerate(tiny_search.pictures(60)):
        folder = here / "pictures" / f"{number % 10}s"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{number:03}.png")
    for number in range(4):
        (here / "pictures" / f"9{number}.png").write_bytes(b"not a picture")
    monkeypatch.setenv("FORCE_COLOR", "1")  # as if there were a terminal
    monkeypatch.setenv("COLUMNS", "200")
    options = ("--data", "pictures", "--trials", "2", "--finetune-minutes", "0", "--out", "run")
    result = search(*store, *options)
    assert result.exit_code == 0, (result.stderr, result.exception)
    assert (
        "data 'pictures': 4 images cannot be read and are left out (90.png, 91.png, 92.png, ...)"
        in result.stderr
    )
    record = json.loads((here / "run" / "run.json").read_text())
    assert record["skipped_images"] == [f"9{number}.png" for number in range(4)]
    assert record["classes"] == [f"{number}s" for number in range(10)]


def python(*words, cwd):
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "FORCE_COLOR")}
    return subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env=kept | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_json_is_all_that_is_printed(place, here):
    words = [SCRIPT, "search", *SEARCH, "--data", place / "data.npz", "--budget", "60%", "--json"]
    done = python(*words, cwd=here)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    summary = json.loads(done.stdout)
    assert summary == json.loads((here / "runs" / "tiny-60%" / "summary.json").read_text())


@pytest.mark.parametrize("words", [["--help"], ["search", "--help"], ["--version"]])
def test_help_is_light(words, tmp_path):
    done = python("-X", "importtime", "-m", "mixerzoo", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "mixerzoo" in imported
    assert not imported & {"timm", "transformers", "mlflow", "optuna", "torchvision", "sklearn", "matplotlib"}
    assert words == ["--version"] or "Usage: " in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_help_lists_every_command():
    result = CliRunner().invoke(main, ["--help"])
    assert result.exit_code == 0
    for command in ("mixers", "check", "library", "new-plugin", "sites", "search", "profile", "ui"):
        assert f"\n  {command} " in result.stdout


def test_mixers_lists_what_is_broken_below_the_table():
    registry = get_registry()
    before = list(registry.broken)

    def missing():
        raise ImportError("no module named 'gone'; pip install 'bad[onnx]'")

    try:
        registry.load(
            "bad", Origin(plugin="bad", distribution="mixerzoo-bad", version="3.2"), missing, strict=False
        )
        result = CliRunner().invoke(main, ["mixers"])
    finally:
        registry.broken[:] = before
    assert result.exit_code == 0
    table, _, below = result.stdout.partition("broken plugin")
    for spec in registry.mixers:
        assert f"\n  {spec.name} " in table
    assert "mixerzoo 0.1.0" in table
    assert below.startswith(
        " 'bad' of mixerzoo-bad 3.2: ImportError: no module named 'gone'; pip install 'bad[onnx]'"
    )
    assert below.count("\n") == 1


@pytest.mark.parametrize("columns", [100, 120])
def test_mixers_fit_a_terminal(columns):
    console = Console(width=columns, file=io.StringIO())
    console.print(mixer_table(get_registry()))
    lines = console.file.getvalue().splitlines()
    rows = [line.split() for line in lines]
    for spec in get_registry().mixers:
        (row,) = [row for row in rows if row[:2] == [spec.name, spec.letter]]
        assert row[2] in ("attn", "mlp", "both")
        assert row[3] in ("any", "grid", "fixed")
        assert row[4:9] == marks(spec).split()
        assert row[9] == f"{spec.widths[0]:g}"
    # Each mixer takes a line or two, three at most, and each family a heading and an empty line.
    assert len(lines) < 3 * len(get_registry().mixers) + 2 * len(families(get_registry().mixers)) + 1


def test_mixers_tells_all_about_those_that_are_named():
    result = CliRunner().invoke(main, ["mixers", "static", "none"])
    assert result.exit_code == 0
    static, none = result.stdout.split("\n\n")
    for text in ("what it is", "letter      S", "mixerzoo 0.1.0, token_mlp", "N^2 D", "arXiv 2005.00743"):
        assert text in static
    assert "attention, mlp" in none
    assert_refused(CliRunner().invoke(main, ["mixers", "nnoe"]), "did you mean 'none'?")


def test_sites_lists_the_sites_and_what_only_looks_like_one():
    from timm.layers import Mlp

    class Host(tiny_search.TinyHost):
        name = "odd"

        def model_names(self):
            return ("odd",)

        def load(self, name, checkpoint):
            model = tiny.tiny_vit()
            model.blocks[1].mlp = Mlp(24, 96, norm_layer=nn.LayerNorm)
            return model

    class Plugin:
        @hookimpl
        def register_hosts(self, register):
            register(Host())

    with temporary_plugin(Plugin(), name="odd"):
        result = CliRunner().invoke(main, ["sites", "--model", "odd"])
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["blocks.0.attn", "attention", "N=17", "D=24", "H=3"]
    assert lines[1].split() == ["blocks.0.mlp", "mlp", "N=17", "D=24", "hidden=96", "gelu"]
    assert lines[2].split()[0] == "blocks.1.attn"
    assert lines[3].startswith("blocks.1.mlp")
    assert "not a site: Mlp is more than fc2(act(fc1(x)))" in lines[3]
    assert len(lines) == 4
    assert_refused(CliRunner().invoke(main, ["sites", "--model", "digits_vti"]), "did you mean 'digits_vit'?")


def test_check_says_what_holds():
    result = CliRunner().invoke(main, ["check", "none"])
    assert result.exit_code == 0
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert lines
    assert all(line.split()[0] in ("ok", "-") and line.split()[1] == "none" for line in lines)


def test_check_fails_for_a_mixer_that_claims_too_much():
    class Noise(nn.Module):
        def forward(self, x):
            return x + np.random.default_rng().random()

    class Plugin:
        @hookimpl
        def register_mixers(self, register):
            register(
                MixerSpec(name="noise", build=lambda dim: Noise(), summary="", caps=Caps(any_length=True))
            )

    with temporary_plugin(Plugin()):
        result = CliRunner().invoke(main, ["check", "noise"])
    assert result.exit_code == 2
    assert "FAIL noise              deterministic" in result.stdout
    assert result.stderr.startswith("mixerzoo: ")
    assert result.stderr.endswith(" checks failed\n")


@pytest.mark.parametrize(
    ("words", "text"), [([], "name a mixer, or give --all"), (["nnoe"], "did you mean 'none'?")]
)
def test_check_needs_a_mixer(words, text):
    assert_refused(CliRunner().invoke(main, ["check", *words]), text)


def test_profile_writes_its_page_and_refuses_as_search_does(here, place):
    words = ["profile", "--model", "tiny", "--data", str(place / "data.npz"), "--threads", "1"]
    result = CliRunner().invoke(main, [*words, "--images", "24"])
    assert result.exit_code == 0, (result.stderr, result.exception)
    assert "blocks.1.attn" in result.stdout
    assert {path.name for path in (here / "profiles" / "tiny").iterdir()} == {"profile.html", "profile.png"}
    before = content(here)
    for bad, text in (
        (["--images", "0"], "--images 0: give at least 1"),
        (["--model", "tiyn"], "unknown model 'tiyn'"),
        (["--device", "nonsense"], "device 'nonsense'"),
        (["--runtime", "eagre"], "did you mean 'eager'?"),
        (["--data", "nowhere"], "data 'nowhere'"),
        (["--batch-size", "0"], "--batch-size 0: give at least 1"),
        (["--threads", "0"], "--threads 0: give at least 1"),
    ):
        assert_refused(CliRunner().invoke(main, [*words, *bad]), text)
    assert content(here) == before


@pytest.mark.parametrize(("classes", "fit"), [(10, True), (9, True), (14, False)])
def test_profile_tells_no_accuracy_on_labels_that_are_not_the_teachers_classes(here, classes, fit):
    np.savez("some.npz", x=tiny_search.pictures(40), y=np.arange(40) % classes)
    words = ["profile", "--model", "tiny", "--data", "some.npz", "--threads", "1", "--images", "24", "--json"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, (result.stderr, result.exception)
    assert (json.loads(result.stdout)["teacher"]["accuracy"] is not None) is fit


def test_json_ends_with_3_where_no_student_met_the_budget(monkeypatch):
    missed = SearchResult(path=Path("runs/x"), summary={"met": False})
    monkeypatch.setattr("mixerzoo_search.search", lambda **_: missed)
    result = CliRunner().invoke(main, ["search", "--budget-ms", "5", "--json"])
    assert json.loads(result.stdout) == {"met": False}
    assert result.exit_code == 3
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("budget", ["abc", "-1", "0", "nan", "60%"])
def test_a_bad_budget_is_quoted_as_it_was_given(budget):
    result = CliRunner().invoke(main, ["search", f"--budget-ms={budget}"])
    assert result.exit_code == 2
    assert budget in result.stderr
    assert f"{budget}ms" not in result.stderr
