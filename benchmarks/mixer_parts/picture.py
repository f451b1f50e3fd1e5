"""The picture of the zoo: latency against the number of tokens, one panel a family, exact attention in each."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixer_parts.growth import DIM, HEADS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 4
WIDTH_IN, PANEL_IN = 12.0, 2.15
DPI = 160
GREY, INK = "#9a9a9a", "#333333"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b0479a", "#8a6d00", "#3aa0d8", "#7a3b1d")
GAP = 0.085  # between labels, as a share of the panel's height


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw `rows` of growth.grow, of which the first is exact attention."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    attention, *mixers = (row for row in rows if row["ms"])
    families: dict[str, list[dict[str, Any]]] = {}
    for row in mixers:
        families.setdefault(row["family"], []).append(row)
    columns = min(COLUMNS, len(families))
    count = -(-len(families) // columns)
    figure, grid = pyplot.subplots(
        count,
        columns,
        figsize=(WIDTH_IN * columns / COLUMNS, PANEL_IN * count + 0.75),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    panels = list(grid.flat)
    sizes = list(attention["ms"])
    for panel, (family, members) in zip(panels, families.items(), strict=False):
        _frame(panel, family, sizes, _limits(rows))
        _lines(panel, attention, members)
    for spare in panels[len(families) :]:
        spare.set_visible(False)
        above = panels[panels.index(spare) - columns]  # now the lowest of its column
        above.tick_params(labelbottom=True)
    figure.supxlabel(f"tokens N (one sample, D = {DIM}, {HEADS} heads)", fontsize=10, color=INK)
    figure.supylabel("latency of one forward pass, ms", fontsize=10, color=INK)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, facecolor="white")
    pyplot.close(figure)


def _limits(rows: list[dict[str, Any]]) -> tuple[float, float]:
    every = [ms for row in rows for ms in row["ms"].values()]
    return max(min(every), 3e-3) * 0.7, max(every) * 2.5


def _frame(panel: Axes, family: str, sizes: list[int], limits: tuple[float, float]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xlim(sizes[0] * 0.75, sizes[-1] * (sizes[-1] / sizes[0]) ** 0.7)  # room for the labels
    panel.set_ylim(*limits)
    panel.set_title(family.replace("_", " "), loc="left", fontsize=10, fontweight="bold", color=INK, pad=3)
    panel.xaxis.set_major_locator(FixedLocator(sizes))
    panel.xaxis.set_major_formatter(
        FuncFormatter(lambda n, _: f"{n:.0f}" if n < 1024 else f"{n / 1024:.0f}k")
    )
    panel.xaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_locator(LogLocator(numticks=12))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda ms, _: f"{ms:,g}"))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.tick_params(labelsize=7.5, length=2, color=GREY, labelcolor=INK)
    panel.grid(color="#eeeeee", linewidth=0.7)
    panel.set_axisbelow(True)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        panel.spines[side].set_color("#cccccc")


def _lines(panel: Axes, attention: dict[str, Any], members: list[dict[str, Any]]) -> None:
    labels = []
    for row, colour in [(attention, GREY), *zip(members, COLOURS * len(members), strict=False)]:
        sizes, times = list(row["ms"]), list(row["ms"].values())
        grey = row is attention
        panel.plot(
            sizes,
            times,
            color=colour,
            linewidth=2.6 if grey else 1.5,
            marker=None if grey else "o",
            markersize=2.6,
            zorder=1 if grey else 2,
            solid_capstyle="round",
        )
        labels.append((row["mixer"], colour, sizes[-1], times[-1]))
    low, high = panel.get_ylim()
    heights = [math.log(ms / low) / math.log(high / low) for _, _, _, ms in labels]
    margin = list(attention["ms"])[-1]
    for (name, colour, n, ms), height in zip(labels, spread(heights, GAP), strict=True):
        if n < margin:  # a line that ends early is led to its label
            level = low * (high / low) ** height
            panel.plot([n, margin], [ms, level], color=colour, linewidth=0.8, linestyle=(0, (1, 2)))
        panel.annotate(
            name,
            xy=(margin, height),
            xycoords=("data", "axes fraction"),
            xytext=(5, 0),
            textcoords="offset points",
            color="#777777" if colour == GREY else colour,
            fontsize=8,
            va="center",
        )


def spread(heights: list[float], gap: float) -> list[float]:
    """Move heights apart to at least `gap`, in their order, as little as it takes, within 0 and 1."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    blocks: list[list[float]] = []  # [sum of wanted starts, members]; a block is evenly spaced
    for i in order:
        blocks.append([heights[i], 1])
        while len(blocks) > 1 and _start(blocks[-2], gap) + blocks[-2][1] * gap > _start(blocks[-1], gap):
            last = blocks.pop()
            blocks[-1] = [blocks[-1][0] + last[0] - last[1] * blocks[-1][1] * gap, blocks[-1][1] + last[1]]
    placed = [_start(block, gap) + k * gap for block in blocks for k in range(int(block[1]))]
    lift = max(0.0, 0.03 - placed[0]) - max(0.0, placed[-1] - 0.97)
    result = [0.0] * len(heights)
    for i, height in zip(order, placed, strict=True):
        result[i] = height + lift
    return result


def _start(block: list[float], gap: float) -> float:
    return block[0] / block[1]
