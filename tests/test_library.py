"""The library on disk: keys, checksums, crashes at the worst moment, several processes, and the commands on it."""

import dataclasses
import functools
import importlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from mixerzoo import MixerSpec, locks
from mixerzoo import code_hash as code_hash_module
from mixerzoo.cli import main
from mixerzoo.code_hash import code_hash
from mixerzoo.data import open_digits
from mixerzoo.distill import Distilled, Recipe
from mixerzoo.errors import MixerzooError
from mixerzoo.files import read_json, write_json
from mixerzoo.library import folder as folder_module
from mixerzoo.library.commands import age_text, size_text
from mixerzoo.library.entries import Order, Source
from mixerzoo.library.folder import Library
from mixerzoo.plan import Candidate
from mixerzoo.registry import get_registry
from mixerzoo.spec import Site

SITES = [
    Site(
        name=f"blocks.{number // 2}.{kind}",
        kind=kind.replace("attn", "attention"),
        index=number,
        stage=0,
        dim=24,
        heads=3,
        tokens=17,
    )
    for number, kind in enumerate(("attn", "mlp", "attn", "mlp"))
]
MIXER = Candidate("static", 0.5)
SOURCE = Source(model="tiny", teacher="t" * 64, data_name="x.npz", data="d" * 64, images=100, form="f")
BASE = Order(source=SOURCE, site=SITES[0], candidate=MIXER, plugin="mixerzoo 0.1", code="c", recipe=Recipe())

needs_flock = pytest.mark.skipif(sys.platform == "win32", reason="has no such locks")


def order(number):
    return dataclasses.replace(BASE, site=SITES[number])


KEYS = [order(number).key for number in range(4)]


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
    return sorted(path.name for path in folder.iterdir() if path.name != locks.LIBRARY)


def files_of(*keys):
    return sorted(f"{key}.{kind}" for key in keys for kind in ("json", "safetensors"))


@pytest.fixture
def filled(tmp_path):
    library = Library(tmp_path)
    for number in range(3):
        library.put(order(number), result(number + 1.0))
    return tmp_path


# Keys


@pytest.mark.parametrize(
    "change",
    [
        {"site": SITES[2]},
        {"site": dataclasses.replace(SITES[0], heads=1)},
        {"candidate": Candidate("static", 1.0)},
        {"candidate": Candidate("pool", 0.5)},
        {"plugin": "mixerzoo 0.2"},
        {"plugin": "other 0.1"},
        {"code": "e"},
        {"recipe": Recipe(steps=1)},
        {"recipe": Recipe(lr=1e-4)},
        {"recipe": Recipe(seed=1)},
        {"source": dataclasses.replace(SOURCE, teacher="u")},
        {"source": dataclasses.replace(SOURCE, data="e")},
        {"source": dataclasses.replace(SOURCE, images=101)},
        {"source": dataclasses.replace(SOURCE, form="g")},
        {"source": dataclasses.replace(SOURCE, teacher=SOURCE.data, data=SOURCE.teacher)},
    ],
    ids=str,
)
def test_the_key_depends_on_each_ingredient(change):
    assert dataclasses.replace(BASE, **change).key != BASE.key


def test_the_key_is_stable_and_a_file_name():
    assert dataclasses.replace(BASE, recipe=Recipe(steps=0)).key == BASE.key
    assert folder_module.KEY.fullmatch(BASE.key)
    # What they are called is for people.
    assert (
        dataclasses.replace(BASE, source=dataclasses.replace(SOURCE, model="m", data_name="y")).key
        == BASE.key
    )


def test_every_field_of_the_recipe_is_in_the_key():
    assert set(Recipe(wider=1.0).to_json()) == set(vars(Recipe()))
    assert set(vars(Recipe())) - set(Recipe().to_json()) == {"wider"}  # where there is none


def test_a_teacher_of_the_same_weights_may_be_another_source():
    import tiny  # what processes of their own need not import

    data, teacher = open_digits(), tiny.tiny_teacher()
    there = Source.of(teacher, data, range(20))
    assert there == Source.of(tiny.tiny_teacher(), data, range(20))
    assert (there.teacher, there.data, there.images) == (teacher.fingerprint, data.fingerprint, 20)
    image = dataclasses.replace(teacher.image, mean=(0.25,))
    activation = tiny.tiny_teacher()
    activation.model.blocks[0].mlp.act = nn.ReLU()
    squashed = dataclasses.replace(teacher.image, crop_mode="squash")
    others = [dataclasses.replace(teacher, image=other) for other in (image, squashed)]
    for changed in (*others, activation):
        other = Source.of(changed, data, range(20))
        assert other == dataclasses.replace(there, form=other.form)
        assert other.form != there.form
    assert Source.of(teacher, data, range(1, 21)).form != there.form


MODULE = "from torch import nn\n\nclass Mine(nn.Module):\n    def __init__(self, dim):\n        pass\n"


@pytest.fixture
def code_of(tmp_path):
    """Write the modules `name` -> text to a folder of their own, import `mine` from it, and hash its mixer's code."""

    def hashed(modules, package=""):
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        (root / package).mkdir(parents=True)
        for name, text in modules.items():
            (root / package / f"{name}.py").write_text(text)
        mine = f"{package}.mine" if package else "mine"
        before = set(sys.modules)
        sys.path.insert(0, str(root))
        importlib.invalidate_caches()
        try:
            build = functools.partial(importlib.import_module(mine).Mine)
            return code_hash(MixerSpec(name="mine", build=build, summary=""))
        finally:
            sys.path.remove(str(root))
            for name in set(sys.modules) - before:
                del sys.modules[name]

    return hashed


def test_a_mixer_whose_code_was_edited_is_another_one(code_of):
    """Its version says nothing about that: it stays the same while its author works on it."""
    before = code_of({"mine": MODULE, "other": ""})
    assert code_of({"mine": MODULE, "other": "x = 1"}) == before
    assert code_of({"mine": MODULE + "# edited\n", "other": ""}) != before


@pytest.mark.parametrize(
    "line",
    [
        "from pack import deeper", "from . import deeper", "from .deeper import helper", "import pack.deeper",
        "def late():\n    from pack.deeper import helper",
    ],
)  # fmt: skip
def test_what_a_mixer_imports_from_its_package_is_part_of_its_code_and_nothing_else_is(code_of, line):
    modules = {"__init__": "", "mine": f"{line}\n{MODULE}", "deeper": "from . import helper", "helper": ""}
    before = code_of(modules, "pack")
    assert code_of(modules | {"another": "x = 1"}, "pack") == before
    assert code_of(modules | {"helper": "x = 1"}, "pack") != before


def test_code_that_cannot_be_read_is_never_taken_for_the_same(monkeypatch):
    namespace = {"__name__": "nowhere"}
    exec(MODULE, namespace)
    spec = MixerSpec(name="mine", build=namespace["Mine"], summary="")
    here = code_hash(spec)
    assert code_hash(spec) == here
    monkeypatch.setattr(code_hash_module, "_UNKNOWN", "another process")
    assert code_hash(spec) != here


def test_the_code_that_distils_is_in_the_key(monkeypatch):
    spec = get_registry().mixers.get("static")
    before = code_hash(spec)
    monkeypatch.setattr(code_hash_module, "__version__", "9")
    assert code_hash(spec) != before
    assert "distill.py" in {path.name for path in code_hash_module.DISTILLING}


# Round trips


def test_an_empty_library(tmp_path):
    library = Library(tmp_path / "new")
    assert len(library) == 0
    assert library.get(KEYS[0]) is None
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("again", [False, True], ids=["same process", "next process"])
def test_what_is_put_is_got(filled, again):
    library = Library(filled)
    if not again:
        library.put(order(1), result(2.0))
    entry = library.get(KEYS[1])
    assert (entry.key, entry.site, entry.candidate) == (KEYS[1], SITES[1].name, "static@0.5")
    assert (entry.nmse, entry.nmse_start, entry.steps, entry.params) == (0.5, 0.5, 3, 10)
    assert math.isnan(entry.nmse_solved)
    assert (entry.seconds, entry.failed) == (0.125, "")
    assert (entry.model, entry.teacher, entry.data, entry.images) == ("tiny", "t" * 64, "d" * 64, 100)
    assert (entry.plugin, entry.recipe) == ("mixerzoo 0.1", Recipe().to_json())
    state = library.state(KEYS[1])
    assert state.keys() == {"a.weight", "b"}
    assert torch.equal(state["a.weight"], torch.full((3, 2), 2.0))
    assert torch.equal(state["b"], torch.arange(4))
    assert library.damaged == []


def test_entries_are_the_same_in_the_next_process(filled):
    one, two = Library(filled), Library(filled)
    assert [repr(entry) for entry in one] == [repr(entry) for entry in two]
    assert [entry.key for entry in one] == sorted(KEYS[:3])
    assert len(one) == 3


def test_putting_again_replaces(filled):
    Library(filled).put(order(0), result(9.0))
    library = Library(filled)
    assert len(library) == 3
    assert library.get(KEYS[0]).nmse == 9 * 0.25
    assert library.state(KEYS[0])["a.weight"][0, 0] == 9


def test_failures_are_kept_with_their_reason(tmp_path):
    Library(tmp_path).put(BASE, result(failed="ValueError: no"))
    entry = Library(tmp_path).get(BASE.key)
    assert entry.failed == "ValueError: no"
    assert entry.nmse == math.inf
    assert entry.sha256 == ""
    assert files(tmp_path) == [f"{BASE.key}.json"]


def test_entries_are_strict_json(tmp_path):
    Library(tmp_path).put(BASE, result(failed="no"))
    text = (tmp_path / f"{BASE.key}.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert json.loads(text)["nmse"] is None


def test_nothing_temporary_is_left(filled):
    with Library(filled).claim(KEYS[3]) as mine:
        assert mine
        assert f"{KEYS[3]}.lock" in files(filled)
    assert files(filled) == files_of(*KEYS[:3])


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
        path.write_bytes((path.parent / f"{KEYS[2]}.safetensors").read_bytes())
    else:
        content[int(how)] ^= 1
        path.write_bytes(content)


@pytest.mark.parametrize("how", ["0", "20", "-1", "missing", "truncated", "empty", "swapped"])
def test_only_the_damaged_one_is_dropped(filled, how):
    damage(filled / f"{KEYS[1]}.safetensors", how)
    library = Library(filled)
    assert library.get(KEYS[1]) is None
    assert len(library.damaged) == 1
    assert f"{SITES[1].name} static@0.5" in library.damaged[0]
    assert f"{KEYS[1]}.safetensors" in library.damaged[0]
    assert library.get(KEYS[1]) is None  # and it is not named twice
    assert len(library.damaged) == 1
    for key in (KEYS[0], KEYS[2]):
        assert library.get(key) is not None
        assert library.state(key)
    library.put(order(1), result(5.0))
    again = Library(filled)
    assert again.get(KEYS[1]).nmse == 5 * 0.25
    assert again.damaged == []


def test_damage_after_the_check_is_an_error(filled):
    library = Library(filled)
    assert library.get(KEYS[1]) is not None
    damage(filled / f"{KEYS[1]}.safetensors", "-1")
    with pytest.raises(MixerzooError, match=r"safetensors' is damaged; run the same command again"):
        library.state(KEYS[1])


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"3", b'{"k": 1}', b'{"key": "k"}', b"\xff", "another's"], ids=repr
)
def test_a_damaged_entry_is_named_and_only_that_candidate_is_made_again(filled, content):
    path = filled / f"{KEYS[1]}.json"
    path.write_bytes((filled / f"{KEYS[2]}.json").read_bytes() if content == "another's" else content)
    library = Library(filled)
    assert len(library) == 2
    assert library.get(KEYS[1]) is None
    assert library.damaged == [f"its entry ({path})"]
    assert library.get(KEYS[0]) is not None
    library.put(order(1), result())
    again = Library(filled)
    assert again.get(KEYS[1]) is not None
    assert again.damaged == []


# Crashes


class Killed(BaseException):
    """What a killed process looks like from the inside."""


def test_a_crash_before_the_entry_loses_that_candidate_only(filled, monkeypatch):
    library = Library(filled)

    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(folder_module, "write_json", killed)
        with pytest.raises(Killed):
            library.put(order(3), result(4.0))
    assert (filled / f"{KEYS[3]}.safetensors").exists()
    again = Library(filled)
    assert len(again) == 3
    assert again.get(KEYS[3]) is None
    assert again.damaged == []
    assert all(again.get(key) for key in KEYS[:3])
    again.put(order(3), result(4.0))
    assert Library(filled).get(KEYS[3]).nmse == 1.0


def test_a_crash_while_replacing_is_noticed(filled, monkeypatch):
    library = Library(filled)

    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(folder_module, "write_json", killed)
        with pytest.raises(Killed):
            library.put(order(0), result(9.0))
    again = Library(filled)  # the entry still has the old checksum
    assert again.get(KEYS[0]) is None
    assert len(again.damaged) == 1
    assert again.get(KEYS[1]) is not None


def test_a_crash_while_the_tensors_are_written_leaves_nothing(filled, monkeypatch):
    from mixerzoo import files as files_module

    def killed(*_):
        raise Killed

    before = files(filled)
    with monkeypatch.context() as patch:
        patch.setattr(files_module.os, "fsync", killed)
        with pytest.raises(Killed):
            Library(filled).put(order(3), result(4.0))
    assert files(filled) == before
    assert Library(filled).get(KEYS[3]) is None


def test_a_checksum_in_an_entry_is_not_trusted(filled):
    entries = [read_json(filled / f"{key}.json") for key in KEYS[:2]]
    write_json(filled / f"{KEYS[0]}.json", entries[0] | {"sha256": entries[1]["sha256"]})
    library = Library(filled)
    assert library.get(KEYS[0]) is None
    assert library.get(KEYS[1]) is not None


def test_no_digit_of_an_entry_can_change_unseen(filled):
    path = filled / f"{KEYS[0]}.json"
    whole = path.read_bytes()
    for place in (at for at, byte in enumerate(whole) if chr(byte).isdigit()):
        changed = bytearray(whole)
        changed[place] ^= 1
        path.write_bytes(changed)
        library = Library(filled)
        assert library.get(KEYS[0]) is None, (place, bytes(changed))
        assert len(library.damaged) == 1
        assert library.get(KEYS[1]) is not None
    path.write_bytes(whole)
    assert Library(filled).get(KEYS[0]) is not None


# Several processes

# Each makes all candidates it can claim, then takes the others' from disk, as a search does.
WORKER = """
import os, sys, time
from pathlib import Path
import test_library as t
from mixerzoo.library.folder import Library

folder, role = Path(sys.argv[1]), sys.argv[2]
library = Library(folder / "library")
print("ready", flush=True)
sys.stdin.readline()
todo = [t.order(number) for number in range(4)]
for wait in (False, True):
    others = []
    for order in todo:
        with library.claim(order.key, wait=wait) as mine:
            if not mine:
                others.append(order)
            elif library.get(order.key) is None:
                (folder / f"{order.key}.{role}.making").touch()
                time.sleep(60 if role == "stuck" else 0.05)
                library.put(order, t.result())
    todo = others
assert all(library.get(key) is not None for key in t.KEYS)
assert library.damaged == []
"""


@pytest.fixture
def worker(tmp_path):
    """Start a process that makes four candidates; it waits for a line first."""
    started = []

    def start(role):
        process = subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path), role],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def go(*processes):
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()


def appears(folder, pattern):
    for _ in range(2000):
        if any(folder.glob(pattern)):
            return
        time.sleep(0.01)
    raise AssertionError(pattern)


@needs_flock
def test_processes_share_the_work_and_none_does_what_another_did(tmp_path, worker):
    processes = [worker(role) for role in ("one", "two")]
    go(*processes)
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
    made = [path.name.partition(".")[0] for path in tmp_path.glob("*.making")]
    assert sorted(made) == sorted(KEYS)
    assert files(tmp_path / "library") == files_of(*KEYS)


@needs_flock
def test_what_a_killed_process_was_making_is_made_by_the_one_that_waits(tmp_path, worker):
    stuck, other = worker("stuck"), worker("other")
    go(stuck)
    appears(tmp_path, "*.stuck.making")
    go(other)
    appears(tmp_path, f"{KEYS[3]}.other.making")
    time.sleep(0.2)
    assert other.poll() is None  # it waits for the first candidate
    assert Library(tmp_path / "library").get(KEYS[0]) is None
    stuck.send_signal(signal.SIGKILL)
    assert other.wait(timeout=60) == 0
    assert files(tmp_path / "library") == files_of(*KEYS)


@needs_flock
def test_prune_leaves_alone_what_a_running_process_holds(tmp_path, worker):
    folder = tmp_path / "library"
    Library(folder).put(order(1), result())
    stuck = worker("stuck")
    go(stuck)
    appears(tmp_path, f"{KEYS[0]}.stuck.making")
    for name in (f".{KEYS[0]}.safetensors.1.tmp", f"{KEYS[0]}.safetensors", f"{KEYS[2]}.safetensors"):
        (folder / name).write_bytes(b"half")
    done = run("prune", str(folder), "--older-than", "0")
    assert done.exit_code == 0
    assert f"{KEYS[2]}.safetensors" in done.stdout
    assert "a search is using this library" in done.stderr
    assert KEYS[0] not in done.stdout
    assert {f".{KEYS[0]}.safetensors.1.tmp", f"{KEYS[0]}.safetensors", f"{KEYS[0]}.lock"} < set(files(folder))
    assert set(files_of(KEYS[1])) < set(files(folder))
    stuck.kill()
    stuck.wait()
    assert run("prune", str(folder), "--older-than", "0").exit_code == 0
    assert files(folder) == []


@needs_flock
def test_a_lock_is_given_to_one_at_a_time(tmp_path):
    path = tmp_path / "a.lock"
    with locks.held(path) as mine:
        assert mine
        with locks.held(path, wait=False) as other:
            assert not other
        assert path.exists()
    assert not path.exists()
    shared = [locks.acquire(path, shared=True, wait=False) for _ in range(2)]
    assert None not in shared
    assert locks.acquire(path, wait=False) is None
    for descriptor in shared:
        os.close(descriptor)
    os.close(locks.acquire(path, wait=False))


def test_without_locks_every_one_is_granted(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with locks.held(tmp_path / "a.lock") as mine, locks.held(tmp_path / "a.lock", wait=False) as other:
        assert mine
        assert other


# The commands


def run(*words):
    return CliRunner().invoke(main, ["library", *words], catch_exceptions=False)


def refused(done, *texts):
    assert done.exit_code == 2
    assert done.stderr.startswith("mixerzoo: ")
    assert done.stderr.count("\n") == 1
    for text in texts:
        assert text in done.stderr


def test_list_shows_every_candidate(filled):
    Library(filled).put(order(3), result(failed="no"))
    done = run("list", str(filled))
    assert done.exit_code == 0
    header, *rows = done.stdout.splitlines()[:5]
    assert header.split() == [
        "key", "site", "candidate", "start", "solved", "final", "steps", "params", "size", "used", "teacher", "data"
    ]  # fmt: skip
    assert [row.split()[:7] for row in rows] == [
        [KEYS[0][:8], "blocks.0.attn", "static@0.5", "0.5000", "-", "0.2500", "3"],
        [KEYS[1][:8], "blocks.0.mlp", "static@0.5", "0.5000", "-", "0.5000", "3"],
        [KEYS[2][:8], "blocks.1.attn", "static@0.5", "0.5000", "-", "0.7500", "3"],
        [KEYS[3][:8], "blocks.1.mlp", "static@0.5", "0.5000", "-", "failed", "3"],
    ]
    assert "tiny tttttttt" in rows[0]
    assert "x.npz dddddddd" in rows[0]
    assert "\n4 candidates, " in done.stdout
    listed = json.loads(run("list", str(filled), "--json").stdout)
    assert [item["key"] for item in listed] == KEYS
    assert listed[0]["bytes"] == (filled / f"{KEYS[0]}.safetensors").stat().st_size
    assert listed[0]["teacher"] == "t" * 64
    assert listed[0]["unused_s"] < 600


def test_sites_are_listed_in_their_order(tmp_path):
    for block in (10, 2):
        site = dataclasses.replace(SITES[0], name=f"blocks.{block}.attn")
        Library(tmp_path).put(dataclasses.replace(BASE, site=site), result())
    listed = json.loads(run("list", str(tmp_path), "--json").stdout)
    assert [item["site"] for item in listed] == ["blocks.2.attn", "blocks.10.attn"]


def test_show_tells_all_about_one(filled):
    done = run("show", KEYS[1][:6], str(filled))
    assert done.exit_code == 0
    told = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert told["key"] == KEYS[1]
    assert told["site"] == SITES[1].name
    assert told["recipe"] == "steps 0, lr 0.002, seed 0, objective nmse"
    assert told["failed"] == "-"
    assert set(told) == set(read_json(filled / f"{KEYS[1]}.json")) - {"check"} | {"bytes", "unused_s"}
    refused(run("show", "xyz", str(filled)), "key 'xyz'", "no such key")
    refused(run("show", "", str(filled)), "key ''", "3 keys begin with it")


@pytest.mark.parametrize("words", [["list"], ["show", "abc"], ["verify"], ["prune"]], ids=str)
def test_what_is_no_library_is_refused_and_left_alone(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    refused(run(*words, "nowhere"), "library 'nowhere': no such folder")
    refused(run(*words), "library 'runs/library': no such folder")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / f"{KEYS[0]}.json").write_text("{}")
    refused(run(*words, "mine"), "library 'mine': not a library")
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", f"{KEYS[0]}.json"]


def test_verify_names_what_is_damaged_and_what_belongs_to_nothing(filled):
    Library(filled).put(order(3), result(failed="no"))
    done = run("verify", str(filled))
    assert (done.exit_code, done.stdout) == (0, "4 candidates, all whole\n")
    damage(filled / f"{KEYS[1]}.safetensors", "-1")
    (filled / f"{KEYS[2]}.json").write_text("{")
    (filled / f"{BASE.key[::-1]}.safetensors").write_bytes(b"x")
    (filled / "notes.json").write_text("mine")
    before = files(filled)
    done = run("verify", str(filled))
    refused(done, f"library '{filled}': 3 faults", f"`mixerzoo library prune {filled}`")
    lines = {line.split()[1]: line.split()[0] for line in done.stdout.splitlines()}
    assert lines == {
        f"{KEYS[1]}.safetensors": "damaged",
        f"{KEYS[2]}.json": "damaged",
        f"{BASE.key[::-1]}.safetensors": "orphan",
    }
    assert SITES[1].name in done.stdout
    assert files(filled) == before


def test_prune_removes_what_verify_names_and_what_was_left_behind(filled):
    damage(filled / f"{KEYS[1]}.safetensors", "-1")
    orphan = f"{KEYS[3]}.safetensors"
    for name in (orphan, f".{KEYS[0]}.json.77.tmp", "notes.json", f"{KEYS[2]}.lock"):
        (filled / name).write_bytes(b"x")
    dry = run("prune", str(filled), "--dry-run")
    assert dry.exit_code == 0
    assert "3 would be removed" in dry.stdout
    assert orphan in files(filled)
    done = run("prune", str(filled))
    assert done.exit_code == 0
    assert "3 removed" in done.stdout
    assert dry.stdout.splitlines()[:-1] == done.stdout.splitlines()[:-1]
    assert files(filled) == sorted([*files_of(KEYS[0], KEYS[2]), "notes.json"])
    assert "2 candidates, all whole" in run("verify", str(filled)).stdout
    assert "0 removed, 0 B" in run("prune", str(filled)).stdout


def test_prune_removes_what_no_search_has_used_for_long_if_asked_to(filled):
    long_ago = time.time() - 10 * 86_400
    for key in KEYS[:2]:
        os.utime(filled / f"{key}.json", (long_ago, long_ago))
    assert Library(filled).get(KEYS[1]) is not None  # a use
    assert "0 removed" in run("prune", str(filled)).stdout
    assert "0 removed" in run("prune", str(filled), "--older-than", "11").stdout
    assert "1 removed" in run("prune", str(filled), "--older-than", "9").stdout
    assert files(filled) == files_of(*KEYS[1:3])
    refused(run("prune", str(filled), "--older-than", "-1"), "--older-than -1")
    refused(run("prune", str(filled), "--older-than", "nan"), "--older-than nan")


def test_prune_removes_failures_if_asked_to(filled):
    Library(filled).put(order(3), result(failed="no"))
    assert "0 removed" in run("prune", str(filled)).stdout
    assert "1 removed" in run("prune", str(filled), "--failed").stdout
    assert files(filled) == files_of(*KEYS[:3])


def test_sizes_and_ages_are_short():
    assert [size_text(size) for size in (0, 1023, 1536, 5 << 20, 3 << 30)] == [
        "0 B", "1023 B", "1.5 KiB", "5.0 MiB", "3.0 GiB"
    ]  # fmt: skip
    assert [age_text(seconds) for seconds in (-1, 5, 90, 7200, 200_000)] == [
        "0 s",
        "5 s",
        "2 min",
        "2 h",
        "2 d",
    ]
