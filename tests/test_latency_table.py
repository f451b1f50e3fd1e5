"""Latencies kept in a library: what they depend on, when they still hold, and that none is ever half there."""

import json
import multiprocessing
from dataclasses import replace

import pytest
import tiny
import tiny_search
from click.testing import CliRunner
from torch import nn

from mixerzoo import Caps, MixerSpec, hookimpl
from mixerzoo.cli import main
from mixerzoo.code_hash import build_hash
from mixerzoo.latency import Conditions, InPlace, Stopwatch, by_shape, reuse
from mixerzoo.latency.in_place import of_shapes
from mixerzoo.latency.reuse import CHECKED, know
from mixerzoo.latency.store import LatencyFile, architecture
from mixerzoo.library.folder import Library, check_folder, is_library
from mixerzoo.plan import Candidate
from mixerzoo.progress import Reporter
from mixerzoo.registry import temporary_plugin

NAMES = ("none", "static@0.5", "pool", "mlp_slice@0.5", "linear")
QUIET = Reporter(quiet=True)


class Ruled(Stopwatch):
    """Latency by rule; `pace` says how much slower than the rule students are, the teacher excepted."""

    pace = 1.0

    def time(self, students, **options):
        found = tiny_search.ruled_time(self, students, **options)
        return {
            name: timing if name == "teacher" else replace(timing, ratio=timing.ratio * self.pace)
            for name, timing in found.items()
        }


def stopwatch_of(teacher=None, **conditions):
    return Ruled(teacher or tiny.tiny_teacher(), Conditions(**{"threads": 1} | conditions))


def wanted_at(teacher, *names):
    """Return shape -> candidates."""
    kinds = {"mlp_slice": "mlp"}
    found = [Candidate.parse(name) for name in names or NAMES]
    return of_shapes(
        teacher.sites,
        {
            site.name: [c for c in found if c.mixer == "none" or kinds.get(c.mixer, "attention") == site.kind]
            for site in teacher.sites
        },
    )


@pytest.fixture
def stopwatch():
    return stopwatch_of()


@pytest.fixture
def timed(monkeypatch):
    """The candidates that are timed in place from here on."""
    seen, real = [], reuse.measure_in_place

    def measure(stopwatch, candidates, **options):
        seen.extend(str(c) for row in candidates.values() for c in row)
        return real(stopwatch, candidates, **options)

    monkeypatch.setattr(reuse, "measure_in_place", measure)
    return seen


def asked(stopwatch, folder, *names, **options):
    wanted = wanted_at(stopwatch.teacher, *names)
    return know(stopwatch, wanted, LatencyFile(folder, stopwatch), reporter=QUIET, **options)


@pytest.mark.parametrize("most", [1, 3])
def test_candidates_that_run_but_not_together_are_timed_in_smaller_parts(
    stopwatch, tmp_path, monkeypatch, most
):
    expected = asked(stopwatch, tmp_path / "together")
    real = reuse.measure_in_place

    def measure(stopwatch, candidates, **options):
        if sum(map(len, candidates.values())) > most:
            raise MemoryError("too many")
        return real(stopwatch, candidates, **options)

    monkeypatch.setattr(reuse, "measure_in_place", measure)
    found = asked(stopwatch, tmp_path / "apart")
    assert found.placed == expected.placed
    assert found.failed == expected.failed


def test_everything_is_measured_once(stopwatch, tmp_path, timed):
    first = asked(stopwatch, tmp_path)
    assert (first.reused, first.measured, first.missing) == (0, 6, 0)  # `none` stands at both kinds of site
    assert len(timed) == 6
    timed.clear()
    second = asked(stopwatch_of(), tmp_path)
    assert (second.reused, second.measured, second.drift) == (6, 0, "")
    assert second.placed == first.placed
    assert len(timed) == CHECKED


def test_the_kept_ones_are_checked_in_turn(stopwatch, tmp_path, timed, monkeypatch):
    clock = iter(f"2026-01-01T00:00:{second:02d}+00:00" for second in range(60))

    class Time:
        @staticmethod
        def now(_):
            class Now:
                @staticmethod
                def isoformat(timespec):
                    return next(clock)

            return Now

    monkeypatch.setattr("mixerzoo.latency.store.datetime", Time)
    asked(stopwatch, tmp_path)
    timed.clear()
    asked(stopwatch, tmp_path)
    first = sorted(timed)
    timed.clear()
    asked(stopwatch, tmp_path)
    assert sorted([*first, *timed]) == sorted(
        str(c) for row in wanted_at(stopwatch.teacher).values() for c in row
    )


@pytest.mark.parametrize("pace", [0.9, 1.1])
def test_a_machine_that_has_changed_is_measured_anew(stopwatch, tmp_path, timed, pace):
    before = asked(stopwatch, tmp_path)
    stopwatch.pace = pace
    timed.clear()
    after = asked(stopwatch, tmp_path, "pool", "none")
    assert "took" in after.drift
    assert (after.reused, after.measured) == (0, 3)
    for shape, row in after.placed.items():
        for name, placed in row.items():
            assert placed.ratio == pytest.approx(before.placed[shape][name].ratio * pace)
    # What was not asked for is forgotten too: it was of the machine as it was.
    assert asked(stopwatch, tmp_path).measured == 3


def test_a_difference_within_the_errors_is_none(stopwatch, tmp_path):
    asked(stopwatch, tmp_path)
    stopwatch.pace = 1.009
    assert asked(stopwatch, tmp_path).reused == 6


def test_what_was_measured_on_a_busy_machine_is_measured_again(stopwatch, tmp_path, timed):
    asked(stopwatch, tmp_path)
    file = LatencyFile(tmp_path, stopwatch)
    shape = next(shape for shape, row in file.read().items() if "pool@1" in row)
    before = file.read()[shape]["pool@1"].placed
    with file.claim():
        file.write(
            {
                shape: {
                    "pool@1": replace(before, error=0.2),  # known to 20 % only
                    "linear@1": replace(before, ratio=3.0, error=0.2),  # certainly slow
                }
            },
            teacher_ms=4.1,
        )
    timed.clear()
    found = asked(stopwatch, tmp_path, "pool", "linear", "none", measure=False)
    assert (found.missing, timed) == (0, [])
    found = asked(stopwatch, tmp_path, "pool", "none", "mlp_slice@0.5", "static@0.5")
    assert found.measured == 1
    assert timed[CHECKED:] == ["pool@1"]
    assert found.placed[shape]["pool@1"] == before
    file = LatencyFile(tmp_path, stopwatch)
    assert file.read()[shape]["linear@1"].placed.ratio == 3.0


def test_again_measures_everything(stopwatch, tmp_path, timed):
    asked(stopwatch, tmp_path)
    timed.clear()
    found = asked(stopwatch, tmp_path, again=True)
    assert (found.reused, found.measured, len(timed)) == (0, 6, 6)


def test_what_is_only_looked_at_is_not_measured(stopwatch, tmp_path, timed):
    found = asked(stopwatch, tmp_path / "library", measure=False)
    assert (found.reused, found.missing, found.placed) == (0, 6, {})
    assert not (tmp_path / "library").exists()
    asked(stopwatch, tmp_path / "library", "pool")
    timed.clear()
    found = asked(stopwatch, tmp_path / "library", measure=False)
    assert (found.reused, found.missing, timed) == (1, 5, [])


def test_the_table_lives_in_a_library(stopwatch, tmp_path):
    folder = tmp_path / "library"
    asked(stopwatch, folder, "pool")
    assert is_library(folder)
    check_folder(folder)
    assert len(Library(folder)) == 0
    assert [path.suffix for path in (folder / "latency").iterdir()] == [".json"]  # no lock is left


# What a table depends on


def path_of(folder, teacher=None, **conditions):
    return LatencyFile(folder, stopwatch_of(teacher, **conditions)).path


@pytest.mark.parametrize("change", [{"threads": 2}, {"batch_size": 2}, {"dtype": "bfloat16"}])
def test_other_conditions_have_a_table_of_their_own(tmp_path, change):
    assert path_of(tmp_path, **change) != path_of(tmp_path)


def test_weights_do_not_matter_and_shapes_do(tmp_path):
    assert path_of(tmp_path, tiny.tiny_teacher(seed=5)) == path_of(tmp_path)
    assert path_of(tmp_path, tiny.tiny_teacher(reg_tokens=2)) != path_of(tmp_path)
    assert architecture(tiny.tiny_teacher(depth=3)) != architecture(tiny.tiny_teacher())


@pytest.mark.parametrize("name", ["mixerzoo", "torch"])
def test_other_versions_have_a_table_of_their_own(tmp_path, monkeypatch, name):
    before = path_of(tmp_path)
    monkeypatch.setattr("mixerzoo.latency.store.version_of", lambda package: "9" if package == name else "1")
    assert path_of(tmp_path) != before


def test_a_device_of_another_name_has_a_table_of_its_own(tmp_path, monkeypatch):
    before = path_of(tmp_path)
    monkeypatch.setattr("mixerzoo.latency.store.device_name", lambda device: "another processor")
    assert path_of(tmp_path) != before


def test_a_mixer_whose_code_has_changed_is_measured_anew(stopwatch, tmp_path, monkeypatch, timed):
    asked(stopwatch, tmp_path)
    monkeypatch.setattr(
        "mixerzoo.latency.store.build_hash",
        lambda spec: "new" if spec.name == "pool" else build_hash(spec),
    )
    timed.clear()
    found = asked(stopwatch, tmp_path)
    assert (found.reused, found.measured) == (5, 1)
    assert timed[CHECKED:] == ["pool@1"]


# Candidates that cannot run


class Fails(nn.Module):
    def forward(self, x):
        raise ValueError("no\nidea")


class Plugin:
    @hookimpl
    def register_mixers(self, register):
        register(MixerSpec(name="fails", build=lambda: Fails(), summary="", caps=Caps(any_length=True)))


def test_a_candidate_that_fails_is_kept_with_its_reason_and_costs_no_other(stopwatch, tmp_path, timed):
    shape = next(iter(by_shape(stopwatch.teacher.sites)))
    with temporary_plugin(Plugin()):
        found = asked(stopwatch, tmp_path, "fails", "pool")
        assert found.failed == {shape: {"fails@1": "ValueError: no idea"}}
        assert set(found.placed[shape]) == {"pool@1"}
        timed.clear()
        again = asked(stopwatch, tmp_path, "fails", "pool")
        assert again.failed == found.failed
        assert again.measured == 0
        assert "fails@1" not in timed
    # A plugin that is gone is nothing to stumble over.
    assert asked(stopwatch, tmp_path, "pool").reused == 1


# Files


def damage(path, how):
    content = path.read_text()
    if how == "half":
        path.write_text(content[: len(content) // 2])
    elif how == "changed":
        path.write_text(content.replace('"sites": 2', '"sites": 1', 1))
        assert path.read_text() != content
    else:
        path.write_text(how)


@pytest.mark.parametrize("how", ["half", "changed", "", "[]", "{}", "null"])
def test_a_damaged_table_is_named_and_rebuilt(stopwatch, tmp_path, how):
    asked(stopwatch, tmp_path)
    file = LatencyFile(tmp_path, stopwatch)
    damage(file.path, how)
    verified = CliRunner().invoke(main, ["library", "verify", str(tmp_path)])
    assert verified.exit_code == 2
    assert f"damaged   latency/{file.path.name}  latencies" in verified.stdout
    told = []

    class Tells(Reporter):
        def note(self, text):
            told.append(text)

    found = know(stopwatch, wanted_at(stopwatch.teacher), file, reporter=Tells(quiet=True))
    assert (found.reused, found.measured) == (0, 6)
    assert told == [f"latency table '{file.path}' is damaged; it is measured anew"]
    assert asked(stopwatch, tmp_path).reused == 6
    assert CliRunner().invoke(main, ["library", "verify", str(tmp_path)]).exit_code == 0
    damage(file.path, how)
    pruned = CliRunner().invoke(main, ["library", "prune", str(tmp_path), "--dry-run"])
    assert (pruned.exit_code, file.path.exists()) == (0, True)
    pruned = CliRunner().invoke(main, ["library", "prune", str(tmp_path)])
    assert "1 removed" in pruned.stdout
    assert not file.path.exists()


def test_an_error_that_is_not_known_is_written_as_json_and_read_back(stopwatch, tmp_path):
    file = LatencyFile(tmp_path, stopwatch)
    with file.claim():
        file.write({"shape": {"pool@1": InPlace(ratio=0.5, error=float("inf"), sites=2)}}, teacher_ms=4.0)
    json.loads(file.path.read_text(), parse_constant=pytest.fail)
    again = LatencyFile(tmp_path, stopwatch)
    assert again.read()["shape"]["pool@1"].placed == InPlace(ratio=0.5, error=float("inf"), sites=2)
    assert again.teacher_ms == 4.0


def _adds(folder, names):
    stopwatch = stopwatch_of()
    file = LatencyFile(folder, stopwatch)
    for name in names:
        with file.claim():
            file.write({"shape": {name: InPlace(ratio=0.5, error=0.0, sites=2)}}, teacher_ms=4.0)


def test_two_processes_lose_nothing_of_each_other(tmp_path):
    parts = [[f"pool@{number}.{process}" for number in range(1, 9)] for process in (1, 2)]
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=_adds, args=(tmp_path, names)) for names in parts]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    found = LatencyFile(tmp_path, stopwatch_of()).read()["shape"]
    assert set(found) == {name for names in parts for name in names}
