"""Students side by side: their figures, and which of them were measured under other conditions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mixerzoo.errors import MixerzooError
from mixerzoo.figures import CONDITIONS, Figures, read_figures, size_of
from mixerzoo.hosts import count_params
from mixerzoo.student import load_student
from mixerzoo.student_source import find_student

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Row:
    """One student.

    Attributes:
        name: shortest end of its path that no other has.
        path: as it was given.
        teacher: name of its teacher.
        plan: site -> candidate.
        bytes: of its weights on disk.
        figures: what was measured.
    """

    name: str
    path: Path
    teacher: str
    plan: Mapping[str, str]
    bytes: int
    figures: Figures

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready data; sizes in MiB."""
        return {
            "name": self.name,
            "path": str(self.path),
            "teacher": self.teacher,
            "replaced": sum(candidate != "keep" for candidate in self.plan.values()),
            "sites": len(self.plan),
            "mib": round(self.bytes / 2**20, 3),
            "share": self.figures.share,
            **self.figures.to_json(),
            "plan": dict(self.plan),
        }


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All students, and in `notes` what keeps which of their figures from being compared."""

    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        return {"schema": SCHEMA, "students": [row.to_json() for row in self.rows], "notes": list(self.notes)}


def compare(paths: Sequence[Path]) -> Comparison:
    """Read the figures of students; nothing is measured.

    Raises:
        MixerzooError: for what is no run and no student.
    """
    if not paths:
        raise MixerzooError("name at least one run or student")
    names = short_names(paths)
    rows = tuple(_row(path, name) for path, name in zip(paths, names, strict=True))
    return Comparison(rows=rows, notes=tuple(notes(rows)))


def short_names(paths: Sequence[Path]) -> list[str]:
    """Return the shortest end of each path that tells it from all others."""
    parts = [path.resolve().parts for path in paths]
    longest = max(map(len, parts))
    for length in range(1, longest + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _row(path: Path, name: str) -> Row:
    source = find_student(path)
    figures = read_figures(source)
    if figures.params is None:
        with suppress(MixerzooError):  # a plugin is missing, say; all the rest can be told
            figures = replace(figures, params=count_params(load_student(source.path).model))
    return Row(
        name=name,
        path=path,
        teacher=source.teacher,
        plan=source.plan,
        bytes=size_of(source),
        figures=figures,
    )


def notes(rows: Sequence[Row]) -> list[str]:
    """Return one sentence for everything that was measured differently, or not at all."""
    judged = [row for row in rows if row.figures.judged]
    timed = [row for row in rows if row.figures.latency_ms is not None]
    lines = []
    for what, among, key in (
        ("accuracy and agreement do not compare: data", judged, _data),
        ("accuracy and agreement do not compare: images", judged, lambda row: row.figures.part),
        ("agreement does not compare: teacher", judged, _teacher),
        *(
            (f"latencies do not compare: {name.replace('_', ' ')}", timed, _condition(name))
            for name in CONDITIONS
        ),
    ):
        groups = _groups(among, key)
        if len(groups) > 1:
            told = ", ".join(f"{value} ({', '.join(names)})" for value, names in groups.items())
            lines.append(f"{what} {told}")
    for what, missing in (
        ("accuracy and agreement were not measured", [row for row in rows if not row.figures.judged]),
        ("latency was not measured", [row for row in rows if row.figures.latency_ms is None]),
    ):
        if missing:
            lines.append(f"{what}: {', '.join(row.name for row in missing)}")
    return lines


def _groups(rows: Sequence[Row], key: Callable[[Row], str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row.name)
    return groups


def _data(row: Row) -> str:
    """Return the data: their name, and the beginning of their hash, which alone tells them apart."""
    name = Path(row.figures.data or "unknown").name
    mark = row.figures.data_fingerprint
    return name if mark is None else f"{name} {mark[:6]}"


def _teacher(row: Row) -> str:
    mark = row.figures.teacher_fingerprint
    return row.teacher if mark is None else f"{row.teacher} {mark[:6]}"


def _condition(name: str) -> Callable[[Row], str]:
    return lambda row: str((row.figures.conditions or {}).get(name, "unknown"))
