"""The latency protocol under a clock that tests can turn: medians, drift, interleaving, tables."""

import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixerzoo import hookimpl
from mixerzoo.errors import MixerzooError
from mixerzoo.hosts import Replacement, fingerprint
from mixerzoo.latency import (
    DTYPES,
    REFERENCE,
    Conditions,
    Rounds,
    Stopwatch,
    Timing,
    check_device,
    default_threads,
    environment,
    measure,
    measure_table,
    threads,
)
from mixerzoo.latency import rounds as rounds_module
from mixerzoo.latency.rounds import BETWEEN, FEW, MIN_SAMPLE_MS, SETTLE_MS, WARMUP
from mixerzoo.plan import Candidate
from mixerzoo.registry import temporary_plugin
from mixerzoo.spec import RuntimeSpec


class Clock:
    """Time that passes only in subjects; `slowness` says how much slower the machine is at a time."""

    def __init__(self, slowness=lambda seconds: 1.0):
        self.now = 0.0
        self.slowness = slowness
        self.log = []

    def __call__(self):
        return self.now

    def subject(self, name, ms):
        def run():
            self.log.append(name)
            cost = ms() if callable(ms) else ms
            self.now += cost / 1e3 * self.slowness(self.now)

        return run

    def subjects(self, **costs):
        return {name: self.subject(name, ms) for name, ms in costs.items()}


def cold(**options):
    """Rounds whose calls can be counted: nothing runs untimed before a timing."""
    return Rounds(settle_ms=0, **options)


def exactly(count):
    return cold(least=count, most=count)


def timings(clock, costs, **options):
    return measure(clock.subjects(**costs), clock=clock, **options)


# Medians and quartiles


def test_a_steady_machine_gives_the_costs():
    costs = {"teacher": 10.0, "a": 5.0, "b": 20.0, "c": 0.5}
    found = timings(Clock(), costs)
    for name, cost in costs.items():
        assert found[name].median == pytest.approx(cost)
        assert found[name].low == pytest.approx(cost)
        assert found[name].high == pytest.approx(cost)
        assert found[name].ratio == pytest.approx(cost / 10)


@settings(max_examples=20)
@given(costs=st.lists(st.floats(0.01, 100), min_size=1, max_size=7), teacher=st.floats(0.01, 100))
def test_costs_of_any_size(costs, teacher):
    named = {f"s{number}": cost for number, cost in enumerate(costs)}
    found = timings(Clock(), {"teacher": teacher} | named, rounds=exactly(3))
    assert found.keys() == {"teacher", *named}
    for name, cost in named.items():
        assert found[name].median == pytest.approx(cost, rel=1e-6)


@pytest.mark.parametrize("spells", [2, 5])
def test_what_lasts_for_a_spell_is_seen_by_others(spells, monkeypatch):
    """Rounds of one spell agree with each other, and say nothing of the next."""
    slept, number = [], [0]
    monkeypatch.setattr(
        rounds_module.time, "sleep", lambda seconds: (slept.append(seconds), number.append(1))
    )
    factors = [1.0, 1.06, 0.98, 1.02, 0.97][:spells]

    def by_spell():
        return 5.0 * factors[len(number) - 1]

    told = []
    once = timings(Clock(), {"teacher": 10.0, "a": 5.0}, rounds=exactly(7))
    found = timings(
        Clock(),
        {"teacher": 10.0, "a": by_spell},
        rounds=cold(least=7, most=7, spells=spells),
        on_round=told.append,
    )
    assert len(slept) == spells - 1
    assert found["a"].ratio == pytest.approx(0.5 * float(np.median(factors)))
    assert once["a"].error < 1e-9
    assert found["a"].error > (max(factors) - min(factors)) / 4
    assert found["teacher"].ratio == 1.0
    assert told == sorted(told)
    assert told[-1] == 7 * spells


def test_outliers_do_not_count():
    noise = iter(np.random.default_rng(0).random(100_000))

    def spiky():
        return 5.0 * (100 if next(noise) < 0.1 else 1)

    found = timings(Clock(), {"teacher": 10.0, "a": spiky}, rounds=exactly(31))
    assert found["a"].ratio == pytest.approx(0.5, rel=0.01)


def test_a_disturbed_reference_does_not_make_a_student_look_fast():
    noise = np.random.default_rng(0)

    def disturbed():
        return 10.0 * (4 if noise.random() < 0.4 else 1)

    found = timings(Clock(), {"teacher": disturbed, "a": 5.0}, rounds=exactly(21))
    assert found["a"].ratio == pytest.approx(0.5, rel=0.01)


def test_quartiles_show_the_spread():
    noise = np.random.default_rng(0)
    found = timings(Clock(), {"teacher": 10.0, "a": lambda: 10 + 4 * noise.random()}, rounds=exactly(101))
    assert found["a"].low == pytest.approx(11, abs=0.5)
    assert found["a"].median == pytest.approx(12, abs=0.5)
    assert found["a"].high == pytest.approx(13, abs=0.5)


def test_the_teacher_alone():
    found = timings(Clock(), {"teacher": 3.0})
    assert found == {
        REFERENCE: Timing(
            median=found[REFERENCE].median,
            low=found[REFERENCE].low,
            high=found[REFERENCE].high,
            ratio=1.0,
            error=0.0,
        )
    }
    assert found[REFERENCE].median == pytest.approx(3)


# What ran before


def after_another(clock, name, *, cold_ms, warm_ms, calls):
    """A cost that falls from cold to warm within some calls, and begins again where something else ran."""

    def cost():
        run = next((i for i, other in enumerate(reversed(clock.log)) if other != name), len(clock.log))
        return warm_ms + (cold_ms - warm_ms) * max(0.0, 1 - (run - 1) / calls)

    return cost


@pytest.mark.parametrize("settle_ms", [0.0, SETTLE_MS])
def test_what_ran_before_has_taken_the_caches_and_does_not_count(settle_ms):
    clock = Clock()
    costs = {
        "teacher": 10.0,
        "a": after_another(clock, "a", cold_ms=6.0, warm_ms=5.0, calls=3),
        "b": after_another(clock, "b", cold_ms=1.5, warm_ms=1.0, calls=8),
    }
    found = timings(clock, costs, rounds=Rounds(least=9, most=9, settle_ms=settle_ms))
    warm = found["a"].ratio == pytest.approx(0.5) and found["b"].ratio == pytest.approx(0.1)
    assert warm == (settle_ms > 0)


@pytest.mark.parametrize(("ms", "calls"), [(50.0, 1), (20.0, 1), (8.0, 3), (1.0, 20)])
def test_a_subject_settles_for_so_long_and_once_at_least(ms, calls):
    clock = Clock()
    loops = max(1, round(MIN_SAMPLE_MS / ms))
    timings(clock, {"teacher": 10.0, "a": ms}, rounds=Rounds(least=3, most=3))
    assert clock.log.count("a") == pytest.approx(WARMUP + 3 * (calls + loops), abs=3)  # of rounding


def test_without_a_reference_there_is_nothing_to_compare_with():
    with pytest.raises(KeyError, match="teacher"):
        timings(Clock(), {"a": 1.0})


# More rounds where they are needed


def noisy(seed, spread, median=5.0):
    noise = np.random.default_rng(seed)
    return lambda: median * (1 + spread * noise.standard_normal())


def test_a_quiet_machine_needs_the_least_rounds():
    clock = Clock()
    found = timings(clock, {"teacher": 10.0, "a": 10.0}, rounds=cold(least=5, most=50))
    assert clock.log.count("a") == WARMUP + 5
    assert found["a"].error == pytest.approx(0)
    assert found["a"].most == pytest.approx(found["a"].ratio)


def test_only_what_is_not_known_well_enough_is_measured_longer():
    clock = Clock()
    costs = {"teacher": 10.0, "steady": 10.0, "noisy": noisy(0, 0.1, 10.0)}
    found = timings(clock, costs, rounds=cold(least=5, most=400, precision=0.02))
    assert clock.log.count("steady") == WARMUP + 5
    assert 50 < clock.log.count("noisy") < 400
    assert found["noisy"].error <= 0.02
    assert found["noisy"].ratio == pytest.approx(1, abs=0.03)


def test_there_is_an_end_to_it_and_the_error_says_so():
    clock = Clock()
    found = timings(clock, {"teacher": 10.0, "a": noisy(0, 0.15, 10.0)}, rounds=cold(least=5, most=9))
    assert clock.log.count("a") == WARMUP + 9
    assert found["a"].error > 0.05


def test_what_is_certainly_slow_needs_no_precision():
    clock = Clock()
    costs = {"teacher": 10.0, "slow": noisy(0, 0.1, 30.0), "fast": noisy(1, 0.1, 9.0)}
    timings(clock, costs, rounds=cold(least=5, most=60, precision=0.001, slow=1.5))
    assert clock.log.count("slow") < WARMUP + 10
    assert clock.log.count("fast") == WARMUP + 60


def test_the_interval_holds_the_truth():
    held = 0
    for seed in range(60):
        found = timings(Clock(), {"teacher": 10.0, "a": noisy(seed, 0.08)}, rounds=exactly(25))["a"]
        held += abs(found.ratio - 0.5) <= found.error * found.ratio
    assert held >= 54


def test_a_machine_that_is_never_quiet_is_not_believed():
    noise = np.random.default_rng(0)

    def often():
        return 10.0 * (1 if noise.random() < 0.3 else 2 + 3 * noise.random())

    found = timings(Clock(), {"teacher": often, "a": often}, rounds=exactly(15))
    assert found["a"].error >= 0.1


def test_a_measurement_goes_on_until_enough_rounds_are_quiet():
    noise = np.random.default_rng(3)

    def often():  # half of the rounds are disturbed, and the others are exact
        return 10.0 * (1 if noise.random() < 0.5 else 3)

    clock = Clock()
    rounds = cold(least=5, most=300, precision=0.01, quiet=12)
    found = timings(clock, {"teacher": 10.0, "a": often}, rounds=rounds)["a"]
    assert WARMUP + 12 < clock.log.count("a") < 60
    assert found.ratio == pytest.approx(1)
    assert found.error == pytest.approx(0)


def test_few_samples_are_not_taken_for_knowledge():
    held = {3: 0, 4: 0}
    for count in held:
        for seed in range(100):
            found = timings(Clock(), {"teacher": 10.0, "a": noisy(seed, 0.08)}, rounds=exactly(count))["a"]
            held[count] += abs(found.ratio - 0.5) <= found.error * found.ratio
        assert count in FEW
        assert held[count] >= 90
    assert timings(Clock(), {"teacher": 10.0, "a": 5.0}, rounds=exactly(1))["a"].error == np.inf


def test_a_ratio_that_changes_meanwhile_is_not_known():
    """As where another process takes one of two cores: the student that uses both suffers more than the teacher."""
    clock = Clock()

    def later_slower():
        return 5.0 if clock.log.count("a") <= WARMUP + 12 else 6.0

    found = timings(clock, {"teacher": 10.0, "a": later_slower}, rounds=exactly(25))["a"]
    assert found.error >= 0.04


# Drift


@pytest.mark.parametrize(
    "slowness",
    [
        lambda seconds: 1 + seconds / 2,  # it gets hotter and hotter
        lambda seconds: 1 + 0.5 * np.sin(seconds * 3),  # it breathes
        lambda seconds: 1.0 if seconds < 1.5 else 2.0,  # somebody else begins to work
    ],
    ids=["linear", "waves", "step"],
)
def test_drift_is_cancelled_through_the_teacher(slowness):
    costs = {"teacher": 10.0, "a": 5.0, "b": 10.0, "c": 15.0, "d": 7.0}
    found = timings(Clock(slowness), costs)
    for name in "abcd":
        assert found[name].ratio == pytest.approx(costs[name] / 10, rel=0.06)
        assert found[name].median == pytest.approx(found[name].ratio * found[REFERENCE].median)


def test_a_slow_machine_changes_the_milliseconds_but_no_ratio():
    costs = {"teacher": 10.0, "a": 5.0}
    fast, slow = timings(Clock(), costs), timings(Clock(lambda _: 3.0), costs)
    assert slow["a"].ratio == pytest.approx(fast["a"].ratio)
    assert slow["a"].median == pytest.approx(3 * fast["a"].median)


# Order


def sampled(clock, costs, rounds):
    """Return the names in the order in which they were timed, without the warm-up."""
    timings(clock, costs, rounds=exactly(rounds))
    return clock.log[WARMUP * len(costs) :]


def test_subjects_are_interleaved_with_the_teacher():
    # 10 ms are more than a sample must take, so that each run is one timing.
    costs = {"teacher": 10.0} | {f"s{number}": 10.0 for number in range(7)}
    log = sampled(Clock(), costs, rounds=4)
    assert MIN_SAMPLE_MS < 10
    a_round = 1 + 7 + -(-7 // BETWEEN)
    assert len(log) == 4 * a_round
    for start in range(0, len(log), a_round):
        part = log[start : start + a_round]
        assert part[0] == part[-1] == "teacher"
        assert sorted(name for name in part if name != "teacher") == sorted(set(costs) - {"teacher"})
        gaps = re.findall(r"s+", "".join(name[0] for name in part))
        assert max(map(len, gaps)) <= BETWEEN


def test_the_order_differs_from_round_to_round_and_not_from_run_to_run():
    costs = {"teacher": 10.0} | {f"s{number}": 10.0 for number in range(7)}
    one, two = sampled(Clock(), costs, rounds=4), sampled(Clock(), costs, rounds=4)
    assert one == two
    size = len(one) // 4
    assert len({tuple(one[start : start + size]) for start in range(0, len(one), size)}) == 4


def test_everything_is_warmed_up_before_anything_is_timed():
    clock = Clock()
    timings(clock, {"teacher": 10.0, "a": 10.0}, rounds=exactly(1))
    assert sorted(clock.log[: 2 * WARMUP]) == ["a"] * WARMUP + ["teacher"] * WARMUP


def test_a_slow_first_run_does_not_count():
    calls = []

    def compiling():
        calls.append(1)
        return 10_000.0 if len(calls) == 1 else 5.0

    found = timings(Clock(), {"teacher": 10.0, "a": compiling}, rounds=exactly(3))
    assert found["a"].median == pytest.approx(5)


def test_a_timing_is_long_enough_for_the_clock():
    clock = Clock()
    timings(clock, {"teacher": 10.0, "a": 0.1}, rounds=exactly(1))
    assert clock.log.count("a") == WARMUP + round(MIN_SAMPLE_MS / 0.1)


def test_rounds_are_counted():
    seen = []
    timings(Clock(), {"teacher": 10.0, "a": 1.0}, rounds=exactly(3), on_round=seen.append)
    assert seen == [1, 2, 3]


# The table


class FakeStopwatch:
    """Knows what each module costs, wherever it stands."""

    costs = {"Attention": 3.0, "Mlp": 2.0, "Pool": 1.0, "Skip": 0.25, "MlpSlice": 0.5}  # noqa: RUF012
    rest = 4.0

    def __init__(self, teacher, slowness=lambda seconds: 1.0):
        self.teacher = teacher
        self.clock = Clock(slowness)
        self.students = {}

    def cost(self, model):
        total = self.rest
        for site in self.teacher.sites:
            module = model.get_submodule(site.name)
            module = module.mixer if isinstance(module, Replacement) else module
            total += self.costs.get(type(module).__name__, 0.25)
        return total

    def time(self, students, *, rounds, on_round):
        self.students = dict(students)
        costs = {REFERENCE: self.cost(self.teacher.model)}
        costs |= {name: self.cost(model) for name, model in students.items()}
        return timings(self.clock, costs, rounds=rounds, on_round=on_round)


CANDIDATES = {"attention": [Candidate("pool"), Candidate("none")], "mlp": [Candidate("mlp_slice", 0.5)]}


def candidates(teacher):
    return {site.name: CANDIDATES[site.kind] for site in teacher.sites}


@pytest.mark.parametrize(
    "slowness", [lambda _: 1.0, lambda seconds: 1 + 0.3 * seconds], ids=["steady", "drift"]
)
def test_the_table_holds_what_each_candidate_changes(slowness):
    teacher = tiny.tiny_teacher()
    stopwatch = FakeStopwatch(teacher, slowness)
    table = measure_table(stopwatch, candidates(teacher), rounds=exactly(5))
    base = stopwatch.cost(teacher.model)
    assert table.base_ms >= base * 0.999
    assert set(table.change_ms) == {site.name for site in teacher.sites}
    for site in teacher.sites:
        expected = {"pool@1": -2.0, "none@1": -2.75} if site.kind == "attention" else {"mlp_slice@0.5": -1.5}
        found = {name: change / table.base_ms * base for name, change in table.change_ms[site.name].items()}
        assert found == pytest.approx(expected, abs=0.15)
        assert table.error_ms[site.name].keys() == table.change_ms[site.name].keys()
        assert all(0 <= error < 0.3 for error in table.error_ms[site.name].values())


def test_sites_of_one_shape_are_measured_together():
    teacher = tiny.tiny_teacher()
    stopwatch = FakeStopwatch(teacher)
    measure_table(stopwatch, candidates(teacher), rounds=exactly(1))
    assert len(stopwatch.students) == 3
    for name, student in stopwatch.students.items():
        kinds = {
            site.kind for site in teacher.sites if isinstance(student.get_submodule(site.name), Replacement)
        }
        assert len(kinds) == 1
        replaced = [s.name for s in teacher.sites if isinstance(student.get_submodule(s.name), Replacement)]
        assert len(replaced) == 2, name
        assert student.get_submodule(replaced[0]) is not student.get_submodule(replaced[1])


def test_large_candidates_stand_at_fewer_sites(monkeypatch):
    monkeypatch.setattr("mixerzoo.latency.in_place.PLACED_PARAMS", 1)
    teacher = tiny.tiny_teacher()
    stopwatch = FakeStopwatch(teacher)
    table = measure_table(stopwatch, candidates(teacher), rounds=exactly(3))
    for name, student in stopwatch.students.items():
        placed = sum(isinstance(student.get_submodule(site.name), Replacement) for site in teacher.sites)
        assert placed == (2 if "none" in name else 1)
    assert table.change_ms["blocks.0.attn"]["pool@1"] == pytest.approx(-2, abs=0.01)
    assert table.change_ms["blocks.1.attn"] == table.change_ms["blocks.0.attn"]


def test_an_empty_table():
    teacher = tiny.tiny_teacher()
    table = measure_table(FakeStopwatch(teacher), {}, rounds=exactly(1))
    assert table.change_ms == {site.name: {} for site in teacher.sites}
    assert table.base_ms == pytest.approx(14)


def test_the_teacher_is_left_alone():
    teacher = tiny.tiny_teacher()
    measure_table(FakeStopwatch(teacher), candidates(teacher), rounds=exactly(1))
    assert fingerprint(teacher.model) == teacher.fingerprint
    assert type(teacher.model.blocks[0].attn).__name__ == "Attention"


# Runtimes


class Plugin:
    """A runtime that runs nothing: a model takes one ms a parameter tensor."""

    def __init__(self):
        self.clock = Clock()
        self.threads = []
        self.examples = []

    @hookimpl
    def register_runtimes(self, register):
        register(RuntimeSpec(name="pretend", prepare=self.prepare, summary="pretends"))

    def prepare(self, model, example):
        self.threads.append(torch.get_num_threads())
        self.examples.append(example)
        return self.clock.subject("run", float(len(list(model.parameters()))))


def test_another_runtime_is_used_for_everything(monkeypatch):
    plugin = Plugin()
    monkeypatch.setattr("mixerzoo.latency.stopwatch.measure", partial(measure, clock=plugin.clock))
    teacher = tiny.tiny_teacher()
    with temporary_plugin(plugin):
        stopwatch = Stopwatch(teacher, Conditions(threads=3, runtime="pretend", batch_size=5))
        table = measure_table(stopwatch, {"blocks.0.attn": [Candidate("none")]}, rounds=exactly(3))
        found = stopwatch.time({"same": teacher.model}, rounds=exactly(3))
    tensors = len(list(teacher.model.parameters()))
    assert table.base_ms == pytest.approx(tensors)
    assert table.change_ms["blocks.0.attn"]["none@1"] == pytest.approx(-4)  # qkv and proj, weight and bias
    assert found["same"].ratio == pytest.approx(1)
    # Some runtimes settle the number of threads when they prepare: the teacher must not get another one.
    assert set(plugin.threads) == {3}
    assert {tuple(example.shape) for example in plugin.examples} == {(5, 1, 16, 16)}
    assert len({id(example) for example in plugin.examples}) == 1
    assert torch.get_num_threads() == 1


def test_an_unknown_runtime_is_named():
    with pytest.raises(MixerzooError, match="unknown runtime 'eagre': did you mean 'eager'"):
        Stopwatch(tiny.tiny_teacher(), Conditions(runtime="eagre"))


def test_eager_runs_the_model():
    teacher = tiny.tiny_teacher()
    stopwatch = Stopwatch(teacher, Conditions(threads=1, batch_size=2))
    output = stopwatch.prepare(teacher.model)()
    with torch.no_grad():
        assert torch.equal(output, teacher.model(stopwatch.example))
    found = stopwatch.time({"same": teacher.model}, rounds=exactly(2))
    assert found.keys() == {"teacher", "same"}
    assert all(timing.median > 0 for timing in found.values())


@pytest.mark.parametrize("dtype", sorted(set(DTYPES) - {"float32"}))
def test_another_dtype_leaves_the_teacher_as_it_is(dtype):
    teacher = tiny.tiny_teacher(init_values=0.1)
    stopwatch = Stopwatch(teacher, Conditions(threads=1, dtype=dtype))
    assert stopwatch.example.dtype == DTYPES[dtype]
    assert stopwatch.prepare(teacher.model)().dtype == DTYPES[dtype]
    assert fingerprint(teacher.model) == teacher.fingerprint
    assert {p.dtype for p in teacher.model.parameters()} == {torch.float32}


# Conditions


def test_threads_are_given_back():
    before = torch.get_num_threads()
    with threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    with pytest.raises(RuntimeError, match="stop"), threads(before + 1):
        raise RuntimeError("stop")
    assert torch.get_num_threads() == before
    assert default_threads() >= 1


@pytest.mark.parametrize("device", ["gpu", "meta", "hpu", "privateuseone", "", "cpu:zero"])
def test_a_device_that_is_not_there(device):
    with pytest.raises(MixerzooError, match=f"device '{device}' is not available .*; use --device cpu"):
        check_device(device, "float32")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_no_gpu():
    with pytest.raises(MixerzooError, match="device 'cuda' is not available"):
        check_device("cuda", "float32")


def test_an_unknown_dtype():
    with pytest.raises(MixerzooError, match="dtype 'int8': known: float32, bfloat16, float16"):
        check_device("cpu", "int8")


def test_what_is_there():
    for dtype in DTYPES:
        check_device("cpu", dtype)


def test_the_environment_says_what_a_number_depends_on():
    import json

    conditions = Conditions(batch_size=4, threads=3, dtype="bfloat16")
    found = environment(conditions)
    assert json.loads(json.dumps(found)) == found
    assert {name: found[name] for name in vars(conditions)} == vars(conditions)
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["timm"]
    assert found != environment(replace(conditions, threads=2))
