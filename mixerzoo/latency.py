"""Measured latency, in milliseconds: medians of interleaved rounds, drift cancelled through the teacher's ratio.

Every number here is the median at a stated batch size, thread count, dtype, device and runtime. FLOPs are never
taken for speed.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mixerzoo.errors import MixerzooError
from mixerzoo.hosts import Replacement, Teacher, assemble
from mixerzoo.plan import Candidate
from mixerzoo.registry import get_registry
from mixerzoo.runtimes import Run
from mixerzoo.spec import RuntimeSpec, Site

REFERENCE = "teacher"
WARMUP = 3
MIN_SAMPLE_MS = (
    8.0  # a timing is a loop of at least this long, so that the clock and the scheduler matter less
)
QUIET = 1.5  # times what a subject can do (its lowest tenth): samples above it are disturbed
ENOUGH = 0.25  # share of the rounds that must be quiet for both sides
DISTURBED = 0.1  # least relative error where they were not
BETWEEN = 3  # subjects between two timings of the reference
PLACED_PARAMS = 100_000_000  # a candidate stands at as many sites at once as stay below this


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """Under what a latency holds."""

    batch_size: int = 1
    threads: int = 2
    dtype: str = "float32"
    device: str = "cpu"
    runtime: str = "eager"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch has it."""
        return DTYPES[self.dtype]


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """How long to measure: `least` rounds, and more, up to `most`, for every subject that is not known well enough.

    Attributes:
        least: rounds for every subject.
        most: rounds at most.
        precision: relative error of a ratio that is good enough.
        slow: times the reference; for what is certainly slower than this, no precision is asked.
    """

    least: int = 9
    most: int = 45
    precision: float = 0.02
    slow: float = float("inf")


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Latency of one subject.

    Attributes:
        median: in ms.
        low: lower quartile in ms.
        high: upper quartile in ms.
        ratio: median ratio to the reference beside it.
        error: half the width of the ratio's 95 % confidence interval, relative to it.
    """

    median: float
    low: float
    high: float
    ratio: float
    error: float

    @property
    def most(self) -> float:
        """The ratio's upper bound: with 97.5 % confidence it is not above."""
        return self.ratio * (1 + self.error)


def measure(
    subjects: Mapping[str, Run],
    *,
    rounds: Rounds = Rounds(),
    clock: Callable[[], float] = time.perf_counter,
    on_round: Callable[[int], None] = lambda done: None,
) -> dict[str, Timing]:
    """Time `subjects`, among them one called `teacher`, in interleaved rounds.

    In each round the order is shuffled and the reference is timed again after every few subjects; a subject's
    ratio is its time over the mean of the reference before and after it. Its median is that ratio times the
    reference's median, so that a slow drift of the machine hits both alike. A short spell that hits only one of
    them would spoil the ratio: where either took far longer than it can, the round does not count. A machine that
    is not quiet is measured for more rounds; what is still not known then is said by `Timing.error`.
    """
    loops = {name: _loops(run, clock) for name, run in subjects.items()}
    others = [name for name in subjects if name != REFERENCE]
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in others}  # (reference, subject)
    reference: list[float] = []
    order = np.random.default_rng(0)
    waiting = others
    for done in range(rounds.most):
        before = _sample(subjects[REFERENCE], loops[REFERENCE], clock)
        reference.append(before)
        shuffled = [waiting[i] for i in order.permutation(len(waiting))]
        for start in range(0, len(shuffled), BETWEEN):
            part = shuffled[start : start + BETWEEN]
            times = [_sample(subjects[name], loops[name], clock) for name in part]
            after = _sample(subjects[REFERENCE], loops[REFERENCE], clock)
            reference.append(after)
            for name, ms in zip(part, times, strict=True):
                samples[name].append(((before + after) / 2, ms))
            before = after
        on_round(min(done + 1, rounds.least))
        if done + 1 >= rounds.least:
            estimates = {name: _estimate(samples[name], reference) for name in waiting}
            waiting = [name for name in waiting if not _settled(estimates[name], rounds)]
            if not waiting:
                break
    base = float(np.median(reference))
    timings = {name: _timing(_estimate(samples[name], reference), base) for name in others}
    low, high = np.quantile(reference, [0.25, 0.75])
    timings[REFERENCE] = Timing(median=base, low=float(low), high=float(high), ratio=1.0, error=0.0)
    return timings


@dataclass(frozen=True)
class _Estimate:
    ratios: list[float]
    error: float

    @property
    def ratio(self) -> float:
        return float(np.median(self.ratios))


def _estimate(samples: Sequence[tuple[float, float]], reference: Sequence[float]) -> _Estimate:
    """Estimate a ratio from the rounds in which neither side was disturbed.

    On a machine so busy that there are hardly any, each side's quiet samples are compared with the other's.
    """
    subject = [ms for _, ms in samples]
    most_reference, most_subject = (QUIET * np.quantile(side, 0.1) for side in (reference, subject))
    paired = [ms / beside for beside, ms in samples if beside <= most_reference and ms <= most_subject]
    if len(paired) >= max(3, ENOUGH * len(samples)):
        return _Estimate(paired, _error(paired))
    base = float(np.median([ms for ms in reference if ms <= most_reference]))
    unpaired = [ms / base for ms in subject if ms <= most_subject]
    return _Estimate(unpaired, max(DISTURBED, _error(unpaired)))


def _error(ratios: Sequence[float]) -> float:
    """Return half the width of the median's 95 % confidence interval, by order statistics, relative to the median."""
    ranked, count = sorted(ratios), len(ratios)
    first = max(0, int(count / 2 - 0.98 * count**0.5))
    return (ranked[count - 1 - first] - ranked[first]) / 2 / float(np.median(ranked))


def _settled(estimate: _Estimate, rounds: Rounds) -> bool:
    certainly_slow = estimate.ratio * (1 - estimate.error) > rounds.slow
    return estimate.error <= rounds.precision or certainly_slow


def _timing(estimate: _Estimate, base: float) -> Timing:
    low, middle, high = (float(q) for q in np.quantile(estimate.ratios, [0.25, 0.5, 0.75]))
    return Timing(median=base * middle, low=base * low, high=base * high, ratio=middle, error=estimate.error)


class Stopwatch:
    """Times students of one teacher under fixed conditions."""

    def __init__(self, teacher: Teacher, conditions: Conditions) -> None:
        self.teacher = teacher
        self.conditions = conditions
        self.runtime: RuntimeSpec = get_registry().runtimes.get(conditions.runtime)
        generator = torch.Generator().manual_seed(0)
        self.example = torch.randn(conditions.batch_size, *teacher.image.size, generator=generator).to(
            conditions.device, conditions.torch_dtype
        )
        with threads(conditions.threads):  # some runtimes settle it when they prepare
            self._reference = self.prepare(teacher.model)

    def prepare(self, model: nn.Module) -> Run:
        """Return what runs `model` once on the example."""
        if self.conditions.dtype != "float32" or self.conditions.device != "cpu":
            model = assemble(model, {})
            model = _detached(model).to(self.conditions.device, self.conditions.torch_dtype)
        return self.runtime.prepare(model, self.example)

    def time(
        self,
        students: Mapping[str, nn.Module],
        *,
        rounds: Rounds = Rounds(),
        on_round: Callable[[int], None] = lambda done: None,
    ) -> dict[str, Timing]:
        """Time students beside the teacher; the result has `teacher` in it."""
        with threads(self.conditions.threads):
            runs = {REFERENCE: self._reference}
            runs |= {name: self.prepare(model) for name, model in students.items()}
            return measure(runs, rounds=rounds, on_round=on_round)


@dataclass(frozen=True, kw_only=True)
class LatencyTable:
    """What each candidate does to the teacher's latency, in ms: negative is faster.

    Attributes:
        base_ms: the teacher.
        change_ms: site -> candidate -> change; sites of the same shape share their measurements.
    """

    base_ms: float
    change_ms: dict[str, dict[str, float]]

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        return {"base_ms": self.base_ms, "change_ms": self.change_ms}


# A slower candidate than the teacher's own module is of no use, however much slower: seen by a site's share.
TABLE = Rounds(least=7, most=27, precision=0.015, slow=1.02)


def measure_table(
    stopwatch: Stopwatch,
    candidates: Mapping[str, Sequence[Candidate]],
    *,
    rounds: Rounds = TABLE,
    on_round: Callable[[int], None] = lambda done: None,
) -> LatencyTable:
    """Time every candidate in place.

    A candidate stands at all sites of one shape at once, with fresh weights at each; the change of the whole
    model's latency, over the number of sites, is its change at one. Latency depends on shapes, not on weights.

    Args:
        stopwatch: the teacher and the conditions.
        candidates: site -> candidates, without `keep`.
        rounds: how long to measure.
        on_round: called with the number of rounds done, `rounds.least` in all.
    """
    teacher = stopwatch.teacher
    students: dict[str, nn.Module] = {}
    placed: dict[str, int] = {}
    groups = by_shape(teacher.sites)
    for shape, sites in groups.items():
        for candidate in candidates.get(sites[0].name, ()):
            modules = place_many(candidate, sites)
            students[f"{shape} {candidate}"] = assemble(teacher.model, modules)
            placed[f"{shape} {candidate}"] = len(modules)
    timings = stopwatch.time(students, rounds=rounds, on_round=on_round)
    base = timings[REFERENCE].median
    change = {
        site.name: {
            str(c): base * (timings[f"{shape} {c}"].ratio - 1) / placed[f"{shape} {c}"]
            for c in candidates.get(site.name, ())
        }
        for shape, sites in groups.items()
        for site in sites
    }
    return LatencyTable(base_ms=base, change_ms=change)


def environment(conditions: Conditions) -> dict[str, Any]:
    """Return what a measurement depends on: machine, threads, dtype, runtime, versions."""
    packages: tuple[str, ...] = ("mixerzoo", "torch", "timm", "optuna", "mlflow", "scipy", "numpy")
    packages += get_registry().runtimes.get(conditions.runtime).packages
    return {
        "device": conditions.device,
        "device_name": _device_name(conditions.device),
        "threads": conditions.threads,
        "dtype": conditions.dtype,
        "batch_size": conditions.batch_size,
        "runtime": conditions.runtime,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {name: _version(name) for name in packages},
    }


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Use `count` threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_device(device: str, dtype: str) -> None:
    """Raise MixerzooError for a device or dtype that is not to be had here."""
    if dtype not in DTYPES:
        raise MixerzooError(f"dtype '{dtype}': known: {', '.join(DTYPES)}")
    try:
        torch.zeros(1, device=device).item()  # on the meta device there is nothing to be read
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0][:120]
        raise MixerzooError(f"device '{device}' is not available ({reason}); use --device cpu") from None


def place_many(candidate: Candidate, sites: Sequence[Site]) -> dict[str, nn.Module]:
    """Return a fresh replacement for each site, or for the first few where the candidate is large."""
    spec = get_registry().mixers.get(candidate.mixer)
    modules: dict[str, nn.Module] = {}
    total = 0
    for site in sites:
        mixer = spec.make(site, candidate.width).eval().requires_grad_(False)
        modules[site.name] = Replacement(mixer, site, masks=spec.caps.masks)
        total += sum(p.numel() for p in mixer.parameters())
        if total > PLACED_PARAMS:
            break
    return modules


def _detached(model: nn.Module) -> nn.Module:
    """Give a model that shares tensors with the teacher its own, so that `.to` leaves the teacher alone."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.clone()
    return model


def by_shape(sites: Sequence[Site]) -> dict[str, list[Site]]:
    """Return groups of sites that a candidate cannot tell apart."""
    groups: dict[str, list[Site]] = {}
    for site in sites:
        groups.setdefault(_shape(site), []).append(site)
    return groups


def _shape(site: Site) -> str:
    parts = (site.dim, site.heads, site.tokens, site.prefix, site.grid, site.hidden, site.activation)
    return f"{site.kind} {parts}"


def _loops(run: Run, clock: Callable[[], float]) -> int:
    for _ in range(WARMUP - 1):
        run()
    began = clock()
    run()
    return max(1, round(MIN_SAMPLE_MS / max((clock() - began) * 1e3, 1e-3)))


def _sample(run: Run, loops: int, clock: Callable[[], float]) -> float:
    began = clock()
    for _ in range(loops):
        run()
    return (clock() - began) * 1e3 / loops


def _device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def default_threads() -> int:
    """Return the number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
