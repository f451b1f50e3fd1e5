"""Whole files or none: what a reader meets when writing fails halfway."""

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mixerzoo import files
from mixerzoo.errors import MixerzooError
from mixerzoo.files import read_json, replace_folder, write_bytes, write_json, write_tensors, write_text
from mixerzoo.locks import alone
from mixerzoo.temporary import is_free, remove_leftovers, temporary_of


class Killed(BaseException):
    """What a killed process looks like from the inside."""


def names(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_parents_are_made_and_nothing_else_is_left(tmp_path):
    write_bytes(tmp_path / "a" / "b" / "c.bin", b"\x00\x01")
    assert (tmp_path / "a" / "b" / "c.bin").read_bytes() == b"\x00\x01"
    assert names(tmp_path) == ["c.bin"]


def test_text_and_json_come_back(tmp_path):
    write_text(tmp_path / "t", "größer\n")
    assert (tmp_path / "t").read_text(encoding="utf-8") == "größer\n"
    content = {"a": [1, 2.5, None], "b": {"c": "ü"}}
    write_json(tmp_path / "j", content)
    assert read_json(tmp_path / "j") == content


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError("disk full"), Killed()])
def test_the_old_content_stays_until_the_new_is_whole(tmp_path, monkeypatch, step, error):
    path = tmp_path / "f.json"
    write_json(path, {"old": True})

    def fail(*_):
        raise error

    if step == "fsync":
        monkeypatch.setattr(files.os, "fsync", fail)
    else:
        monkeypatch.setattr(type(path), "replace", fail)
    with pytest.raises(type(error)):
        write_json(path, {"new": True})
    assert read_json(path) == {"old": True}
    assert names(tmp_path) == ["f.json"]


def writes(text):
    return lambda folder: write_text(folder / "a", text)


def contents(folder):
    return {path.name: (path / "a").read_text() for path in folder.iterdir()}


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "best"
    replace_folder(folder, writes("old"))
    replace_folder(folder, writes("new"))
    assert contents(tmp_path) == {"best": "new"}

    def killed(place):
        write_text(place / "a", "half")
        raise Killed

    with pytest.raises(Killed):
        replace_folder(folder, killed)
    assert contents(tmp_path) == {"best": "new"}


def test_a_folder_that_a_killed_process_had_put_aside_is_put_back(tmp_path):
    folder = tmp_path / "best"
    aside = tmp_path / ".best.1.old"
    write_text(aside / "a", "old")

    def fails(place):
        assert contents(tmp_path) == {"best": "old"}
        raise OSError(28, "No space left on device")

    with pytest.raises(MixerzooError, match=r"best' cannot be written \(No space left on device\)"):
        replace_folder(folder, fails)
    assert contents(tmp_path) == {"best": "old"}
    write_text(aside / "a", "older")
    replace_folder(folder, writes("new"))
    assert contents(tmp_path) == {"best": "new"}


def test_the_working_directory_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        MixerzooError, match="working directory, which cannot be replaced; give another --out"
    ):
        replace_folder(Path("."), writes("new"))


def test_what_killed_processes_were_making_is_removed_and_nothing_else(tmp_path):
    temporary_of(tmp_path / "a.json").write_text('{"half')
    write_text(temporary_of(tmp_path / "best") / "a", "half")
    write_text(tmp_path / ".hidden.tmp", "mine")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == [".hidden.tmp"]
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_has_one_lock_whatever_path_leads_to_it(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    folder.mkdir()
    monkeypatch.chdir(folder)
    with alone(Path("."), "trains"):
        assert [path.name for path in tmp_path.glob(".*")] == [".run.lock"]
        for path in (Path("."), folder, Path("..") / "run"):
            with pytest.raises(MixerzooError, match=f"'{path}': another process trains there; wait for it"):
                alone(path, "trains").__enter__()
    assert list(tmp_path.iterdir()) == [folder]


def test_a_place_is_free_whatever_a_killed_process_was_writing_there(tmp_path):
    folder = tmp_path / "run"
    assert is_free(folder)
    folder.mkdir()
    assert is_free(folder)
    temporary_of(folder / "run.json").write_text('{"half')
    temporary_of(folder / "best").mkdir()
    assert is_free(folder)
    for name in (".hidden", "run.json", "notes.7.tmp", ".run.json.tmp"):
        (folder / name).write_text("")
        assert not is_free(folder)
        assert not is_free(folder / name)
        (folder / name).unlink()
    assert is_free(folder)


def test_content_is_on_disk_before_the_name_is(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, type(tmp_path).replace

    def flush(fd):
        events.append(("flushed", os.fstat(fd).st_size))
        fsync(fd)

    def rename(self, target):
        events.append(("renamed", self.stat().st_size))
        return replace(self, target)

    monkeypatch.setattr(files.os, "fsync", flush)
    monkeypatch.setattr(type(tmp_path), "replace", rename)
    write_bytes(tmp_path / "f", b"12345")
    assert events == [("flushed", 5), ("renamed", 5)]


def test_what_is_not_json_is_never_written(tmp_path):
    write_json(tmp_path / "f", 1)
    with pytest.raises(TypeError):
        write_json(tmp_path / "f", {"tensor": object()})
    assert read_json(tmp_path / "f") == 1
    assert names(tmp_path) == ["f"]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"{'a': 1}"])
def test_what_is_not_json_is_named(tmp_path, content):
    (tmp_path / "f.json").write_bytes(content)
    with pytest.raises(MixerzooError, match=r"f\.json': not readable as JSON"):
        read_json(tmp_path / "f.json")


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(MixerzooError, match=r"x\.json': no such file"):
        read_json(tmp_path / "x.json")
    with pytest.raises(MixerzooError, match="not readable as JSON"):
        read_json(tmp_path)


def test_tensors_come_back_with_their_checksum(tmp_path):
    shared = torch.arange(6.0)
    tensors = {
        "whole": shared,
        "transposed": torch.arange(6.0).view(2, 3).T,
        "view": shared[2:4],
        "again": shared,
        "half": torch.ones(2, dtype=torch.bfloat16),
        "learned": torch.nn.Parameter(torch.ones(3)),
        "scalar": torch.tensor(7),
    }
    digest = write_tensors(tmp_path / "t.safetensors", tensors)
    assert digest == hashlib.sha256((tmp_path / "t.safetensors").read_bytes()).hexdigest()
    back = load_file(tmp_path / "t.safetensors")
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor)


def test_the_same_tensors_have_the_same_checksum(tmp_path):
    one = write_tensors(tmp_path / "1", {"a": torch.ones(3), "b": torch.zeros(2)})
    assert one == write_tensors(tmp_path / "2", {"a": torch.ones(3), "b": torch.zeros(2)})
    assert one != write_tensors(tmp_path / "3", {"a": torch.ones(3), "b": torch.tensor([0.0, 1e-30])})


def test_json_is_for_people_too(tmp_path):
    write_json(tmp_path / "f", {"a": 1})
    text = (tmp_path / "f").read_text()
    assert text.endswith("}\n")
    assert len(text.splitlines()) == 3
    assert json.loads(text) == {"a": 1}
