"""The interactive charts of a report, as plotly figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go

from mixerzoo_search.report import numbers
from mixerzoo_search.report.content import EvaluationRow, Report
from mixerzoo_search.report.frontier_view import latency_range, log_losses, loss_range, shown_losses
from mixerzoo_search.report.palette import ACCENT, BAD, CARD, INK, LINE, SOFT, source_styles

FONT = "Inter, 'Segoe UI', 'Helvetica Neue', 'Liberation Sans', Arial, sans-serif"
DECADES = 5  # of a logarithmic axis, from which on its ticks are powers


def to_div(figure: Any, name: str) -> str:
    """Return the figure as a div, without plotly itself."""
    return str(
        figure.to_html(
            full_html=False,
            include_plotlyjs=False,
            div_id=name,
            config={"responsive": True, "displaylogo": False, "displayModeBar": False},
        )
    )


def layout(figure: Any, height: int) -> None:
    """Give a figure the look of the page, `height` pixels high."""
    figure.update_layout(
        template="none",
        height=height,
        autosize=True,
        margin={"l": 66, "r": 20, "t": 16, "b": 56},
        paper_bgcolor=CARD,
        plot_bgcolor=CARD,
        font={"family": FONT, "size": 13, "color": INK},
        hoverlabel={"bgcolor": CARD, "bordercolor": LINE, "font": {"family": FONT, "size": 12, "color": INK}},
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "font": {"size": 12}},
    )
    style: dict[str, Any] = {
        "gridcolor": LINE,
        "zeroline": False,
        "linecolor": SOFT,
        "ticks": "outside",
        "tickcolor": LINE,
    }
    style["title"] = {"font": {"size": 13}}
    figure.update_xaxes(**style)
    figure.update_yaxes(**style)


def _hover(row: EvaluationRow) -> str:
    """Return what is shown for a student: its name, its figures, and what it replaced."""
    lines = [
        f"<b>{escape(row.short_name)}</b>  ({escape(row.source)})",
        f"latency {numbers.ms(row.latency_ms)}, predicted {numbers.ms(row.predicted_ms)}",
        f"loss {numbers.short(row.loss)}, agreement {numbers.percent(row.agreement)}",
        f"accuracy {numbers.percent(row.accuracy)}, {numbers.count(row.params)} parameters",
    ]
    if not row.feasible:
        lines.append("over the budget")
    changed = [f"{escape(site)}: {escape(choice)}" for site, choice in row.plan.items() if choice != "keep"]
    lines += ["", *changed[:16]]
    if len(changed) > 16:
        lines.append(f"and {len(changed) - 16} more")
    return "<br>".join(lines)


def frontier_chart(report: Report) -> Any:
    """Return latency against loss: every student, the frontier, the exact line, budget and teacher."""
    figure = go.Figure()
    log = log_losses(report)
    low, high = latency_range(report)
    bottom, top = loss_range(report, log)
    line = [(x, y) for x, y in report.exact_line if not log or y > 0]
    if line:
        figure.add_scatter(
            x=[x for x, _ in line],
            y=[y for _, y in line],
            mode="lines",
            name="exact, predicted",
            line={"color": SOFT, "width": 1.5, "dash": "dot"},
            hovertemplate="exact frontier of the additive model<br>%{x:.3g} ms, predicted loss %{y:.3g}<extra></extra>",
        )
    front = report.frontier()
    if front:
        figure.add_scatter(
            x=[row.latency_ms for row in front],
            y=shown_losses(front, bottom),
            mode="lines",
            name="frontier",
            line={"color": INK, "width": 1.5, "shape": "hv"},
            hoverinfo="skip",
        )
    # A point that is not drawn keeps a source in the legend where all of it is over the budget.
    hidden: list[Any] = [None]
    for source, (colour, symbol, _) in source_styles(row.source for row in report.evaluations).items():
        for feasible in (True, False):
            rows = [row for row in report.evaluations if row.source == source and row.feasible is feasible]
            figure.add_scatter(
                x=[row.latency_ms for row in rows] or hidden,
                y=shown_losses(rows, bottom) or hidden,
                mode="markers",
                name=source,
                legendgroup=source,
                showlegend=feasible,
                cliponaxis=False,
                marker={
                    "color": colour if feasible else CARD,
                    "symbol": symbol,
                    "size": 9,
                    "line": {"color": CARD if feasible else colour, "width": 1 if feasible else 1.5},
                },
                hovertext=[_hover(row) for row in rows],
                hoverinfo="text",
            )
    figure.add_scatter(
        x=[report.teacher.latency_ms],
        y=[bottom if log else 0.0],
        mode="markers",
        name="teacher",
        cliponaxis=False,
        marker={"color": INK, "symbol": "hexagon2", "size": 14},
        hovertext=[
            f"<b>{escape(report.teacher.name)}</b><br>teacher, {numbers.ms(report.teacher.latency_ms)}"
            f"<br>accuracy {numbers.percent(report.teacher.accuracy)}, "
            f"{numbers.count(report.teacher.params)} parameters"
        ],
        hoverinfo="text",
    )
    if report.best is not None:
        figure.add_scatter(
            x=[report.best.latency_ms],
            y=shown_losses([report.best], bottom),
            mode="markers",
            name="best",
            marker={"color": "#f0b400", "symbol": "star", "size": 19, "line": {"color": INK, "width": 1.2}},
            hovertext=[_hover(report.best)],
            hoverinfo="text",
        )
    for value, text, colour in (
        (report.budget_ms, f"budget {numbers.ms(report.budget_ms)}", BAD),
        (report.teacher.latency_ms, f"teacher {numbers.ms(report.teacher.latency_ms)}", SOFT),
    ):
        left = (value - low) / (high - low) > 0.3
        figure.add_vline(x=value, line={"color": colour, "width": 1.2, "dash": "6px,4px"})
        figure.add_annotation(
            x=value,
            y=1.0 if colour == BAD else 0.94,
            yref="paper",
            yanchor="top",
            xanchor="right" if left else "left",
            text=text,
            xshift=-5 if left else 5,
            showarrow=False,
            font={"color": colour, "size": 12},
            bgcolor="rgba(255,255,255,0.8)",
        )
    layout(figure, 500)
    figure.update_xaxes(title_text="latency (ms, median, measured)", range=[low, high])
    figure.update_yaxes(
        title_text="loss against the teacher" + (" (log)" if log else ""),
        type="log" if log else "linear",
        range=[math.log10(bottom), math.log10(top)] if log else [bottom, top],
    )
    if log:
        figure.update_yaxes(dtick="D2" if top / bottom < 300 else 1, tickformat="~g")
    return figure


def agreement_chart(
    rows: Sequence[tuple[float, float, EvaluationRow]], *, quantity: str, unit: str, log: bool = False
) -> Any:
    """Return predicted against measured, (predicted, measured, student), with the diagonal."""
    figure = go.Figure()
    usable = [
        (x, y, row)
        for x, y, row in rows
        if math.isfinite(x) and math.isfinite(y) and (not log or min(x, y) > 0)
    ]
    values = [value for x, y, _ in usable for value in (x, y)] or [1.0, 2.0]
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    low, high = (low / 1.25, high * 1.25) if log else (low - margin, high + margin)
    figure.add_scatter(
        x=[low, high],
        y=[low, high],
        mode="lines",
        line={"color": SOFT, "width": 1.2, "dash": "dash"},
        hoverinfo="skip",
        showlegend=False,
    )
    for source, (colour, symbol, _) in source_styles(row.source for _, _, row in usable).items():
        mine = [(x, y, row) for x, y, row in usable if row.source == source]
        figure.add_scatter(
            x=[x for x, _, _ in mine],
            y=[y for _, y, _ in mine],
            mode="markers",
            name=source,
            marker={"color": colour, "symbol": symbol, "size": 8, "line": {"color": CARD, "width": 1}},
            hovertext=[_hover(row) for _, _, row in mine],
            hoverinfo="text",
        )
    layout(figure, 380)
    axis: Mapping[str, Any] = {"range": [math.log10(low), math.log10(high)] if log else [low, high]}
    if log:
        axis = {**axis, "type": "log", **_log_ticks(low, high)}
    figure.update_xaxes(title_text=f"predicted {quantity}{unit}", **axis)
    figure.update_yaxes(title_text=f"measured {quantity}{unit}", **axis)
    if not usable:
        figure.add_annotation(
            x=0.5, y=0.5, xref="paper", yref="paper", text="nothing was predicted", showarrow=False,
            font={"color": ACCENT, "size": 14},
        )  # fmt: skip
    return figure


def _log_ticks(low: float, high: float) -> dict[str, Any]:
    """Return ticks of a logarithmic axis that have room: powers of ten, some of them left out, over many decades."""
    decades = math.log10(high / low)
    if decades < DECADES:
        return {"tickformat": "~g", "dtick": "D2" if decades < 2 else 1}
    return {"exponentformat": "power", "dtick": math.ceil(decades / DECADES)}
