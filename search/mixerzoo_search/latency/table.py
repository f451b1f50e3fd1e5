"""The rows of `mixerzoo latency`: every candidate at every shape of site, beside the teacher's own module there."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from mixerzoo.latency import REFERENCE, Conditions, InPlace, LatencyTable, Stopwatch, by_shape, environment
from mixerzoo.latency.in_place import of_shapes
from mixerzoo.latency.reuse import Known, know
from mixerzoo.latency.store import LatencyFile
from mixerzoo.plan import Candidate
from mixerzoo.progress import Reporter
from mixerzoo.registry import get_registry
from mixerzoo.spec import Site
from mixerzoo_search.candidates import Candidates
from mixerzoo_search.evaluate import FINAL

NOTHING = Candidate("none")  # what the student saves with it is what the teacher's own module takes
SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Line:
    """A candidate at a shape of site.

    Attributes:
        candidate: mixer and width.
        ms: what it takes at one site, or None where it cannot run, or is not known.
        share: the same, of what the teacher's own module takes there.
        change_ms: what it changes of the teacher's latency.
        error_ms: half the width of the 95 % confidence interval of both.
        measured: when.
        failed: why it cannot run, or empty.
    """

    candidate: str
    ms: float | None = None
    share: float | None = None
    change_ms: float | None = None
    error_ms: float | None = None
    measured: str = ""
    failed: str = ""


@dataclass(frozen=True, kw_only=True)
class Block:
    """The candidates at the sites of one shape, fastest first; `own_ms` is the teacher's own module at one of them."""

    shape: str
    sites: tuple[str, ...]
    own_ms: float | None
    lines: tuple[Line, ...]


@dataclass(frozen=True, kw_only=True)
class Shown:
    """All that is shown of a table.

    Attributes:
        model: the teacher's name.
        teacher_ms: its latency; None where nothing is known.
        blocks: one a shape of site.
        known: what was reused, measured and missing.
        candidates: site -> candidates.
        table: the same in the form that a search takes.
        file: where it is kept.
        conditions: under which it holds.
    """

    model: str
    teacher_ms: float | None
    blocks: tuple[Block, ...]
    known: Known
    candidates: Candidates
    table: LatencyTable
    file: str
    conditions: Conditions = field(default_factory=Conditions)


def show(
    stopwatch: Stopwatch,
    candidates: Candidates,
    file: LatencyFile,
    *,
    reporter: Reporter,
    measure: bool,
    again: bool,
) -> Shown:
    """Return the table of some candidates, measured where the library does not have it, unless told not to."""
    sites = stopwatch.teacher.sites
    wanted = of_shapes(sites, candidates)
    asked = {
        shape: [*row, *([NOTHING] if _stands(NOTHING, group[0]) and NOTHING not in row else [])]
        for (shape, row), group in zip(wanted.items(), by_shape(sites).values(), strict=True)
    }
    known = know(stopwatch, asked, file, reporter=reporter, measure=measure, again=again)
    kept = file.read()
    teacher_ms = stopwatch.time({}, rounds=FINAL)[REFERENCE].median if measure else file.teacher_ms
    base = teacher_ms or math.nan
    blocks = tuple(
        Block(
            shape=shape,
            sites=tuple(site.name for site in group),
            own_ms=_own_ms(known.placed.get(shape, {}), base),
            lines=_lines(
                shape,
                wanted[shape],
                known,
                base,
                {text: entry.measured for text, entry in kept.get(shape, {}).items()},
            ),
        )
        for shape, group in by_shape(sites).items()
    )
    return Shown(
        model=stopwatch.teacher.name,
        teacher_ms=teacher_ms,
        blocks=blocks,
        known=known,
        candidates=candidates,
        table=LatencyTable.of(sites, known.placed, base_ms=base),
        file=str(file.path),
        conditions=stopwatch.conditions,
    )


def _stands(candidate: Candidate, site: Site) -> bool:
    mixers = get_registry().mixers
    return candidate.mixer in mixers and site.kind in mixers.get(candidate.mixer).kinds


def _own_ms(placed: Mapping[str, InPlace], base: float) -> float | None:
    nothing = placed.get(str(NOTHING))
    return None if nothing is None else -base * nothing.change


def _lines(
    shape: str, row: Sequence[Candidate], known: Known, base: float, measured: Mapping[str, str]
) -> tuple[Line, ...]:
    own = _own_ms(known.placed.get(shape, {}), base)
    lines = []
    for candidate in row:
        text = str(candidate)
        placed = known.placed.get(shape, {}).get(text)
        if placed is None:
            lines.append(Line(candidate=text, failed=known.failed.get(shape, {}).get(text, "")))
            continue
        change = base * placed.change
        ms = None if own is None else own + change
        lines.append(
            Line(
                candidate=text,
                ms=ms,
                share=None if ms is None or not own else ms / own,
                change_ms=change,
                error_ms=base * placed.change_error if math.isfinite(placed.error) else None,
                measured=measured.get(text, ""),
            )
        )
    return tuple(sorted(lines, key=lambda line: (line.change_ms is None, line.change_ms or 0.0)))


def to_json(shown: Shown) -> dict[str, Any]:
    """Return JSON-ready data."""
    return {
        "schema": SCHEMA,
        "model": shown.model,
        "teacher_ms": shown.teacher_ms,
        "file": shown.file,
        "reused": shown.known.reused,
        "measured": shown.known.measured,
        "missing": shown.known.missing,
        "drift": shown.known.drift,
        "shapes": [
            {
                "shape": block.shape,
                "sites": list(block.sites),
                "own_ms": block.own_ms,
                "candidates": [asdict(line) for line in block.lines],
            }
            for block in shown.blocks
        ],
        "environment": environment(shown.conditions),
    }


def text_rows(block: Block) -> list[Sequence[str]]:
    """Return the candidates that were measured as rows of text, the header first."""
    rows: list[Sequence[str]] = [("candidate", "ms", "of own", "change ms", "±", "measured")]
    for line in block.lines:
        if line.change_ms is None:
            continue
        rows.append(
            (
                line.candidate,
                "" if line.ms is None else f"{line.ms:.3f}",
                "" if line.share is None else f"{line.share:.0%}",
                f"{line.change_ms:+.3f}",
                "" if line.error_ms is None else f"{line.error_ms:.3f}",
                line.measured[:16].replace("T", " "),
            )
        )
    return rows


def unmeasured(block: Block) -> list[str]:
    """Return a line for each reason why candidates have no figures."""
    whose: dict[str, list[str]] = {}
    for line in block.lines:
        if line.change_ms is None:
            whose.setdefault(line.failed or "not measured yet", []).append(line.candidate)
    return [f"{', '.join(names)}: {reason}" for reason, names in whose.items()]
