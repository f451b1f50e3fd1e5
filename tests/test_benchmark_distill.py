"""benchmarks/distill.py: each part runs, goes on where it stopped, and says what it found; on the tiny teacher."""

import json
import mmap
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_search
import torch
from click.testing import CliRunner

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import distill  # noqa: E402
import sections  # noqa: E402
import subjects  # noqa: E402
from distill_parts import kill, memory, plain  # noqa: E402

sys.path.remove(str(BENCHMARKS))

from mixerzoo.data import open_npz  # noqa: E402


@pytest.fixture
def subject(tmp_path):
    data = open_npz(str(tiny_search.write_npz(tmp_path / "pictures.npz")))
    return subjects.Subject(teacher=tiny.tiny_teacher(), data=data, indices=data.splits.calibration[:40])


@pytest.fixture
def start(subject, monkeypatch, tmp_path):
    """Run the script on the tiny teacher; returns its result and what is in the JSON."""
    monkeypatch.setattr(distill, "open_subject", lambda *_, **__: subject)

    def run(*arguments, quick=True):
        file = tmp_path / "distill.json"
        common = ["--teacher", "digits_vit", "--json", str(file), "--cache", str(tmp_path / "cache")]
        common += ["--threads", "1", *(["--quick"] if quick else [])]
        result = CliRunner().invoke(distill.main, [*common, *arguments])
        return result, json.loads(file.read_text())["digits_vit"] if file.exists() else {}

    return run


def test_library_is_timed_in_teacher_passes(start):
    result, figures = start("--parts", "library", "--mixers", "static,pool")
    assert result.exit_code == 0, result.output
    library = figures["library"]
    assert library["candidates"] == 4
    one = library["rows"]["one process"]
    assert one["passes"] == pytest.approx(one["capture_passes"] + one["build_passes"], abs=0.01)
    assert set(one["seconds_by_mixer"]) == {"static", "pool"}
    assert not one["failed"]
    assert "versions" in library["environment"]


def test_plain_way_is_trained_live_and_goes_on(start, monkeypatch):
    monkeypatch.setattr(plain, "QUICK_STEPS", 6)
    result, figures = start("--parts", "plain", "--mixers", "static,pool")
    assert result.exit_code == 0, result.output
    rows = figures["plain"]["rows"]
    assert len(rows) == 2
    for row in rows.values():
        assert row["plain"]["steps"] == row["plain"]["timed_steps"] == 6
        assert 0 < row["nmse"] < row["plain"]["nmse"]
        assert not row["plain"]["reached"]
    # Nothing is measured twice.
    monkeypatch.setattr(plain, "_compare", lambda *_: pytest.fail("measured again"))
    result, again = start("--parts", "plain", "--mixers", "static,pool")
    assert result.exit_code == 0, result.output
    assert again["plain"]["rows"] == rows


def test_plain_way_stops_where_it_is_as_good(subject):
    settings = sections.Settings(
        teacher="tiny", cache=Path(), data=None, images=40, mixers=("static",), steps=1, minutes=0.0, plans=(),
        variants=(), live_every=1, threads=1, seed=0, quick=True,
    )  # fmt: skip
    site = subject.attention[0]
    captured = subject.capture((site,)).sites[site.name]
    candidate = subjects.widest("static")
    found = plain.train_plainly(subject, site, candidate, captured, 1e9, settings)
    assert found["steps"] == 0
    assert found["reached"]


def test_live_site_sees_what_was_captured(subject):
    site = subject.attention[1]
    captured = subject.capture((site,)).sites[site.name]
    with plain.LiveSite(subject.teacher.model, site) as live:
        x, y = live.pairs(torch.cat(subject.batches)[:5])
    torch.testing.assert_close(x, captured.x[:5].float(), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(y, captured.y[:5].float(), rtol=1e-2, atol=1e-2)
    assert not subject.teacher.model.get_submodule(site.name)._forward_hooks


def test_nmse_after_steps_is_no_worse(start):
    result, figures = start("--parts", "nmse")
    assert result.exit_code == 0, result.output
    for row in figures["nmse"]["rows"].values():
        assert row["nmse"] <= row["nmse_closed"] <= row["nmse_start"]


def test_refit_of_every_plan(start):
    result, figures = start("--parts", "refit", "--mixers", "pool,linear", "--plans", "static,best")
    assert result.exit_code == 0, result.output
    rows = figures["refit"]["rows"]
    assert set(rows) == {"centred: teacher", "centred: static", "centred: best"}
    for name in ("static", "best"):
        row = rows[f"centred: {name}"]
        assert set(row["plan"]) == {"blocks.0.attn", "blocks.1.attn"}
        assert row["refit"]["passes"] > 0
        assert all(0 <= row[when]["accuracy"] <= 1 for when in ("stitched", "refit", "steps"))


def test_parts_are_added_to_one_file_and_quick_ones_replace_none(start, tmp_path):
    start("--parts", "nmse", "--steps", "2")
    _, figures = start("--parts", "library", "--mixers", "pool")
    assert set(figures) == {"nmse", "library"}
    file = tmp_path / "distill.json"
    content = json.loads(file.read_text())
    content["digits_vit"]["nmse"]["settings"]["quick"] = False
    file.write_text(json.dumps(content))
    result, _ = start("--parts", "nmse")
    assert result.exit_code == 2
    assert "in full" in result.output


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--parts", "libary"], "libary"),
        (["--mixers", "statik"], "static"),
        (["--plans", "worst"], "worst"),
        (["--live-every", "0"], "--live-every"),
    ],
)
def test_bad_input_is_named(start, arguments, word):
    result, figures = start(*arguments)
    assert result.exit_code == 2
    assert word in result.output
    assert not figures


def test_scattered_digits_are_the_same_each_time_and_unlike_each_other(subject):
    scattered = subjects.scatter(subject.data)
    first, again, other = (np.asarray(scattered.image(index)) for index in (3, 3, 4))
    assert first.shape == (112, 112, 3)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert scattered.fingerprint != subject.data.fingerprint
    assert torch.equal(scattered.labels, subject.data.labels)


def test_sampler_sees_memory_that_is_gone_again():
    if not Path("/proc/self/status").exists():
        pytest.skip("the part `memory` needs Linux")
    before = memory.status_mib("RssAnon")
    with memory.Sampler() as sampler:
        # Fresh pages of its own: what was freed before may be there still.
        block = mmap.mmap(-1, 64 * 2**20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        block.write(b"1" * len(block))
        time.sleep(20 * memory.SAMPLE_S)
        block.close()
    assert sampler.highest >= before + 32


@pytest.mark.slow
def test_killed_builds_and_memory(tmp_path):
    file = tmp_path / "distill.json"
    arguments = ["--teacher", "digits_vit", "--parts", "memory,kill", "--quick", "--threads", "1"]
    result = CliRunner().invoke(distill.main, [*arguments, "--json", str(file)])
    assert result.exit_code == 0, result.output
    figures = json.loads(file.read_text())["digits_vit"]
    killed = figures["kill"]["rows"]["kill"]
    assert killed["kills"] == kill.QUICK_KILLS
    assert killed["built_twice"] == killed["lost"] == 0
    weights = figures["kill"]["rows"]["flip"]["weights"]
    assert weights["rebuilt"] == weights["flips"]
    assert not weights["others_rebuilt"]
    assert figures["memory"]["peak_ratio"] > 0
