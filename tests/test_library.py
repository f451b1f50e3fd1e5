"""The library on disk: keys, checksums, crashes at the worst moment."""

import math

import pytest
import tiny
import torch

from mixerzoo import library as library_module
from mixerzoo.distill import Distilled, Recipe
from mixerzoo.errors import MixerzooError
from mixerzoo.files import read_json, write_json
from mixerzoo.library import INDEX, Library, candidate_key
from mixerzoo.plan import Candidate

SITES = tiny.tiny_teacher().sites
MIXER = Candidate("static", 0.5)


def result(value=1.0, *, failed="", **fields):
    state = {} if failed else {"a.weight": torch.full((3, 2), value), "b": torch.arange(4)}
    default = {
        "state": state,
        "nmse": math.inf if failed else 0.25 * value,
        "nmse_start": 0.5,
        "nmse_solved": math.nan,
        "steps": 3,
        "params": 10,
        "seconds": 0.125,
        "failed": failed,
    }
    return Distilled(**default | fields)


def files(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def filled(tmp_path):
    library = Library(tmp_path)
    for number in range(3):
        library.put(f"key{number}", SITES[number], MIXER, result(number + 1.0))
    return tmp_path


# Keys

BASE = {
    "teacher": "t",
    "data": "d",
    "site": SITES[0],
    "candidate": MIXER,
    "plugin": "mixerzoo 0.1",
    "recipe": Recipe(),
    "images": 100,
}


@pytest.mark.parametrize(
    "change",
    [
        {"teacher": "u"},
        {"data": "e"},
        {"site": SITES[2]},
        {"candidate": Candidate("static", 1.0)},
        {"candidate": Candidate("pool", 0.5)},
        {"plugin": "mixerzoo 0.2"},
        {"plugin": "other 0.1"},
        {"recipe": Recipe(steps=1)},
        {"recipe": Recipe(lr=2e-3)},
        {"recipe": Recipe(seed=1)},
        {"images": 101},
        {"teacher": "d", "data": "t"},
    ],
    ids=str,
)
def test_the_key_depends_on_each_ingredient(change):
    assert candidate_key(**BASE) != candidate_key(**BASE | change)


def test_the_key_is_stable_and_a_file_name():
    key = candidate_key(**BASE)
    assert key == candidate_key(**BASE | {"recipe": Recipe(steps=0)})
    assert key.isalnum()
    assert len(key) == 24


def test_every_field_of_the_recipe_is_in_the_key():
    assert set(Recipe().to_json()) == set(vars(Recipe()))


# Round trips


def test_an_empty_library(tmp_path):
    library = Library(tmp_path / "new")
    assert len(library) == 0
    assert library.get("x") is None
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("again", [False, True], ids=["same process", "next process"])
def test_what_is_put_is_got(filled, again):
    library = Library(filled)
    if not again:
        library.put("key1", SITES[1], MIXER, result(2.0))
    entry = library.get("key1")
    assert (entry.key, entry.site, entry.candidate) == ("key1", SITES[1].name, "static@0.5")
    assert (entry.nmse, entry.nmse_start, entry.steps, entry.params) == (0.5, 0.5, 3, 10)
    assert math.isnan(entry.nmse_solved)
    assert (entry.seconds, entry.failed) == (0.125, "")
    state = library.state("key1")
    assert state.keys() == {"a.weight", "b"}
    assert torch.equal(state["a.weight"], torch.full((3, 2), 2.0))
    assert torch.equal(state["b"], torch.arange(4))
    assert library.damaged == []


def test_entries_are_the_same_in_the_next_process(filled):
    one, two = Library(filled), Library(filled)
    assert [repr(entry) for entry in one] == [repr(entry) for entry in two]
    assert [entry.key for entry in one] == ["key0", "key1", "key2"]
    assert len(one) == 3


def test_putting_again_replaces(filled):
    Library(filled).put("key0", SITES[0], MIXER, result(9.0))
    library = Library(filled)
    assert len(library) == 3
    assert library.get("key0").nmse == 9 * 0.25
    assert library.state("key0")["a.weight"][0, 0] == 9


def test_failures_are_kept_with_their_reason(tmp_path):
    Library(tmp_path).put("bad", SITES[0], MIXER, result(failed="ValueError: no"))
    library = Library(tmp_path)
    entry = library.get("bad")
    assert entry.failed == "ValueError: no"
    assert entry.nmse == math.inf
    assert entry.sha256 == ""
    assert files(tmp_path) == [INDEX]


def test_the_index_is_strict_json(filled):
    Library(filled).put("bad", SITES[0], MIXER, result(failed="no"))
    text = (filled / INDEX).read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert read_json(filled / INDEX)["bad"]["nmse"] is None


def test_nothing_temporary_is_left(filled):
    assert files(filled) == [INDEX, "key0.safetensors", "key1.safetensors", "key2.safetensors"]


# Damage


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[:-3])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "swapped":
        path.write_bytes((path.parent / "key2.safetensors").read_bytes())
    else:
        content[int(how)] ^= 1
        path.write_bytes(content)


@pytest.mark.parametrize("how", ["0", "20", "-1", "missing", "truncated", "empty", "swapped"])
def test_only_the_damaged_one_is_dropped(filled, how):
    damage(filled / "key1.safetensors", how)
    library = Library(filled)
    assert library.get("key1") is None
    assert len(library.damaged) == 1
    assert f"{SITES[1].name} static@0.5" in library.damaged[0]
    assert "key1.safetensors" in library.damaged[0]
    assert library.get("key1") is None  # and it is not named twice
    assert len(library.damaged) == 1
    for key in ("key0", "key2"):
        assert library.get(key) is not None
        assert library.state(key)
    library.put("key1", SITES[1], MIXER, result(5.0))
    again = Library(filled)
    assert again.get("key1").nmse == 5 * 0.25
    assert again.damaged == []


def test_damage_after_the_check_is_an_error(filled):
    library = Library(filled)
    assert library.get("key1") is not None
    damage(filled / "key1.safetensors", "-1")
    with pytest.raises(MixerzooError, match=r"key1\.safetensors' is damaged; run the same command again"):
        library.state("key1")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"k": 1}', b'{"k": {}}', b'{"k": {"unheard": 1}}', b"\xff"]
)
def test_a_damaged_index_is_named_and_all_is_made_again(filled, content):
    (filled / INDEX).write_bytes(content)
    library = Library(filled)
    assert len(library) == 0
    assert len(library.damaged) == 1
    assert "index.json" in library.damaged[0]
    library.put("key0", SITES[0], MIXER, result())
    again = Library(filled)
    assert again.get("key0") is not None
    assert again.damaged == []


# Crashes


class Killed(BaseException):
    """What a killed process looks like from the inside."""


def test_a_crash_before_the_index_loses_that_candidate_only(filled, monkeypatch):
    library = Library(filled)

    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(library_module, "write_json", killed)
        with pytest.raises(Killed):
            library.put("key3", SITES[3], MIXER, result(4.0))
    assert (filled / "key3.safetensors").exists()
    again = Library(filled)
    assert len(again) == 3
    assert again.get("key3") is None
    assert again.damaged == []
    assert all(again.get(key) for key in ("key0", "key1", "key2"))
    again.put("key3", SITES[3], MIXER, result(4.0))
    assert Library(filled).get("key3").nmse == 1.0


def test_a_crash_while_replacing_is_noticed(filled, monkeypatch):
    library = Library(filled)

    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(library_module, "write_json", killed)
        with pytest.raises(Killed):
            library.put("key0", SITES[0], MIXER, result(9.0))
    again = Library(filled)  # the index still has the old checksum
    assert again.get("key0") is None
    assert len(again.damaged) == 1
    assert again.get("key1") is not None


def test_a_crash_while_the_tensors_are_written_leaves_nothing(filled, monkeypatch):
    from mixerzoo import files as files_module

    def killed(*_):
        raise Killed

    before = files(filled)
    with monkeypatch.context() as patch:
        patch.setattr(files_module.os, "fsync", killed)
        with pytest.raises(Killed):
            Library(filled).put("key3", SITES[3], MIXER, result(4.0))
    assert files(filled) == before
    assert Library(filled).get("key3") is None


def test_a_name_in_the_index_is_not_trusted(filled):
    index = read_json(filled / INDEX)
    index["key0"]["sha256"] = index["key1"]["sha256"]
    write_json(filled / INDEX, index)
    library = Library(filled)
    assert library.get("key0") is None
    assert library.get("key1") is not None
