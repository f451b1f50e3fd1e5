"""Predicted against measured damage, and the Spearman correlation of each mixer, for the picture of a profile."""

from __future__ import annotations

import math
from typing import Any

from mixerzoo_search.report.content import PriorTable
from mixerzoo_search.report.damage import GROUPS, group, number, rank_rows, rank_text, scored
from mixerzoo_search.report.palette import ACCENT, LINE, SOFT

LISTED = 26  # mixers with a bar


def prior_height(table: PriorTable | None) -> float:
    """Return the inches that the panel takes; 0 where nothing is scored."""
    if table is None or not scored(table):
        return 0.0
    return max(4.4, 1.25 + 0.19 * len(rank_rows(table)[:LISTED]))


def draw_prior(figure: Any, table: PriorTable) -> None:
    """Draw the panel at the lower end of a figure."""
    inches, whole = prior_height(table), figure.get_figheight()
    figure.text(
        0.02, (inches - 0.1) / whole, "Predicted and measured damage", size=12, weight="bold", va="top"
    )
    figure.text(0.02, (inches - 0.34) / whole, rank_text(table.overall), color=SOFT, va="top", size=9)
    bottom, height = 0.5 / whole, (inches - 1.25) / whole
    _scatter(figure.add_axes((0.085, bottom, 0.44, height)), table)
    _bars(figure.add_axes((0.72, bottom, 0.24, height)), table)


def _scatter(axes: Any, table: PriorTable) -> None:
    rows = scored(table)
    ends = [value for row in rows for value in (row.fitted, row.score) if value is not None]
    low, high = min(ends) / 1.5, max(ends) * 1.5
    axes.plot([low, high], [low, high], ls="--", lw=1, color=SOFT, zorder=1)
    for name, (label, colour, _, marker) in GROUPS.items():
        mine = [row for row in rows if group(row) == name]
        if mine:
            axes.scatter(
                [row.fitted for row in mine],
                [row.score for row in mine],
                s=20,
                marker=marker,
                facecolor=colour,
                edgecolor="white",
                linewidth=0.4,
                zorder=3,
                label=label,
            )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    axes.grid(True, color=LINE, lw=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("predicted with the scores of the others", size=9)
    axes.set_ylabel("measured", size=9)
    axes.tick_params(labelsize=8)
    axes.legend(
        loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=5, frameon=False, fontsize=8, handletextpad=0.0,
        columnspacing=0.8, borderaxespad=0.2,
    )  # fmt: skip


def _bars(axes: Any, table: PriorTable) -> None:
    rows = rank_rows(table)[:LISTED]
    for y, (_, rank) in enumerate(rows):
        value = rank.left_out if math.isfinite(rank.left_out) else 0.0
        axes.barh(y, value, height=0.7, color=ACCENT if y else SOFT)
        text = f"{number(rank.left_out)} ({rank.scores})"
        axes.text(max(value, 0.0) + 0.03, y, text, va="center", size=7.5)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(min(0.0, *(rank.left_out for _, rank in rows if math.isfinite(rank.left_out)), 0.0), 1.35)
    axes.set_xticks([0, 0.5, 1])
    axes.tick_params(axis="y", length=0, labelsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_title("Spearman (scores)", size=9, color=SOFT, loc="left")
    axes.spines["left"].set_visible(False)
