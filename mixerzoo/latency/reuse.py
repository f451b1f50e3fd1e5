"""The latency of every candidate: what a library has kept of it, checked, and the rest measured."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mixerzoo.errors import MixerzooError
from mixerzoo.hosts import assemble
from mixerzoo.latency.conditions import threads
from mixerzoo.latency.in_place import TABLE, InPlace, by_shape, measure_in_place, place_many
from mixerzoo.latency.rounds import Rounds
from mixerzoo.latency.stopwatch import Stopwatch
from mixerzoo.latency.store import Entries, LatencyFile
from mixerzoo.plan import Candidate
from mixerzoo.progress import Report, Reporter, beginning_at
from mixerzoo.registry import get_registry
from mixerzoo.spec import RuntimeSpec

PREPARED = 8  # candidates that are timed, and so are there at once, prepared to run
CHECKED = 3  # kept candidates that are timed again to see whether the others still hold
CHECK = Rounds(least=7, most=27, precision=0.015, settle_ms=TABLE.settle_ms)
POOR = 0.05  # relative error from which on a kept one is measured again: the machine was too busy then
ROOM = 0.01  # of the teacher's latency, beyond both errors: what a restart of a process can change

Row = Sequence[Candidate]
Measured = dict[
    str, dict[str, InPlace | str]
]  # shape -> candidate -> measured, or the reason why it cannot run


@dataclass(kw_only=True)
class Known:
    """The latencies of some candidates at the shapes of a teacher's sites.

    Attributes:
        placed: shape -> candidate -> what was measured.
        failed: shape -> candidate -> why it cannot run.
        reused: how many (shape, candidate) the library had.
        measured: how many were measured.
        missing: how many are not known, as nothing was to be measured.
        drift: the first kept candidate that no longer held, in words, or empty.
    """

    placed: dict[str, dict[str, InPlace]] = field(default_factory=dict)
    failed: dict[str, dict[str, str]] = field(default_factory=dict)
    reused: int = 0
    measured: int = 0
    missing: int = 0
    drift: str = ""

    def add(self, shape: str, text: str, value: InPlace | str) -> None:
        """Add a candidate."""
        if isinstance(value, InPlace):
            self.placed.setdefault(shape, {})[text] = value
        else:
            self.failed.setdefault(shape, {})[text] = value


def know(
    stopwatch: Stopwatch,
    candidates: Mapping[str, Row],
    file: LatencyFile,
    *,
    reporter: Reporter,
    measure: bool = True,
    again: bool = False,
) -> Known:
    """Return the latencies of candidates: those in the library, if they still hold, and the others measured.

    A few kept ones are timed again first. Where one is off by more than both errors, the machine is no longer what it
    was, and all of them are forgotten. What was measured is kept at once, part by part.

    Args:
        stopwatch: the teacher and the conditions.
        candidates: shape -> candidates, without `keep`.
        file: what is kept.
        reporter: shows progress.
        measure: otherwise nothing is, and what is kept is believed.
        again: measure everything anew.
    """
    known, barred = Known(), barred_at(stopwatch.runtime, candidates)
    for shape, reasons in barred.items():
        for text, reason in reasons.items():
            known.add(shape, text, reason)
    wanted = {shape: [c for c in row if str(c) not in barred[shape]] for shape, row in candidates.items()}
    if not measure:
        known.missing = _count(_take(known, wanted, file.read(), precise=False))
        return known
    entries: Entries = {}
    with file.claim():
        if again:
            file.forget()
        entries = file.read()
        known.drift = _drift(stopwatch, wanted, file, entries, reporter)
        if known.drift:
            file.forget()
            entries = {}
    if file.damaged:
        reporter.note(f"latency table '{file.path}' is damaged; it is measured anew")
    if known.drift:
        reporter.note(f"latency table: {known.drift}; it is measured anew")
    missing = _take(known, wanted, entries)
    parts = _parts(missing)
    if parts:
        with reporter.phase("latency of every candidate", TABLE.least * len(parts)) as report:
            for number, part in enumerate(parts):
                with file.claim():
                    # Another process may have measured some of them while this one waited.
                    rest = _take(known, part, file.read())
                    if not _count(rest):
                        continue
                    base, found = _measured(stopwatch, rest, beginning_at(TABLE.least * number, report))
                    file.write(found, teacher_ms=base)
                known.measured += _count(rest)
                for shape, row in found.items():
                    for text, value in row.items():
                        known.add(shape, text, value)
    return known


def barred_at(runtime: RuntimeSpec, candidates: Mapping[str, Row]) -> dict[str, dict[str, str]]:
    """Return, under each key, the candidates that do not claim what a runtime needs, with that reason.

    They are known without trying: each try can take minutes.
    """
    reason = f"it does not claim 'exportable', and runtime '{runtime.name}' needs that"
    shelf = get_registry().mixers
    return {
        key: {str(c): reason for c in row if runtime.needs_export and not shelf.get(c.mixer).caps.exportable}
        for key, row in candidates.items()
    }


def _take(
    known: Known, wanted: Mapping[str, Row], entries: Entries, *, precise: bool = True
) -> dict[str, list[Candidate]]:
    """Add what is kept of the wanted candidates, and known well enough if it shall be; return the others."""
    missing: dict[str, list[Candidate]] = {}
    for shape, row in wanted.items():
        missing[shape] = []
        for candidate in row:
            kept = entries.get(shape, {}).get(str(candidate))
            if kept is None or (precise and _is_poor(kept.placed)):
                missing[shape].append(candidate)
                continue
            known.reused += 1
            known.add(shape, str(candidate), kept.failed if kept.placed is None else kept.placed)
    return missing


def _drift(
    stopwatch: Stopwatch,
    wanted: Mapping[str, Row],
    file: LatencyFile,
    entries: Entries,
    reporter: Reporter,
) -> str:
    """Time a few kept candidates again, those that were not for longest; say which is off, if any is."""
    chosen = _to_check(wanted, entries)
    if not chosen:
        return ""
    part: dict[str, list[Candidate]] = {}
    for shape, candidate in chosen:
        part.setdefault(shape, []).append(candidate)
    with reporter.phase("does the latency table still hold", CHECK.least) as report:
        try:
            _, now = measure_in_place(stopwatch, part, rounds=CHECK, on_round=report)
        except Exception as error:
            return f"{chosen[0][1]} or one like it no longer runs ({_one_line(error)})"
    for shape, candidate in chosen:
        before, after = entries[shape][str(candidate)].placed, now[shape][str(candidate)]
        assert before is not None
        room = before.ratio * before.error + after.ratio * after.error + ROOM
        # At another number of sites the same change is another ratio.
        expected = 1 + before.change * after.sites
        if not abs(after.ratio - expected) <= room:
            return (
                f"with {candidate} at its sites the student took {expected:.1%} of the teacher's latency, "
                f"and takes {after.ratio:.1%} now"
            )
    file.confirm((shape, str(candidate)) for shape, candidate in chosen)
    return ""


def _to_check(wanted: Mapping[str, Row], entries: Entries) -> list[tuple[str, Candidate]]:
    """Return the kept candidates that were not checked for longest; of the same time, any."""

    def turn(pair: tuple[str, Candidate]) -> tuple[str, str]:
        shape, candidate = pair
        return entries[shape][str(candidate)].checked, hashlib.sha256(
            f"{shape} {candidate}".encode()
        ).hexdigest()

    there = [
        (shape, candidate)
        for shape, row in wanted.items()
        for candidate in row
        if (kept := entries.get(shape, {}).get(str(candidate))) is not None and kept.placed is not None
    ]
    return sorted(there, key=turn)[:CHECKED]


def _is_poor(placed: InPlace | None) -> bool:
    """Say whether a measurement is too coarse to be kept; of what is certainly slow, nothing more need be known."""
    if placed is None or placed.error <= POOR:
        return False
    return not placed.ratio * (1 - placed.error) > TABLE.slow


def _count(candidates: Mapping[str, Row]) -> int:
    return sum(len(row) for row in candidates.values())


def _parts(candidates: Mapping[str, Row]) -> list[dict[str, list[Candidate]]]:
    """Divide candidates into parts of a few, each at all of its shapes."""
    every = list(dict.fromkeys(c for row in candidates.values() for c in row))
    parts = [every[first : first + PREPARED] for first in range(0, len(every), PREPARED)]
    return [{shape: [c for c in row if c in part] for shape, row in candidates.items()} for part in parts]


def _measured(
    stopwatch: Stopwatch, candidates: Mapping[str, Row], on_round: Report
) -> tuple[float, Measured]:
    """Time candidates, and the teacher; one that cannot run has its reason instead, and costs no other."""
    try:
        base, placed = measure_in_place(stopwatch, candidates, on_round=on_round)
        return base, {shape: dict(row) for shape, row in placed.items()}
    except Exception as raised:  # a plugin's mixer may raise anything: find out whose it was
        error = raised.with_traceback(None)  # which would keep alive what was prepared
    failed = _failures(stopwatch, candidates)
    rest = {shape: [c for c in row if str(c) not in failed[shape]] for shape, row in candidates.items()}
    if any(failed.values()):
        base, found = _measured(stopwatch, rest, on_round)
    else:  # one by one they run: together they take too much memory
        first, second = _halves(rest)
        if not _count(first):
            raise error
        base, found = _measured(stopwatch, first, on_round)
        for shape, row in _measured(stopwatch, second, on_round)[1].items():
            found[shape].update(row)
    for shape, reasons in failed.items():
        found[shape].update(reasons)
    return base, found


def _halves(candidates: Mapping[str, Row]) -> tuple[dict[str, list[Candidate]], dict[str, list[Candidate]]]:
    """Divide candidates into two parts; the first is empty where there is but one."""
    every = [(shape, candidate) for shape, row in candidates.items() for candidate in row]
    middle = len(every) // 2
    first, second = (
        {shape: [c for at, c in part if at == shape] for shape in candidates}
        for part in (every[:middle], every[middle:])
    )
    return first, second


def _failures(stopwatch: Stopwatch, candidates: Mapping[str, Row]) -> dict[str, dict[str, str]]:
    """Return, for each shape, the candidates that cannot run there and the reasons."""
    groups = by_shape(stopwatch.teacher.sites)
    failed: dict[str, dict[str, str]] = {shape: {} for shape in candidates}
    for shape, row in candidates.items():
        for candidate in row:
            try:
                with threads(stopwatch.conditions.threads):
                    student = assemble(stopwatch.teacher.model, place_many(candidate, groups[shape]))
                    stopwatch.prepare(student)()
            except Exception as error:
                failed[shape][str(candidate)] = _one_line(error)
    return failed


def _one_line(error: Exception) -> str:
    kind = "" if isinstance(error, MixerzooError) else f"{type(error).__name__}: "
    return " ".join(f"{kind}{error}".split())
