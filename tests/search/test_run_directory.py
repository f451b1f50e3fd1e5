"""A run directory: whose it is, what it holds, and how time adds up over phases, nesting and resumes."""

import json

import pytest

from mixerzoo.errors import MixerzooError
from mixerzoo.temporary import temporary_of
from mixerzoo_search import run_directory
from mixerzoo_search.differences import machines, space
from mixerzoo_search.run_directory import PHASES, ReadOnlyRun, RunDirectory

IDENTITY = {"model": "tiny", "seed": 0, "plugins": {"mixerzoo": "1"}, "space": {"a": ["x"]}}


@pytest.fixture
def run(tmp_path):
    return RunDirectory(tmp_path / "runs" / "mine")


def test_a_new_one_is_only_checked(run):
    assert run.check(IDENTITY) is False
    assert not run.path.exists()
    run.path.mkdir(parents=True)
    assert run.check(IDENTITY) is False  # an empty folder will do
    assert list(run.path.iterdir()) == []


def test_a_started_one_goes_on(run):
    run.start(IDENTITY, teacher_ms=4.5)
    assert run.check(IDENTITY) is True
    assert RunDirectory(run.path).check(dict(IDENTITY)) is True
    assert run.record() == {"identity": IDENTITY, "teacher_ms": 4.5}


@pytest.mark.parametrize(
    ("identity", "text"),
    [
        (IDENTITY | {"seed": 1}, "(seed is 0 there, 1 here)"),
        (IDENTITY | {"space": {"a": ["y"]}}, "(space: y at 1 site added, x at 1 site removed)"),
        (IDENTITY | {"space": {"a": ["x"], "b": []}}, "(space: site b added)"),
        (IDENTITY | {"plugins": {"mixerzoo": "1", "own": "2"}}, "(plugins: own 2 added)"),
        (IDENTITY | {"plugins": {}}, "(plugins: mixerzoo 1 removed)"),
        (IDENTITY | {"plugins": {"mixerzoo": "3"}}, "(plugins: mixerzoo was 1, is 3)"),
        (
            IDENTITY | {"plugins": {"mixerzoo": "1", "own": "2"}, "space": {"a": ["x", "own@1"]}},
            "(plugins: own 2 added; space: own@1 at 1 site added)",
        ),
        (
            IDENTITY | {"seed": 2, "plugins": {}, "space": {}},
            "(seed is 0 there, 2 here)",
        ),
        (IDENTITY | {"new": 3}, "(new is None there, 3 here)"),
        ({"model": "tiny", "seed": 0, "plugins": {"mixerzoo": "1"}}, "(space: site a removed)"),
        (IDENTITY | {"model": "m" * 100}, "m" * 37 + "... here"),
    ],
)
def test_another_search_is_refused_with_the_difference(run, identity, text):
    run.start(IDENTITY)
    before = (run.path / "run.json").read_bytes()
    with pytest.raises(MixerzooError) as raised:
        run.check(identity)
    for part in (str(run.path), "holds another search", text, "give another --out"):
        assert part in str(raised.value)
    assert (run.path / "run.json").read_bytes() == before


def test_of_many_differences_the_first_are_named():
    sites = [f"s{at}" for at in range(12)]
    told = space({site: ["keep"] for site in sites}, {site: ["keep", *"abcde"] for site in sites[1:]})
    assert told == "a at 11 sites, b at 11 sites, c at 11 sites, 2 more added, site s0 removed"
    assert "another order" in space({"s": ["a", "b"]}, {"s": ["b", "a"]})


def test_latencies_of_another_machine_are_told_from_those_of_this_one():
    here = {"device": "cpu", "device_name": "fast", "threads": 2, "versions": {"torch": "2", "optuna": "5"}}
    assert machines(here, here) is None
    assert machines({}, here) is not None
    assert machines(here, here | {"versions": {"torch": "2", "optuna": "6"}}) is None
    assert machines(here, here | {"versions": {"torch": "3"}}) == "torch 2 there, 3 here"
    assert machines(here, here | {"device_name": "slow"}) == "device name fast there, slow here"


def test_of_another_processs_run_nothing_is_written(run):
    run.start(IDENTITY)
    run.store("scores", {"a": 1})
    before = {path: path.read_bytes() for path in run.path.iterdir()}
    only = ReadOnlyRun(run.path)
    only.store("scores", {})
    only.note(teacher_ms=3)
    with only.timed("score"):
        pass
    assert only.load("scores") == {"a": 1}
    assert only.begun
    assert only.check(IDENTITY)
    assert {path: path.read_bytes() for path in run.path.iterdir()} == before


def test_something_else_is_refused(run):
    run.path.mkdir(parents=True)
    (run.path / "letter.txt").write_text("dear")
    with pytest.raises(MixerzooError, match="holds something else; give another --out"):
        run.check(IDENTITY)
    with pytest.raises(MixerzooError, match="holds something else; give another --out"):
        RunDirectory(run.path / "letter.txt").check(IDENTITY)


def test_a_search_that_was_killed_while_it_began_has_not_begun(run):
    run.path.mkdir(parents=True)
    temporary_of(run.path / "run.json").write_text('{"half')
    assert not run.check(IDENTITY)
    run.start(IDENTITY, teacher_ms=1)
    assert run.check(IDENTITY)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("{}", "not a run of mixerzoo"),
        ('{"identity": 3}', "not a run of mixerzoo"),
        ('{"half', "not readable as JSON"),
    ],
)
def test_a_run_file_that_is_none_is_refused(run, content, text):
    run.path.mkdir(parents=True)
    (run.path / "run.json").write_text(content)
    with pytest.raises(MixerzooError, match=text):
        run.check(IDENTITY)


def test_a_note_is_added(run):
    run.start(IDENTITY, teacher_ms=4.5)
    run.note(mlflow_run_id="abc")
    run.note(mlflow_run_id="def", more=[1])
    assert run.record() == {"identity": IDENTITY, "teacher_ms": 4.5, "mlflow_run_id": "def", "more": [1]}


def test_parts_are_stored_and_loaded(run):
    assert run.load("scores") is None
    run.store("scores", {"a": 1.5})
    assert run.load("scores") == {"a": 1.5}
    assert json.loads((run.path / "scores.json").read_text()) == {"a": 1.5}


@pytest.fixture
def clock(monkeypatch):
    """A clock that is moved by hand."""

    class Clock:
        now = 100.0

        def perf_counter(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(run_directory, "time", clock)
    return clock


def test_no_time_was_spent_at_first(run):
    assert run.wall_s() == dict.fromkeys(PHASES, 0.0)


def test_time_inside_another_phase_is_its_own(run, clock):
    with run.timed("score"):
        clock.now += 1
        with run.timed("distill"):
            clock.now += 10
            with run.timed("capture"):
                clock.now += 100
        with run.timed("distill"):
            clock.now += 10
        clock.now += 1
    assert run.wall_s() == dict.fromkeys(PHASES, 0.0) | {"score": 2, "distill": 20, "capture": 100}


def test_a_phase_inside_itself_is_counted_once(run, clock):
    with run.timed("latency"):
        clock.now += 1
        with run.timed("latency"):
            clock.now += 2
    assert run.wall_s()["latency"] == 3


def test_time_adds_up_over_starts_and_counts_where_a_phase_fails(run, clock):
    with run.timed("study"):
        clock.now += 5
    again = RunDirectory(run.path)

    def fails():
        with again.timed("study"):
            clock.now += 2
            with again.timed("exact"):
                clock.now += 1
                raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        fails()
    assert again.wall_s() == dict.fromkeys(PHASES, 0.0) | {"study": 7, "exact": 1}
    with again.timed("study"):  # nothing is left over of the failed ones
        clock.now += 1
    assert again.wall_s()["study"] == 8
