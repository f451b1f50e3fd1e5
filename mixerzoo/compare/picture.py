"""Students side by side as a picture: one row a student, one column a figure. PNG, made without a display."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mixerzoo.compare.comparison import Comparison, Row

DPI = 200
INK, SOFT, LINE, PALE = "#1b2430", "#5c6773", "#e3e6ea", "#b9c7d4"
COLUMN, ROW, HEAD = 1.75, 0.42, 0.75  # inches
NOTE_CHARS = 18  # of a note, for an inch of width
STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["Inter", "Helvetica Neue", "Segoe UI", "Liberation Sans", "DejaVu Sans"],
    "font.size": 9.5,
    "text.color": INK,
}


@dataclass(frozen=True, kw_only=True)
class Column:
    """One figure of every student.

    Attributes:
        title: above it.
        colour: of its bars.
        value: of a student, None where it was not measured.
        teacher: of its teacher, marked by a line.
        text: how a value is written.
        most: end of the scale, or None for the largest value there is.
        reach: ends of an interval that the value lies in, where it is known.
    """

    title: str
    colour: str
    value: Callable[[Row], float | None]
    teacher: Callable[[Row], float | None]
    text: Callable[[float], str]
    most: float | None = None
    reach: Callable[[Row], tuple[float, float] | None] = lambda row: None


def _accuracies(row: Row) -> tuple[float, float] | None:
    """Return the teacher's accuracy plus the ends of the 95 % interval of what the student's is above it."""
    teacher, low, high = row.figures.teacher_accuracy, row.figures.change_low, row.figures.change_high
    return None if teacher is None or low is None or high is None else (teacher + low, teacher + high)


def _percent(value: float) -> str:
    return f"{value:.1%}"


COLUMNS = (
    Column(
        title="accuracy",
        colour="#009e73",
        value=lambda row: row.figures.accuracy,
        teacher=lambda row: row.figures.teacher_accuracy,
        text=_percent,
        most=1.0,
        reach=_accuracies,
    ),
    Column(
        title="agreement",
        colour="#56b4e9",
        value=lambda row: row.figures.agreement,
        teacher=lambda row: None,
        text=_percent,
        most=1.0,
    ),
    Column(
        title="latency, ms",
        colour="#0072b2",
        value=lambda row: row.figures.latency_ms,
        teacher=lambda row: row.figures.teacher_ms,
        text=lambda value: f"{value:.3g}",
    ),
    Column(
        title="of the teacher's latency",
        colour="#0072b2",
        value=lambda row: row.figures.share,
        teacher=lambda row: None,
        text=lambda value: f"{value:.0%}",
        most=1.0,
    ),
    Column(
        title="parameters, M",
        colour="#e69f00",
        value=lambda row: None if row.figures.params is None else row.figures.params / 1e6,
        teacher=lambda row: None if row.figures.teacher_params is None else row.figures.teacher_params / 1e6,
        text=lambda value: f"{value:.3g}",
    ),
    Column(
        title="on disk, MiB",
        colour="#cc79a7",
        value=lambda row: row.bytes / 2**20,
        teacher=lambda row: None,
        text=lambda value: f"{value:.3g}",
    ),
)


def compare_picture(comparison: Comparison) -> bytes:
    """Return a comparison as PNG; the same bytes for the same figures."""
    rows = comparison.rows
    columns = [column for column in COLUMNS if any(column.value(row) is not None for row in rows)]
    names = min(max(len(row.name) for row in rows), 40) * 0.085 + 0.3
    width = names + COLUMN * len(columns) + 0.2
    notes = [line for note in comparison.notes for line in _wrapped(note, round(width * NOTE_CHARS))]
    below = 0.3 + 0.19 * (len(notes) + 1)
    height = HEAD + ROW * len(rows) + below
    with rc_context(STYLE):
        figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
        FigureCanvasAgg(figure)
        grid = figure.add_gridspec(
            1, len(columns), wspace=0.12, left=names / width, right=1 - 0.1 / width,
            top=1 - HEAD / height, bottom=below / height,
        )  # fmt: skip
        figure.text(0.1 / width, 1 - 0.14 / height, _title(rows), size=14, weight="bold", va="top")
        for number, column in enumerate(columns):
            axes = figure.add_subplot(grid[number])
            _bars(axes, rows, column)
            if not number:
                axes.set_yticks(range(len(rows)), [_short(row.name) for row in rows])
        legend = "A grey line is the teacher."
        if any(_accuracies(row) is not None for row in rows):
            legend += (
                " A black one is the 95 % interval of the accuracy, less the teacher's on the same images."
            )
        for number, line in enumerate([legend, *notes]):
            figure.text(
                0.1 / width, (below - 0.22 - 0.19 * number) / height, line, color=SOFT, size=8.5, va="top"
            )
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def _title(rows: Sequence[Row]) -> str:
    teachers = list(dict.fromkeys(row.teacher for row in rows))
    return f"Students of {', '.join(teachers)}"


def _bars(axes: Any, rows: Sequence[Row], column: Column) -> None:
    values = [column.value(row) for row in rows]
    teachers = [column.teacher(row) for row in rows]
    there = [value for value in (*values, *teachers) if value is not None]
    most = column.most or max(there, default=1.0) or 1.0
    axes.set_title(column.title, loc="left", size=9.5, color=SOFT, pad=5)
    axes.set_xlim(0, 1.38 * max(most, *there))  # room for the number at the end
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.tick_params(length=0, labelcolor=INK)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "left")
        spine.set_color(LINE)
    for at, (value, teacher) in enumerate(zip(values, teachers, strict=True)):
        if teacher is not None:
            axes.plot([teacher, teacher], [at - 0.38, at + 0.38], color=PALE, linewidth=2.2, zorder=1)
        if value is None:
            axes.text(0.02 * most, at, "not measured", va="center", color=SOFT, size=8)
            continue
        axes.barh(at, value, height=0.56, color=column.colour, zorder=2)
        reach = column.reach(rows[at])
        if reach is not None:
            axes.plot(reach, [at, at], color=INK, linewidth=1.2, zorder=3)
        end = max(value, teacher or 0.0, reach[1] if reach else 0.0)
        axes.text(end + 0.03 * most, at, column.text(value), va="center", zorder=3)


def _short(name: str) -> str:
    return name if len(name) <= 40 else f"...{name[-37:]}"


def _wrapped(text: str, width: int) -> list[str]:
    import textwrap

    return textwrap.wrap(text, width, subsequent_indent="   ")
