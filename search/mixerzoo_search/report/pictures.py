"""The pictures beside the pages: PNG, made without a display."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

from matplotlib import font_manager, rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch, Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from mixerzoo.plan import KEEP, KEEP_LETTER, Candidate
from mixerzoo_search.report import numbers
from mixerzoo_search.report.content import STATISTICS, EvaluationRow, Profile, Report, SiteRow
from mixerzoo_search.report.frontier_view import (
    latency_range,
    listed_frontier,
    log_losses,
    loss_range,
    ordered_sites,
    shown_losses,
    site_labels,
)
from mixerzoo_search.report.palette import (
    BAD,
    INK,
    KIND_COLOURS,
    LINE,
    SOFT,
    colours_of,
    heat,
    ink_on,
    source_styles,
)
from mixerzoo_search.report.prior_picture import draw_prior, prior_height

DPI = 200
LISTED = 6  # plans under the frontier
FAMILIES = ["Inter", "Helvetica Neue", "Segoe UI", "Liberation Sans", "DejaVu Sans"]
PICTURE_STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": FAMILIES,
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
}


def report_picture(report: Report) -> bytes:
    """Return the frontier and, under it, what its plans put where, as PNG."""
    with rc_context(PICTURE_STYLE):
        rows = listed_frontier(report, LISTED)
        sites = ordered_sites(report.sites)
        strip = 0.26 * len(rows) + 0.75 if rows and sites else 0.0
        figure = Figure(figsize=(9.6, 5.1 + strip), dpi=DPI, facecolor="white")
        FigureCanvasAgg(figure)
        heights = [5.1 - 0.95, strip] if strip else [5.1]
        grid = figure.add_gridspec(
            len(heights), 1, height_ratios=heights, left=0.085, right=0.975, hspace=0.34,
            top=1 - 0.95 / (5.1 + strip), bottom=(0.42 if strip else 0.55) / (5.1 + strip),
        )  # fmt: skip
        _title(figure, report)
        _frontier(figure.add_subplot(grid[0]), report)
        if strip:
            _strip(figure.add_subplot(grid[1]), report, rows, sites)
        return as_png(figure)


def profile_picture(profile: Profile) -> bytes:
    """Return statistics and latency of every site, as PNG."""
    with rc_context(PICTURE_STYLE):
        sites, params = list(profile.sites), profile.teacher.params
        keys = [key for key in STATISTICS if any(_finite(site.statistics.get(key)) for site in sites)]
        below = prior_height(profile.prior)
        height = 1.75 + 0.27 * len(sites) + below
        figure = Figure(figsize=(9.6, height), dpi=DPI, facecolor="white")
        FigureCanvasAgg(figure)
        longest = max((len(site.name) for site in sites), default=8)
        grid = figure.add_gridspec(
            1, 2, width_ratios=[max(len(keys), 1) * 0.62, 2.6], wspace=0.03, right=0.975,
            left=min(0.035 + 0.0088 * longest, 0.3), top=1 - 1.25 / height, bottom=(0.32 + below) / height,
        )  # fmt: skip
        figure.text(0.02, 1 - 0.2 / height, profile.teacher.name, size=14, weight="bold", va="top")
        figure.text(
            0.02,
            1 - 0.47 / height,
            f"{len(sites)} sites, "
            + ("" if params is None else f"{numbers.count(params)} parameters, ")
            + numbers.ms(profile.teacher.latency_ms),
            color=SOFT,
            va="top",
        )
        _heat(figure.add_subplot(grid[0]), sites, keys)
        _latencies(figure.add_subplot(grid[1]), sites)
        if profile.prior is not None and below:
            draw_prior(figure, profile.prior)
        return as_png(figure)


def as_png(figure: Any) -> bytes:
    """Return a figure as a PNG, the same bytes for the same figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _title(figure: Any, report: Report) -> None:
    height = figure.get_figheight()
    figure.text(0.02, 1 - 0.16 / height, report.title, size=14, weight="bold", va="top")
    best = report.best
    if best is None:
        return
    before, tested = report.teacher, report.tested
    parts = [
        f"{numbers.ms(before.latency_ms)} → {numbers.ms(best.latency_ms)} "
        f"({before.latency_ms / best.latency_ms:.2f}x as fast)"
    ]
    if tested is not None:
        if before.accuracy is not None and tested.accuracy is not None:
            parts.append(f"accuracy {numbers.percent(before.accuracy)} → {numbers.percent(tested.accuracy)}")
        parts.append(f"agreement {numbers.percent(tested.agreement)}")
    parts.append("budget met" if report.met else "budget not met")
    figure.text(0.02, 1 - 0.43 / height, "   |   ".join(parts), color=SOFT, va="top")


def _frontier(axes: Any, report: Report) -> None:
    log = log_losses(report)
    low, high = latency_range(report)
    bottom, top = loss_range(report, log)
    axes.set_xlim(low, high)
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5) if top / bottom < 300 else (1,)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(bottom, top)
    axes.grid(True)
    axes.set_axisbelow(True)
    axes.set_xlabel("latency (ms, measured)")
    axes.set_ylabel("loss against the teacher")
    axes.tick_params(which="both", length=0)
    for value, text, colour, row in (
        (report.budget_ms, f"budget {numbers.ms(report.budget_ms)}", BAD, 0),
        (report.teacher.latency_ms, f"teacher {numbers.ms(report.teacher.latency_ms)}", SOFT, 1),
    ):
        left = (value - low) / (high - low) > 0.3
        axes.axvline(value, color=colour, lw=1, ls=(0, (5, 3)), zorder=1)
        axes.annotate(
            text, (value, 1 - 0.06 * row), xycoords=("data", "axes fraction"), xytext=(-5 if left else 5, -2),
            textcoords="offset points", ha="right" if left else "left", va="top", color=colour, size=9,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}, zorder=6,
        )  # fmt: skip
    line = [(x, y) for x, y in report.exact_line if not log or y > 0]
    handles: list[Any] = []
    if line:
        handles += axes.plot(*zip(*line, strict=True), color=SOFT, lw=1.2, ls=":", label="exact, predicted")
    front = report.frontier()
    if front:
        x, y = [row.latency_ms for row in front], shown_losses(front, bottom)
        handles += axes.step(x, y, where="post", color=INK, lw=1.2, label="frontier", zorder=2)
    styles = source_styles(row.source for row in report.evaluations)
    for source, (colour, _, marker) in styles.items():
        for feasible in (True, False):
            rows = [row for row in report.evaluations if row.source == source and row.feasible is feasible]
            axes.scatter(
                [row.latency_ms for row in rows],
                shown_losses(rows, bottom),
                s=34,
                marker=marker,
                facecolor=colour if feasible else "white",
                edgecolor="white" if feasible else colour,
                linewidth=0.7 if feasible else 1.1,
                zorder=4 if feasible else 3,
            )
        handles.append(
            Line2D([], [], ls="", marker=marker, color=colour, markeredgecolor="white", label=source)
        )
    if not all(row.feasible for row in report.evaluations):
        hollow: dict[str, Any] = {"ls": "", "marker": "o", "color": "white", "markeredgecolor": SOFT}
        handles.append(Line2D([], [], label="over budget", **hollow))
    axes.scatter(
        [report.teacher.latency_ms],
        [bottom if log else 0],
        s=110,
        marker="H",
        color=INK,
        zorder=5,
        clip_on=False,
    )
    handles.append(Line2D([], [], ls="", marker="H", color=INK, ms=9, label="teacher"))
    if report.best is not None:
        star: dict[str, Any] = {"marker": "*", "color": "#f0b400", "edgecolor": INK, "linewidth": 0.9}
        axes.scatter([report.best.latency_ms], shown_losses([report.best], bottom), s=250, zorder=7, **star)
        star = {"marker": "*", "color": "#f0b400", "markeredgecolor": INK, "ms": 13, "ls": ""}
        handles.append(Line2D([], [], label="best", **star))
    axes.legend(
        handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(handles), frameon=False,
        fontsize=8.5, handletextpad=0.4, columnspacing=1.3, borderaxespad=0.1,
    )  # fmt: skip


def _strip(axes: Any, report: Report, rows: Sequence[EvaluationRow], sites: Sequence[SiteRow]) -> None:
    """Draw the plans as rows of coloured cells, one column a site, a gap between the kinds."""
    used = {Candidate.parse(choice).mixer for row in rows for choice in row.plan.values()}
    colours = colours_of(report)
    letters = dict(report.mixers) | {KEEP: KEEP_LETTER}
    place, at = [], 0.0
    for previous, site in zip([None, *sites], sites, strict=False):
        at += 0.6 if previous is not None and previous.kind != site.kind else 0.0
        place.append(at)
        at += 1.0
    small = len(sites) > 32
    # By name, since only then a font that lacks the star borrows it from the next; matplotlib warns of missing ones.
    families = [family for family in FAMILIES if family in font_manager.get_font_names()]
    for y, row in enumerate(rows):
        best = row == report.best
        axes.text(
            -0.012, y + 0.5, ("★ " if best else "") + numbers.ms(row.latency_ms),
            transform=axes.get_yaxis_transform(), ha="right", va="center", size=8.5,
            weight="bold" if best else "normal", family=families,
        )  # fmt: skip
        for x, site in zip(place, sites, strict=True):
            choice = Candidate.parse(row.plan.get(site.name, KEEP))
            colour = colours[choice.mixer]
            axes.add_patch(
                FancyBboxPatch(
                    (x + 0.04, y + 0.09),
                    0.92,
                    0.82,
                    boxstyle="round,pad=0,rounding_size=0.12",
                    fc=colour,
                    ec="none",
                )
            )
            if not small and not choice.is_keep:
                width = (
                    "" if choice.width == 1 or choice.mixer == "none" else f"{choice.width:.3g}".lstrip("0")
                )
                text = letters.get(choice.mixer, choice.mixer[0].upper()) + width
                axes.text(
                    x + 0.5, y + 0.52, text, ha="center", va="center", color=ink_on(colour),
                    size=8 if len(sites) <= 18 else 6,
                )  # fmt: skip
    axes.set_xlim(-0.05, at + 0.05)
    axes.set_ylim(len(rows) + 0.02, -0.55)
    if not small:
        for x, label in zip(place, site_labels(sites), strict=True):
            axes.text(x + 0.5, -0.12, label, ha="center", va="bottom", size=7.5, color=SOFT)
    for kind in dict.fromkeys(site.kind for site in sites):
        first = next(x for x, site in zip(place, sites, strict=True) if site.kind == kind)
        axes.text(
            first + 0.05,
            -0.12 if small else -0.75,
            f"{kind} sites",
            ha="left",
            va="bottom",
            size=8.5,
            color=SOFT,
        )
    axes.axis("off")
    handles = [
        Patch(color=colours[mixer], label=f"{letters.get(mixer, mixer[0].upper())}  {mixer}")
        for mixer in colours
        if mixer in used
    ]
    columns = len(handles) if len(handles) <= 9 else math.ceil(len(handles) / 2)
    axes.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.46, 0.0), ncols=columns, frameon=False,
        fontsize=8, handlelength=1.1, handleheight=1.0, handletextpad=0.5, columnspacing=1.1, borderaxespad=0.3,
    )  # fmt: skip


def _heat(axes: Any, sites: Sequence[SiteRow], keys: Sequence[str]) -> None:
    for x, key in enumerate(keys):
        values = {site.name: site.statistics[key] for site in sites if _finite(site.statistics.get(key))}
        low, high = min(values.values()), max(values.values())
        for y, site in enumerate(sites):
            if site.name not in values:
                continue
            value = values[site.name]
            colour = heat((value - low) / (high - low) if high > low else 0.3)
            corner = (x + 0.03, y + 0.05)
            axes.add_patch(FancyBboxPatch(corner, 0.94, 0.9, boxstyle="square,pad=0", fc=colour, ec="none"))
            axes.text(
                x + 0.5, y + 0.53, f"{value:.2f}", ha="center", va="center", size=8, color=ink_on(colour)
            )
    axes.set_xlim(0, max(len(keys), 1))
    axes.set_ylim(len(sites), 0)
    axes.set_xticks([x + 0.5 for x in range(len(keys))], [STATISTICS[key][0] for key in keys])
    axes.tick_params(length=0)
    axes.xaxis.tick_top()
    for label in axes.get_xticklabels():
        label.set(rotation=28, ha="left", rotation_mode="anchor", size=8.5, color=INK)
    axes.set_yticks([y + 0.5 for y in range(len(sites))], [site.name for site in sites])
    for label in axes.get_yticklabels():
        label.set(size=8.5, color=INK)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _latencies(axes: Any, sites: Sequence[SiteRow]) -> None:
    values = [site.latency_ms or 0.0 for site in sites]
    colours = [KIND_COLOURS.get(site.kind, SOFT) for site in sites]
    axes.barh([y + 0.5 for y in range(len(sites))], values, height=0.72, color=colours)
    for y, value in enumerate(values):
        axes.annotate(
            numbers.ms(value),
            (value, y + 0.53),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            size=8,
        )
    axes.set_ylim(len(sites), 0)
    axes.set_xlim(0, 1.28 * (max(values, default=0.0) or 1.0))
    axes.axis("off")
    kinds = dict.fromkeys(site.kind for site in sites)
    axes.legend(
        handles=[Patch(color=KIND_COLOURS.get(kind, SOFT), label=f"time in {kind}") for kind in kinds], frameon=False,
        loc="lower left", bbox_to_anchor=(0, 1.0), ncols=len(kinds), fontsize=8.5, handlelength=1.1,
        borderaxespad=0.3,
    )  # fmt: skip
