"""A new plugin is whole and right at once, and a name that will not do leaves nothing behind."""

import importlib
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from mixerzoo import new_plugin
from mixerzoo.cli import main
from mixerzoo.registry import get_registry, temporary_plugin
from mixerzoo.testing import ATTENTION_SITE, checks_for, random_view, run_checks


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def plugin(here, monkeypatch):
    """The module of a new plugin called my-mixer, imported from where it was written."""
    result = CliRunner().invoke(main, ["new-plugin", "my-mixer"])
    assert result.exit_code == 0, result.output
    monkeypatch.syspath_prepend(here / "mixerzoo-my-mixer" / "src")
    yield importlib.import_module("mixerzoo_my_mixer")
    del sys.modules["mixerzoo_my_mixer"]


def names(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_it_is_a_whole_distribution(here):
    result = CliRunner().invoke(main, ["new-plugin", "my-mixer"])
    assert result.exit_code == 0
    assert result.stderr == ""
    assert {path.name for path in here.iterdir()} == {"mixerzoo-my-mixer"}
    folder = here / "mixerzoo-my-mixer"
    assert names(folder) == {
        "pyproject.toml",
        "README.md",
        "src/mixerzoo_my_mixer/__init__.py",
        "src/mixerzoo_my_mixer/py.typed",
        "tests/test_my_mixer.py",
    }
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    assert project["name"] == "mixerzoo-my-mixer"
    assert project["entry-points"] == {"mixerzoo": {"my_mixer": "mixerzoo_my_mixer"}}
    for path in names(folder):
        assert "$" not in (folder / path).read_text()


def test_it_says_what_to_do_next(here):
    said = CliRunner().invoke(main, ["new-plugin", "my-mixer"]).stdout
    for step in (
        "cd mixerzoo-my-mixer",
        "pip install -e '.[test]'",
        "pytest",
        "mixerzoo check my_mixer",
        "mixerzoo search --budget 80% --mixers my_mixer",
    ):
        assert f"\n  {step} " in f"{said} ".replace("\n", " \n")


def test_its_mixer_passes_every_check(plugin):
    with temporary_plugin(plugin) as registry:
        spec = registry.mixers.get("my_mixer")
        results = run_checks(spec)
    assert [result.message for result in results if result.failed] == []
    passed = {result.name for result in results if result.passed}
    assert {"any_length", "masks", "export", "inherit", "readout", "width_grows"} <= passed


def test_its_own_tests_pass(plugin, here, monkeypatch):
    monkeypatch.syspath_prepend(here / "mixerzoo-my-mixer" / "tests")
    with temporary_plugin(plugin) as registry:
        tests = importlib.import_module("test_my_mixer")
        (mark,) = tests.test_conformance.pytestmark
        assert len(mark.args[1]) == len(checks_for(registry.mixers.get("my_mixer")))
        tests.test_agrees_with_a_loop()
    del sys.modules["test_my_mixer"]


def test_its_mixer_starts_from_the_teachers_values(plugin):
    """With every channel kept and maps that see only their own token, it is the teacher's attention."""
    view = random_view(ATTENTION_SITE)
    view.mean_attention.copy_(torch.eye(ATTENTION_SITE.tokens).expand_as(view.mean_attention))
    mixer = plugin.MyMixer(dim=ATTENTION_SITE.dim, width=1.0)
    x = torch.randn(2, ATTENTION_SITE.tokens, ATTENTION_SITE.dim)
    with torch.no_grad():
        plugin.inherit(mixer, view)
        value = x @ view.v_weight.T + view.v_bias
        torch.testing.assert_close(mixer(x), value @ view.out_weight.T + view.out_bias)


@pytest.mark.parametrize("name", ["my-mixer", "a", "m2d", "a" + "-".join(["name"] * 8)])
def test_it_is_clean_and_formatted(here, name):
    assert len(name) <= new_plugin.MOST_LETTERS
    _, folder = new_plugin.new_plugin(name)
    ruff = shutil.which("ruff", path=str(Path(sys.executable).parent)) or shutil.which("ruff")
    if ruff is None:
        pytest.skip("ruff is not installed")
    for words in (
        ["check", "--isolated", "--line-length", "110"],
        ["check", "--isolated", "--line-length", "110", "--select", "E,F,W,I,B,UP,SIM,C4,PT,RUF"],
        ["format", "--isolated", "--line-length", "110", "--check"],
    ):
        # As in a project of its own: its package is its own, mixerzoo is a third party's.
        done = subprocess.run([ruff, *words, "--no-cache", "."], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("name", "mixer", "class_name"),
    [
        ("my-mixer", "my_mixer", "MyMixer"),
        ("my_mixer", "my_mixer", "MyMixer"),
        ("conv2d-and-more", "conv2d_and_more", "Conv2dAndMore"),
    ],
)
def test_kebab_and_snake_case_are_one(here, name, mixer, class_name):
    assert new_plugin.new_plugin(name, here / "out") == (mixer, here / "out")
    source = (here / "out" / "src" / f"mixerzoo_{mixer}" / "__init__.py").read_text()
    assert f"class {class_name}(nn.Module)" in source
    assert f'name="{mixer}"' in source


def test_its_letter_is_one_that_no_mixer_has(plugin):
    taken = {spec.letter for spec in get_registry().mixers}
    with temporary_plugin(plugin) as registry:
        assert registry.mixers.get("my_mixer").letter not in taken


BAD = {
    "a capital": ("MyMixer", "name 'MyMixer': give lower-case words"),
    "a digit first": ("2d", "name '2d': give lower-case words"),
    "a space": ("my mixer", "name 'my mixer': give lower-case words"),
    "a path": ("../mixer", "name '../mixer': give lower-case words"),
    "a dash last": ("mixer-", "name 'mixer-': give lower-case words"),
    "nothing": ("", "name '': give lower-case words"),
    "too long": ("a" * 41, "40 characters at most"),
    "a registered mixer": ("static", "mixer 'static' is already registered by mixerzoo 0.1.0"),
    "a registered mixer in kebab case": ("glu-mlp", "mixer 'glu_mlp' is already registered"),
    "what stays": ("keep", "name 'keep' means something else already"),
    "a keyword": ("lambda", "name 'lambda' means something else already"),
    "a keyword as a class": ("true", "name 'true' means something else already"),
    "what the plugin imports": ("mixer-spec", "name 'mixer-spec' means something else already"),
    "a package of mixerzoo": ("search", "package 'mixerzoo_search' is already installed"),
}


@pytest.mark.parametrize(("name", "text"), BAD.values(), ids=BAD)
def test_a_name_that_will_not_do_costs_one_line_and_leaves_nothing(here, name, text):
    result = CliRunner().invoke(main, ["new-plugin", name])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("mixerzoo: ")
    assert text in result.stderr
    assert result.stderr.count("\n") == 1
    assert list(here.iterdir()) == []


def test_what_is_there_is_left_alone(here):
    (here / "mixerzoo-my-mixer").mkdir()
    (here / "file").write_text("dear")
    for words, named in (([], "'mixerzoo-my-mixer' exists already"), (["--out", "file"], "'file' exists")):
        result = CliRunner().invoke(main, ["new-plugin", "my-mixer", *words])
        assert result.exit_code == 2
        assert named in result.stderr
        assert "--out" in result.stderr
    assert sorted(path.name for path in here.iterdir()) == ["file", "mixerzoo-my-mixer"]
    assert list((here / "mixerzoo-my-mixer").iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(here):
    (here / "file").write_text("dear")
    result = CliRunner().invoke(main, ["new-plugin", "my-mixer", "--out", "file/plugin"])
    assert result.exit_code == 2
    assert result.stderr.startswith("mixerzoo: 'file/plugin' cannot be written (")
    assert result.stderr.count("\n") == 1
    assert [path.name for path in here.iterdir()] == ["file"]


def test_a_plugin_that_cannot_be_finished_leaves_nothing(here, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "rename", fail)
    result = CliRunner().invoke(main, ["new-plugin", "my-mixer"])
    assert result.exit_code == 2
    assert "No space left on device" in result.stderr
    assert list(here.iterdir()) == []
