"""Interleaved rounds: every subject beside the reference, until each ratio is known well enough.

A drift of the machine hits both alike and cancels in their ratio. What hits one of them only is left out, and where too
little is left the error says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from mixerzoo.runtimes import Run

REFERENCE = "teacher"
WARMUP = 3
# A timing is a loop of at least this long, so that the clock and the scheduler matter less.
MIN_SAMPLE_MS = 8.0
QUIET = 1.5  # times what a subject can do (its lowest tenth): samples above it are disturbed
ENOUGH = 0.25  # share of the rounds that must be quiet for both sides
DISTURBED = 0.1  # least relative error where they were not
BETWEEN = 3  # subjects between two timings of the reference
# How long a subject runs untimed before each of its timings: what ran before it has taken its caches, and the first few
# calls are slower than those that follow.
SETTLE_MS = 20.0
# The range of so few normal samples, times this, is a 95 % interval of their mean (Dean and Dixon 1951).
FEW = {2: 12.7, 3: 2.61, 4: 1.43, 5: 1.02}
PAUSE_S = 0.25  # between two spells
HALVES = 8  # ratios from which on the two halves of a measurement must agree, too


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """How long to measure: `least` rounds, and more, up to `most`, for every subject that is not known well enough.

    Attributes:
        least: rounds for every subject.
        most: rounds at most.
        precision: relative error of a ratio that is good enough.
        quiet: rounds, among them, in which neither side was disturbed.
        slow: times the reference; for what is certainly slower than this, no precision is asked.
        spells: how often all that is done again, up to five times. What a shared machine does to one side more than to
            the other may last for seconds: rounds of one spell agree with each other, and not with those of the next.
        settle_ms: how long a subject runs untimed before each timing, at least one call; 0 for not at all, which is
            faster, and right where what comes of it is corrected by longer measurements.
    """

    least: int = 9
    most: int = 45
    precision: float = 0.02
    quiet: int = 0
    slow: float = float("inf")
    spells: int = 1
    settle_ms: float = SETTLE_MS


AS_A_RULE = Rounds()


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Latency of one subject.

    Attributes:
        median: in ms.
        low: lower quartile in ms.
        high: upper quartile in ms.
        ratio: median ratio to the reference beside it.
        error: half the width of the ratio's 95 % confidence interval, relative to it; infinite for a single sample.
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
    rounds: Rounds = AS_A_RULE,
    clock: Callable[[], float] = time.perf_counter,
    on_round: Callable[[int], None] = lambda done: None,
) -> dict[str, Timing]:
    """Time `subjects`, among them one called `teacher`, in interleaved rounds.

    What is timed is a model in use: called again and again, its caches warm. In each round the order is shuffled and
    the reference is timed again after every few subjects; a subject's ratio is its time over the mean of the reference
    before and after it. Its median is that ratio times the reference's median, so that a slow drift of the machine hits
    both alike. A short spell that hits only one of them would spoil the ratio: where either took far longer than it
    can, the round does not count. A machine that is not quiet is measured for more rounds; what is still not known then
    is said by `Timing.error`.
    """
    found = []
    for spell in range(rounds.spells):
        if spell:
            time.sleep(PAUSE_S)
        found.append(_spell(subjects, rounds, clock, partial(_later, on_round, spell * rounds.least)))
    return (
        found[0] if rounds.spells == 1 else {name: _pooled([one[name] for one in found]) for name in subjects}
    )


def _later(on_round: Callable[[int], None], before: int, done: int) -> None:
    on_round(before + done)


def _pooled(spells: Sequence[Timing]) -> Timing:
    """Return the median of some spells; the error is that of their mean, going by how far they are apart."""
    ratios = [timing.ratio for timing in spells]
    ratio = float(np.median(ratios))
    apart = (max(ratios) - min(ratios)) * FEW[len(ratios)] / 2 / ratio
    return Timing(
        median=float(np.median([timing.median for timing in spells])),
        low=float(np.median([timing.low for timing in spells])),
        high=float(np.median([timing.high for timing in spells])),
        ratio=ratio,
        error=max(apart, min(timing.error for timing in spells)),
    )


def _spell(
    subjects: Mapping[str, Run],
    rounds: Rounds,
    clock: Callable[[], float],
    on_round: Callable[[int], None],
) -> dict[str, Timing]:
    settled = partial(_sample, settle_s=rounds.settle_ms / 1e3, clock=clock)
    sample = {name: partial(settled, run, _loops(run, clock)) for name, run in subjects.items()}
    others = [name for name in subjects if name != REFERENCE]
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in others}  # (reference, subject)
    reference: list[float] = []
    order = np.random.default_rng(0)
    waiting = others
    for done in range(rounds.most):
        before = sample[REFERENCE]()
        reference.append(before)
        shuffled = [waiting[i] for i in order.permutation(len(waiting))]
        for start in range(0, len(shuffled), BETWEEN):
            part = shuffled[start : start + BETWEEN]
            times = [sample[name]() for name in part]
            after = sample[REFERENCE]()
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
    quiet = _quiet(reference)
    low, base, high = (float(q) for q in np.quantile(quiet, [0.25, 0.5, 0.75]))
    timings = {name: _timing(_estimate(samples[name], reference), base) for name in others}
    timings[REFERENCE] = Timing(median=base, low=low, high=high, ratio=1.0, error=0.0)
    return timings


@dataclass(frozen=True)
class _Estimate:
    ratios: list[float]
    error: float
    paired: int  # rounds that were quiet for both sides, where the ratios are of such

    @property
    def ratio(self) -> float:
        return float(np.median(self.ratios))


def _estimate(samples: Sequence[tuple[float, float]], reference: Sequence[float]) -> _Estimate:
    """Estimate a ratio from the rounds in which neither side was disturbed.

    On a machine so busy that there are hardly any, each side's quiet samples are compared with the other's; they may be
    of different times, and so a drift of the machine does not cancel.
    """
    subject = [ms for _, ms in samples]
    most_reference, most_subject = _limit(reference), _limit(subject)
    paired = [ms / beside for beside, ms in samples if beside <= most_reference and ms <= most_subject]
    if len(paired) >= max(3, ENOUGH * len(samples)):
        return _Estimate(paired, _error(paired), len(paired))
    quiet = _quiet(reference)
    base = float(np.median(quiet))
    unpaired = [ms / base for ms in _quiet(subject)]
    error = float(np.hypot(_error(quiet), _error(unpaired)))
    return _Estimate(unpaired, max(DISTURBED, error), 0)


def _limit(samples: Sequence[float]) -> float:
    return float(QUIET * np.quantile(samples, 0.1))


def _quiet(samples: Sequence[float]) -> list[float]:
    most = _limit(samples)
    return [ms for ms in samples if ms <= most]


def _error(ratios: Sequence[float]) -> float:
    """Return half the width of the median's 95 % confidence interval, by order statistics, relative to the median.

    Under five samples have no such interval, and one too narrow would pass for knowledge: their range is widened.
    Samples that follow each other are not independent where the machine changes meanwhile: the halves must agree.
    """
    ranked, count = sorted(ratios), len(ratios)
    middle = float(np.median(ranked))
    if count < 2:
        return float("inf")
    first = max(0, int(count / 2 - 0.98 * count**0.5))
    width = (ranked[count - 1 - first] - ranked[first]) * FEW.get(count, 1.0)
    if count >= HALVES:
        earlier, later = ratios[: count // 2], ratios[count // 2 :]
        width = max(width, abs(float(np.median(earlier)) - float(np.median(later))))
    return width / 2 / middle


def _settled(estimate: _Estimate, rounds: Rounds) -> bool:
    certainly_slow = estimate.ratio * (1 - estimate.error) > rounds.slow
    known = estimate.error <= rounds.precision and estimate.paired >= rounds.quiet
    return known or certainly_slow


def _timing(estimate: _Estimate, base: float) -> Timing:
    low, middle, high = (float(q) for q in np.quantile(estimate.ratios, [0.25, 0.5, 0.75]))
    return Timing(median=base * middle, low=base * low, high=base * high, ratio=middle, error=estimate.error)


def _loops(run: Run, clock: Callable[[], float]) -> int:
    for _ in range(WARMUP - 1):
        run()
    began = clock()
    run()
    return max(1, round(MIN_SAMPLE_MS / max((clock() - began) * 1e3, 1e-3)))


def _sample(run: Run, loops: int, *, settle_s: float, clock: Callable[[], float]) -> float:
    settled = clock() + settle_s
    while clock() < settled:
        run()
    began = clock()
    for _ in range(loops):
        run()
    return (clock() - began) * 1e3 / loops
