"""The picture of a sparsity study: what groups lost against their sparsity, and the rank correlations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from mixerzoo_search.report import numbers
from mixerzoo_search.report.content import STATISTICS
from mixerzoo_search.report.palette import ACCENT, BAD, INK, SOFT, heat
from mixerzoo_search.report.pictures import DPI, PICTURE_STYLE, as_png

WIDTH, HEAD, ROW = 10.4, 0.85, 3.75  # inches
WIDE = 8.0  # ratio of the largest to the smallest loss from which on the axis is logarithmic
PALE = "#b9c7d4"


def sparsity_picture(content: Mapping[str, Any]) -> bytes:
    """Return the study as PNG; `content` is that of `sparsity.json`."""
    with rc_context(PICTURE_STYLE):
        mixers = content["mixers"]
        height = HEAD + ROW * len(mixers)
        figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor="white")
        FigureCanvasAgg(figure)
        grid = figure.add_gridspec(
            len(mixers), 2, width_ratios=[1.45, 1], wspace=0.5, hspace=0.52, left=0.075, right=0.965,
            top=1 - (HEAD + 0.42) / height, bottom=0.52 / height,
        )  # fmt: skip
        figure.text(0.02, 1 - 0.16 / height, _title(content), size=14, weight="bold", va="top")
        figure.text(0.02, 1 - 0.45 / height, _subtitle(content), color=SOFT, va="top")
        for row, (name, found) in enumerate(mixers.items()):
            axes: Any = figure.add_subplot(grid[row, 0])
            _points(axes, content["main"], found["groups"], layers=len(content["teacher"]["layers"]))
            place = {"transform": axes.transAxes, "va": "bottom"}
            axes.text(0, 1.115, name, weight="bold", size=11, **place)
            axes.text(0, 1.035, found["verdict"], color=SOFT, size=9.5, **place)
            _bars(figure.add_subplot(grid[row, 1]), found["relations"])
        return as_png(figure)


def _title(content: Mapping[str, Any]) -> str:
    return f"{content['teacher']['name']}: are sparser layers easier to replace?"


def _subtitle(content: Mapping[str, Any]) -> str:
    settings, teacher = content["settings"], content["teacher"]
    size, layers = settings["group_size"], len(teacher["layers"])
    what = (
        f"each of {layers} attention layers" if size == 1 else f"{size} of {layers} attention layers at once"
    )
    parts = [
        f"{what}, {settings['steps']} steps each",
        f"{settings['images']} images to distil on",
    ]
    if teacher["accuracy"] is not None:
        parts.append(f"teacher {numbers.percent(teacher['accuracy'])} right")
    parts.append(f"{settings['test_images']} test images")
    return "   |   ".join(parts)


def _points(axes: Any, main: str, groups: Sequence[Mapping[str, Any]], *, layers: int) -> None:
    """Draw loss against sparsity, each group with its layers and two standard errors; deeper ones are darker."""
    shown = [group for group in groups if not group["failed"] and group["statistics"][main] is not None]
    losses = [max(group["trained"]["loss"], 0.0) for group in shown]
    errors = [2 * group["trained"]["loss_error"] for group in shown]
    log = bool(losses) and min(losses) > 0 and max(losses) > WIDE * min(losses)
    axes.set_axisbelow(True)
    axes.grid(True)
    axes.tick_params(which="both", length=0)
    axes.set_xlabel(
        f"{STATISTICS[main][0]} of its attention (right: sparser; numbers: layers; darker: deeper)"
    )
    axes.set_ylabel("loss against the teacher")
    for group, loss, error in zip(shown, losses, errors, strict=True):
        first, _, last = group["layers"].partition("-")
        depth = (int(first) + int(last or first)) / 2 / max(layers - 1, 1)
        at = group["statistics"][main]
        low = max(loss - error, loss / 20) if log else max(loss - error, 0.0)
        axes.plot([at, at], [low, loss + error], color=PALE, lw=1.6, zorder=2, solid_capstyle="butt")
        colour = heat(0.2 + 0.8 * depth)
        axes.scatter([at], [loss], s=52, color=colour, edgecolor=INK, linewidth=0.7, zorder=3)
        axes.annotate(
            group["layers"], (at, loss), xytext=(6, 4), textcoords="offset points", size=9, zorder=4
        )
    if log:
        axes.set_yscale("log")
        wide = max(losses) > 300 * min(losses)
        axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1,) if wide else (1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(bottom=0)
    axes.margins(x=0.08, y=0.1)


def _bars(axes: Any, relations: Sequence[Mapping[str, Any]]) -> None:
    """Draw the rank correlation of the loss with each statistic, turned so that left is: sparser lost less."""
    names = []
    for y, relation in enumerate(relations):
        sparser, name = relation["sparser"], relation["statistic"]
        names.append("depth" if sparser is None else f"{sparser} {STATISTICS[name][0]}")
        value = relation["spearman"] if sparser is None else relation["toward_sparser"]
        if value is None:
            axes.text(0.04, y, "–", va="center", size=8.5, color=SOFT)
            continue
        easier = relation["sparser_is_easier"]
        colour = SOFT if sparser is None else PALE if easier is None else ACCENT if easier else BAD
        axes.barh([y], [value], height=0.66, color=colour, zorder=2)
        side = 1 if value >= 0 else -1
        axes.annotate(
            f"{value:+.2f}", (value, y), xytext=(4 * side, 0), textcoords="offset points", va="center",
            ha="left" if side > 0 else "right", size=8.5,
        )  # fmt: skip
    axes.axvline(0, color=SOFT, lw=0.8, zorder=3)
    axes.set_xlim(-1.3, 1.3)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xticks([-1, -0.5, 0, 0.5, 1], ["-1", "", "0", "", "1"])
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(length=0)
    for label in axes.get_yticklabels():
        label.set(color=INK, size=9)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("Spearman; coloured: p < 0.05")
    style = {"transform": axes.transAxes, "va": "bottom"}
    axes.text(0.5, 1.115, "loss and ...", ha="center", weight="bold", size=11, **style)
    for place, text, align in ((0.0, "← lost less", "left"), (1.0, "lost more →", "right")):
        axes.text(place, 1.035, text, ha=align, size=9.5, color=SOFT, **style)
