"""The figures of `peers.py`: one JSON, to which every finished row is added at once, and what they say of the bars."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from sections import table

from mixerzoo import locks
from mixerzoo.files import read_json, write_json
from mixerzoo.latency import Conditions, environment
from peer_students import OURS

HALF = 0.5  # of the error that the best peer adds, at every budget
AT, POINTS = "60%", 1.0  # most points of accuracy lost at a budget
OVER = 1.03  # times the budget: measured for long, a student may be so much over it
UNSURE = 0.05  # relative error of a share that is told
MACHINE = ("device", "device_name", "threads", "dtype", "batch_size", "runtime")
Row = dict[str, Any]


@dataclass(frozen=True)
class Key:
    """What a row is of."""

    teacher: str
    budget: str
    peer: str
    seed: int


class Rows:
    """Rows by teacher, budget, peer and seed.

    Args:
        path: the JSON, or None to keep nothing.
        settings: what all rows depend on.
        threads: of the environment.

    Raises:
        UsageError: if the JSON holds rows of other settings, or of another machine.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any], *, threads: int) -> None:
        self.path = path
        here = environment(Conditions(threads=threads))
        self.content: dict[str, Any] = {
            "environment": here,
            "settings": dict(settings),
            "teachers": {},
            "bars": {},
            "rows": [],
        }
        there = self._read()
        if there is None:
            return
        old = there["settings"] | {name: there["environment"][name] for name in MACHINE}
        for name, value in {**settings, **{name: here[name] for name in MACHINE}}.items():
            if old.get(name) != value:
                raise click.UsageError(
                    f"'{path}' holds rows with {name} {old.get(name)}, not {value}; give another --json"
                )
        self.content = there

    def __iter__(self) -> Iterator[tuple[Key, Row]]:
        for row in self.content["rows"]:
            yield Key(*(row[name] for name in ("teacher", "budget", "peer", "seed"))), row

    def finished(self, key: Key) -> bool:
        """Whether a row is there: figures, or why there cannot be any."""
        return any(there == key and ("after" in row or "cannot" in row) for there, row in self)

    def of(self, teacher: str, budget: str) -> dict[str, list[Row]]:
        """Return the rows of a teacher and a budget, by peer."""
        found: dict[str, list[Row]] = {}
        for key, row in self:
            if (key.teacher, key.budget) == (teacher, budget):
                found.setdefault(key.peer, []).append(row)
        return found

    def put(self, key: Key, row: Row) -> None:
        """Add a row, in the place of one with its key, and write the file; rows of other processes are kept."""

        def change() -> None:
            rest = [old for there, old in self if there != key]
            self.content["rows"] = [*rest, {**vars(key), **row}]

        self._change(change)

    def note(self, part: str, teacher: str, content: Any) -> None:
        """Write something about a teacher: its figures (`teachers`), or the bars (`bars`)."""
        self._change(lambda: self.content[part].__setitem__(teacher, content))

    def _change(self, change: Any) -> None:
        if self.path is None:
            change()
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with locks.held(self.path.with_name(f".{self.path.name}.lock")):
            self.content = self._read() or self.content
            change()
            write_json(self.path, self.content)

    def _read(self) -> dict[str, Any] | None:
        if self.path is None or not self.path.exists():
            return None
        content: dict[str, Any] = read_json(self.path)
        return content


def show(console: Console, rows: Rows, teacher: str, budgets: Sequence[str]) -> None:
    """Print a table a budget, means over the seeds, and under it why a side has no student."""
    about = rows.content["teachers"][teacher]
    for budget in budgets:
        lines, reasons = [], []
        for peer, found in sorted(rows.of(teacher, budget).items(), key=lambda item: _order(item[1])):
            done = [row for row in found if "after" in row]
            lines += [_line(peer, done)] if done else []
            missing = sorted({_reason(row) for row in found if "after" not in row})
            reasons += [f"{peer} {reason}" for reason in missing]
        title = f"{teacher}, {about['accuracy']:.2%}, budget {budget}"
        columns = (
            "",
            "seeds",
            "share",
            "acc. before",
            "after",
            "points lost",
            "KL after",
            "agreement",
            "made, s",
        )
        table(console, title, (*columns, "note"), lines)
        for reason in reasons:
            console.print(reason, highlight=False, markup=False)


def bars(rows: Rows, teacher: str, budgets: Sequence[str]) -> list[dict[str, Any]]:
    """Return what is asked of mixerzoo, and whether it is met; points are means over the seeds."""
    found = []
    for budget in budgets:
        by_peer = rows.of(teacher, budget)
        if OURS not in by_peer:
            continue
        ours = _lost(by_peer.pop(OURS))
        others = {peer: lost for peer, there in by_peer.items() if (lost := _lost(there)) is not None}
        if others:
            best = min(others, key=lambda peer: others[peer])
            # A peer that adds no error can only be equalled.
            most = HALF * max(0.0, others[best])
            what = f"{teacher}, {budget}: points lost, beside {others[best]:.2f} of the best peer, {best}"
            found.append(_bar(what, budget, ours, most))
            # Images are few, so that points come in steps; divergences from the teacher do not.
            found[-1]["loss"] = {peer: _loss(rows.of(teacher, budget)[peer]) for peer in (OURS, best)}
        if budget == AT:
            found.append(_bar(f"{teacher}, {budget}: points lost", budget, ours, POINTS))
    return found


def tell(console: Console, found: Sequence[Mapping[str, Any]]) -> None:
    """Print the bars."""
    for bar in found:
        colour = "green" if bar["met"] else "red"
        value = "no student in the budget" if bar["value"] is None else f"{bar['value']:.2f}"
        console.print(
            f"[{colour}]{bar['what']}: mixerzoo {value} (at most {bar['bar']:.2f})[/{colour}]{_losses(bar)}",
            highlight=False,
        )


def _bar(what: str, budget: str, value: float | None, most: float) -> dict[str, Any]:
    met = value is not None and value <= most
    return {"what": what, "budget": budget, "value": value, "bar": most, "met": met}


def _lost(rows: Sequence[Row]) -> float | None:
    """Return the mean points lost after fine-tuning; None unless every row has a student within the budget."""
    if not rows or not all(row.get("met") for row in rows):
        return None
    return statistics.fmean(row["points_lost"]["after"] for row in rows)


def _loss(rows: Sequence[Row]) -> float | None:
    """Return the mean loss after fine-tuning; None unless every row has a student within the budget."""
    return statistics.fmean(row["after"]["loss"] for row in rows) if _lost(rows) is not None else None


def _losses(bar: Mapping[str, Any]) -> str:
    said = [f"{peer} {loss:.4f}" for peer, loss in bar.get("loss", {}).items() if loss is not None]
    return f"; loss: {', '.join(said)}" if said else ""


def _reason(row: Row) -> str:
    return next(f"{word}: {row[word]}" for word in ("cannot", "skipped", "failed") if word in row)


def _order(found: Sequence[Row]) -> float:
    lost = [row["points_lost"]["after"] for row in found if "after" in row]
    return statistics.fmean(lost) if lost else float("inf")


def _line(peer: str, done: Sequence[Row]) -> list[str]:
    def mean(*path: str) -> float:
        values: list[Any] = list(done)
        for name in path:
            values = [value[name] for value in values]
        return statistics.fmean(values)

    notes = [] if all(row["met"] for row in done) else ["over the budget"]
    unsure = max(row["share_error"] for row in done)
    notes += [f"share known to {unsure:.0%} only"] if unsure > UNSURE else []
    lost = [row["points_lost"]["after"] for row in done]
    spread = f" ({min(lost):.2f} to {max(lost):.2f})" if len(lost) > 1 else ""
    return [
        peer,
        str(len(done)),
        f"{mean('share'):.1%}",
        f"{mean('before', 'accuracy'):.2%}",
        f"{mean('after', 'accuracy'):.2%}",
        f"{statistics.fmean(lost):.2f}{spread}",
        f"{mean('after', 'loss'):.4f}",
        f"{mean('after', 'agreement'):.1%}",
        f"{mean('make_s'):.0f}",
        "; ".join(notes),
    ]
