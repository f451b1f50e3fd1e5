"""`mixerzoo distill --recipe local`: the library that searches find, made once, and one line for what it cannot do."""

import json
import shutil

import pytest
import tiny_search
from click.testing import CliRunner
from torch import nn

from mixerzoo import MixerSpec, hookimpl
from mixerzoo.cli import main
from mixerzoo.library.folder import Library
from mixerzoo.opening import open_teacher
from mixerzoo.registry import temporary_plugin
from mixerzoo_search import candidates, distill_local, search
from mixerzoo_search.candidates import list_candidates

MIXERS = "static,pool,linear,none,mlp_slice"
COMMON = ("--model", "tiny", "--data", "data.npz", "--images", "40", "--mixers", MIXERS)


@pytest.fixture(scope="module", autouse=True)
def _tiny_world():
    with tiny_search.tiny_world():
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with data and a whole library, and what the command printed."""
    folder = tmp_path_factory.mktemp("distill")
    tiny_search.write_npz(folder / "data.npz")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        (folder / "printed.txt").write_text(run(*COMMON).stdout)
    return folder


@pytest.fixture
def here(place, tmp_path, monkeypatch):
    """A copy of it to work in."""
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words):
    told = CliRunner().invoke(main, ["distill", *words], catch_exceptions=False)
    assert told.exit_code == 0, told.stderr
    return told


def refused(words, *texts):
    """Exit code 2, and one line on standard error that says all of `texts`."""
    told = CliRunner().invoke(main, ["distill", *words], catch_exceptions=False)
    assert (told.exit_code, told.stdout) == (2, "")
    assert told.stderr.startswith("mixerzoo: ")
    assert told.stderr.count("\n") == 1
    for text in texts:
        assert text in told.stderr


def entries(folder):
    return {
        (entry.site, entry.candidate, entry.steps): entry for entry in Library(folder / "runs" / "library")
    }


def test_the_library_holds_every_candidate_of_every_site(place):
    wanted = list_candidates(open_teacher("tiny").sites, mixers=MIXERS.split(","))
    found = entries(place)
    assert set(found) == {(site, str(c), 0) for site, row in wanted.items() for c in row}
    assert all(not entry.failed for entry in found.values())


def test_the_table_has_the_errors_that_are_in_the_library(place):
    lines = (place / "printed.txt").read_text().splitlines()
    found = entries(place)
    for kind in ("attention", "mlp"):
        (head,) = (number for number, line in enumerate(lines) if line.startswith(f"{kind}, NMSE at"))
        assert lines[head].split()[-3:] == ["0", "1", "mean"]
        for line in lines[head + 1 : lines.index("", head)]:
            name, first, second, mean = line.split()
            module = "attn" if kind == "attention" else "mlp"
            errors = [found[f"blocks.{at}.{module}", name, 0].nmse for at in (0, 1)]
            for shown, error in ((first, errors[0]), (second, errors[1])):
                assert float(shown) == pytest.approx(error, abs=6e-4 if error >= 5e-4 else 0, rel=0.1)
            assert float(mean) == pytest.approx(sum(errors) / 2, abs=6e-4, rel=6e-3)
    assert f"candidates {len(found)} " in lines[-2]
    assert f"{len(found)} made in " in lines[-2]
    assert lines[-1].startswith("library    runs/library")


def test_what_is_there_is_not_made_again(here, monkeypatch):
    monkeypatch.setattr(distill_local, "capture", None)  # not even the teacher is run
    told = run(*COMMON, "--json")
    result = json.loads(told.stdout)
    assert result["made"] == 0
    assert result["wall_s"] == {"capture": 0, "distill": 0, "total": 0}
    assert {(row["site"], row["candidate"], 0) for row in result["candidates"]} == set(entries(here))


def test_a_search_finds_it(here):
    before = {path.name for path in (here / "runs" / "library").glob("*.json")}
    options = tiny_search.FAST | {"mixers": tiny_search.MIXERS, "finetune_minutes": 0}
    search("tiny", "data.npz", budget="60%", library="runs/library", **options)
    new = {path.name for path in (here / "runs" / "library").glob("*.json")} - before
    assert all(json.loads((here / "runs" / "library" / name).read_text())["recipe"]["steps"] for name in new)


def test_a_search_finds_the_gradient_steps_too(here):
    steps = str(tiny_search.FAST["distill_steps"])
    result = json.loads(run(*COMMON, "--distill-steps", steps, "--json").stdout)
    assert result["made"] > 0
    stepped = {(row["site"], row["candidate"]) for row in result["candidates"] if row["steps"]}
    assert stepped
    for row in result["candidates"]:
        assert row["nmse"] <= entries(here)[row["site"], row["candidate"], 0].nmse
    before = {path.name for path in (here / "runs" / "library").glob("*.json")}
    options = tiny_search.FAST | {"mixers": tiny_search.MIXERS, "finetune_minutes": 0}
    search("tiny", "data.npz", budget="60%", library="runs/library", **options)
    new = {path.name for path in (here / "runs" / "library").glob("*.json")} - before
    # Which wider one a candidate begins at is known in a search only.
    assert all(json.loads((here / "runs" / "library" / name).read_text())["recipe"]["wider"] for name in new)


def test_other_images_or_another_seed_are_another_library(here):
    for words in (("--images", "41"), ("--seed", "1")):
        result = json.loads(run(*COMMON, *words, "--json").stdout)
        assert result["made"] == len(result["candidates"]) > 0


def test_mixers_and_widths_narrow_it(here):
    words = ("--mixers", "static,mlp_slice", "--widths", "0.5", "--library", "mine", "--json")
    result = json.loads(run(*COMMON, *words).stdout)
    names = {row["candidate"] for row in result["candidates"]}
    assert "mlp_slice@0.5" in names
    assert not {name for name in names if name.startswith("mlp_slice") and name != "mlp_slice@0.5"}
    assert len(Library(here / "mine")) == len(result["candidates"])


def test_a_stopped_one_goes_on(here, monkeypatch):
    whole = entries(here)
    shutil.rmtree(here / "runs")
    real, left = candidates.distill, [5]

    def tired(*arguments, **options):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(candidates, "distill", tired)
    told = CliRunner().invoke(main, ["distill", *COMMON])
    assert told.exit_code == 1
    assert len(entries(here)) == 5
    left[0] = 1000
    result = json.loads(run(*COMMON, "--json").stdout)
    assert result["made"] == len(whole) - 5
    assert {key: entry.nmse for key, entry in entries(here).items()} == {
        key: entry.nmse for key, entry in whole.items()
    }


def test_a_damaged_file_is_named_and_made_again(here):
    victim = next(path for path in (here / "runs" / "library").glob("*.safetensors"))
    victim.write_bytes(victim.read_bytes()[:-1] + b"x")
    told = run(*COMMON)
    assert "damaged    " in told.stdout
    assert victim.name in told.stdout
    assert "1 made in " in told.stdout


def test_a_candidate_that_fails_is_named_with_its_reason_and_costs_no_other(here):
    class Lazy(nn.Module):
        def __init__(self, dim):
            super().__init__()
            self.readout = nn.Linear(dim, dim)

        def forward(self, x):
            raise RuntimeError("out of ideas")

    class Plugin:
        @hookimpl
        def register_mixers(self, register):
            register(MixerSpec(name="lazy", build=Lazy, readout="readout", summary="fails", letter="Zz"))

    with temporary_plugin(Plugin(), name="lazy"):
        told = run(*COMMON, "--mixers", "lazy,linear")
        again = run(*COMMON, "--mixers", "lazy,linear", "--distill-steps", "2")
    for lines in (told.stdout.splitlines(), again.stdout.splitlines()):
        (failed,) = (line for line in lines if line.startswith("failed"))
        assert failed == "failed     lazy@1 at blocks.0.attn, blocks.1.attn: RuntimeError: out of ideas"
        assert "2 failed" in lines[-2]


def test_a_mixer_that_cannot_be_built_is_named_with_its_reason(here):
    class Picky(nn.Linear):
        def __init__(self, dim):
            raise ValueError(f"no dim like {dim}")

    class Plugin:
        @hookimpl
        def register_mixers(self, register):
            register(MixerSpec(name="picky", build=Picky, summary="fails", letter="Zy"))

    with temporary_plugin(Plugin(), name="picky"):
        told = run(*COMMON, "--mixers", "picky,linear")
        result = json.loads(run(*COMMON, "--mixers", "picky,linear", "--json").stdout)
    assert "left out   picky at blocks.0.attn, blocks.1.attn: no dim like 24" in told.stdout
    assert result["left_out"][0] == {"site": "blocks.0.attn", "mixer": "picky", "reason": "no dim like 24"}
    assert {row["candidate"] for row in result["candidates"]} == {"linear@1"}


@pytest.mark.parametrize(
    ("words", "texts"),
    [
        (("--mixers", "statik"), ("statik", "static")),
        (("--widths", "wide"), ("--widths 'wide'",)),
        (("--mixers", "mlp_slice", "--widths", "7"), ("no candidate",)),
        (("--images", "3"), ("--images 3", "20")),
        (("--distill-steps", "-1"), ("--distill-steps -1",)),
        (("--seed", "-1"), ("--seed -1",)),
        (("--memory-limit", "-1"), ("--memory-limit -1",)),
        (("--library", "data.npz"), ("data.npz",)),
        (("--library", "full"), ("full", "--library")),
        (("--model", "tinny"), ("tinny",)),
        (("--data", "nowhere"), ("nowhere",)),
        (("--minutes", "2"), ("--minutes", "--recipe far")),
        (("--mixer", "static"), ("--mixer", "--recipe far")),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(words, texts, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(place / "data.npz", "data.npz")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "diary.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    refused(("--model", "tiny", "--data", "data.npz", *words), *texts)
    assert sorted(tmp_path.rglob("*")) == before
