"""What the prior says of every candidate, beside what was measured, as parts of a page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from mixerzoo_search.report import numbers
from mixerzoo_search.report.content import DamageRow, PriorTable, Rank

# How a mixer mixes tokens -> what it is called, its colour, plotly symbol and matplotlib marker.
GROUPS: dict[str, tuple[str, str, str, str]] = {
    "content": ("by content", "#0072b2", "circle", "o"),
    "static": ("always the same", "#e69f00", "diamond", "D"),
    "token": ("token by token", "#009e73", "square", "s"),
    "none": ("nothing", "#2f3640", "x", "X"),
    "mlp": ("mlp", "#cc79a7", "triangle-up", "^"),
}


def group(row: DamageRow) -> str:
    """Return the group of candidates that a row is drawn with."""
    return row.kind if row.kind in GROUPS else row.mixing


def scored(table: PriorTable) -> list[DamageRow]:
    """Return the rows whose prediction and score can stand on logarithmic axes."""
    return [
        row
        for row in table.rows
        if row.score is not None and row.score > 0 and row.fitted is not None and math.isfinite(row.fitted)
    ]


def rank_text(rank: Rank) -> str:
    """Return in one sentence how well a prediction ranks what was measured."""
    if not rank.scores:
        return "Nothing is scored yet."
    return (
        f"Spearman of predicted and measured damage over {rank.scores} scores: {number(rank.before_scores)} before any "
        f"score, {number(rank.left_out)} with the other scores."
    )


def number(value: float) -> str:
    """Return a correlation with two digits, `–` where there is none."""
    return "–" if not math.isfinite(value) else f"{value:.2f}".replace("-", "−")


def rank_rows(table: PriorTable) -> list[tuple[str, Rank]]:
    """Return the correlations, all together first, then mixer by mixer, those with most scores first."""
    mixers = sorted(table.mixers.items(), key=lambda item: (-item[1].scores, item[0]))
    return [("all", table.overall), *mixers]


def rank_grid(table: PriorTable) -> str:
    """Return a table of Spearman per mixer."""
    lines = "".join(
        f'<tr><th class="row">{escape(name)}</th><td class="n">{rank.scores}</td>'
        f'<td class="n">{number(rank.before_scores)}</td><td class="n">{number(rank.left_out)}</td></tr>'
        for name, rank in rank_rows(table)
    )
    heads = "".join(
        f'<th style="text-align:right">{name}</th>'
        for name in ("scores", "before any score", "with the others' scores")
    )
    return f'<div class="scroll"><table class="grid few"><tr><th></th>{heads}</tr>{lines}</table></div>'


def damage_grid(rows: Sequence[DamageRow]) -> str:
    """Return a table of all candidates, site by site, least damage first."""
    lines, before = [], None
    for row in sorted_rows(rows):
        if row.site != before:
            lines.append(f'<tr><th class="kind" colspan="7">{escape(row.site)}</th></tr>')
            before = row.site
        figures = [numbers.short(value) for value in (row.nmse, row.predicted, row.fitted, row.score)]
        figures.append("" if row.before_steps is None else numbers.short(row.before_steps))
        mixing = "" if row.kind == "mlp" else escape(row.mixing)
        cells = "".join(f'<td class="n">{figure}</td>' for figure in figures)
        lines.append(f'<tr><th class="row">{escape(row.candidate)}</th><td>{mixing}</td>{cells}</tr>')
    names = ("mixes by", "NMSE", "predicted", "fitted", "measured", "before steps")
    heads = "".join(
        f'<th style="text-align:{"right" if at else "center"}">{name}</th>' for at, name in enumerate(names)
    )
    return (
        f'<div class="scroll"><table class="grid few"><tr><th></th>{heads}</tr>{"".join(lines)}</table></div>'
    )


def sorted_rows(rows: Sequence[DamageRow]) -> list[DamageRow]:
    """Return rows by site, in the order in which sites come, the least damage first: measured, fitted or predicted."""
    place = {site: at for at, site in enumerate(dict.fromkeys(row.site for row in rows))}
    known = any(row.fitted is not None for row in rows)

    def damage(row: DamageRow) -> float:
        best = row.score if row.score is not None else row.fitted if known else row.predicted
        return math.inf if best is None else best

    return sorted(rows, key=lambda row: (place[row.site], damage(row), row.candidate))


def damage_chart(table: PriorTable) -> Any:
    """Return predicted damage (with the scores of the others) against measured damage."""
    import plotly.graph_objects as go

    from mixerzoo_search.report.charts import layout
    from mixerzoo_search.report.palette import CARD, SOFT

    figure = go.Figure()
    rows = scored(table)
    ends = [value for row in rows for value in (row.fitted, row.score) if value is not None]
    low, high = (min(ends) / 1.5, max(ends) * 1.5) if ends else (0.1, 1.0)
    figure.add_scatter(
        x=[low, high],
        y=[low, high],
        mode="lines",
        line={"color": SOFT, "width": 1.2, "dash": "dash"},
        hoverinfo="skip",
        showlegend=False,
    )
    for name, (label, colour, symbol, _) in GROUPS.items():
        mine = [row for row in rows if group(row) == name]
        if not mine:
            continue
        figure.add_scatter(
            x=[row.fitted for row in mine],
            y=[row.score for row in mine],
            mode="markers",
            name=label,
            marker={"color": colour, "symbol": symbol, "size": 8, "line": {"color": CARD, "width": 1}},
            hovertext=[
                f"<b>{escape(row.candidate)}</b> at {escape(row.site)}<br>NMSE {numbers.short(row.nmse)}"
                f"<br>predicted {numbers.short(row.fitted)}, measured {numbers.short(row.score)}"
                for row in mine
            ],
            hoverinfo="text",
        )
    layout(figure, 440)
    axis = {
        "type": "log",
        "tickformat": ".0e" if low < 1e-4 else "~g",
        "dtick": 2 if high / low > 1e6 else 1,
        "range": [math.log10(low), math.log10(high)],
    }
    figure.update_xaxes(title_text="predicted damage, with the scores of the others", **axis)
    figure.update_yaxes(title_text="measured damage", **axis)
    return figure
