"""What FAR's recipe shows: a picture of the token similarities, the model card, the lines on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from mixerzoo.significance import CHANGE, change_text
from mixerzoo_search.far.token_correlation import SiteSimilarity, pairs
from mixerzoo_search.report.palette import ACCENT, INK, LINE, SOFT, heat
from mixerzoo_search.report.pictures import DPI, PICTURE_STYLE, as_png

SHOWN = 3  # sites whose matrices are drawn
STEPS = ("start", "stage 1", "stage 2")
_COLOURS = {"start": SOFT, "stage 1": "#e69f00", "stage 2": ACCENT}
_MARKERS = {"start": "o", "stage 1": "s", "stage 2": "D"}
_HEAT = LinearSegmentedColormap.from_list("mixerzoo", [heat(share) for share in np.linspace(0, 1, 32)])


def far_picture(result: Mapping[str, Any], sites: Mapping[str, SiteSimilarity]) -> bytes:
    """Return the token similarities of teacher and student at a few sites and the correlation at all, as PNG."""
    names = list(sites)
    shown = [names[at] for at in sorted({round(x) for x in np.linspace(0, len(names) - 1, SHOWN)})]
    with rc_context(PICTURE_STYLE):
        width, height = 2.35 * len(shown) + 4.9, 5.4
        figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
        FigureCanvasAgg(figure)
        outer = figure.add_gridspec(
            1, 2, width_ratios=[2.35 * len(shown), 4.2], wspace=0.2, left=0.075, right=0.98,
            top=1 - 1.0 / height, bottom=0.6 / height,
        )  # fmt: skip
        figure.text(0.02, 1 - 0.16 / height, _title(result), size=14, weight="bold", va="top")
        figure.text(0.02, 1 - 0.46 / height, _subtitle(result), color=SOFT, va="top")
        _matrices(figure, outer[0].subgridspec(2, len(shown), wspace=0.12, hspace=0.16), sites, shown)
        _correlations(figure.add_subplot(outer[1]), result, names)
        return as_png(figure)


def _title(result: Mapping[str, Any]) -> str:
    return f"{result['teacher']['name']}, all attention replaced by {result['settings']['mixer']}"


def _subtitle(result: Mapping[str, Any]) -> str:
    last = result["measured"]["stage 2"]
    parts = []
    if last["accuracy"] is not None:
        parts.append(f"accuracy {result['teacher']['accuracy']:.2%} → {last['accuracy']:.2%}")
    parts.append(f"agreement {last['agreement']:.2%}")
    return "   |   ".join([*parts, f"{result['images']['test']} test images"])


def _matrices(figure: Any, grid: Any, sites: Mapping[str, SiteSimilarity], shown: Sequence[str]) -> None:
    """Draw the teacher's matrices over the student's, both of a site on one scale."""
    for column, name in enumerate(shown):
        found = sites[name]
        entries = torch.cat([pairs(found.teacher), pairs(found.student)]).numpy()
        low, high = np.nanquantile(entries, [0.01, 0.99])
        for row, (who, matrix) in enumerate((("teacher", found.teacher), ("student", found.student))):
            axes = figure.add_subplot(grid[row, column])
            axes.imshow(
                matrix.numpy(), cmap=_HEAT, vmin=low, vmax=max(high, low + 1e-6), interpolation="nearest"
            )
            axes.set(xticks=[], yticks=[])
            for spine in axes.spines.values():
                spine.set(visible=True, color=LINE)
            if column == 0:
                axes.set_ylabel(who)
            if row == 0:
                axes.set_title(name, size=9, color=INK)
            else:
                axes.set_xlabel(f"cosine {low:.2f} to {high:.2f}", size=8, color=SOFT)


def _correlations(axes: Any, result: Mapping[str, Any], names: Sequence[str]) -> None:
    """Draw the correlation kept at every site, at the start and after each stage; per image, dashed."""
    places = range(len(names))
    for step in STEPS:
        rows = result["measured"][step]["sites"]
        for key, line, alpha in (("token_correlation", "-", 1.0), ("token_correlation_per_image", ":", 0.8)):
            values = [np.nan if rows[name][key] is None else rows[name][key] for name in names]
            axes.plot(
                places, values, ls=line, lw=1.4, alpha=alpha, color=_COLOURS[step], marker=_MARKERS[step],
                ms=5 if line == "-" else 3, markeredgecolor="white", markeredgewidth=0.6,
                label=step if line == "-" else None, zorder=3, clip_on=False,
            )  # fmt: skip
    axes.plot([], [], ls=":", color=SOFT, lw=1.4, label="of single images")
    axes.axhline(0, color=SOFT, lw=0.8)
    axes.set_ylim(min(0.0, axes.get_ylim()[0]), 1.0)
    every = max(1, -(-len(names) // 12))
    axes.set_xticks(list(places)[::every], [name.removeprefix("blocks.") for name in names[::every]])
    for label in axes.get_xticklabels():
        label.set(rotation=35, ha="right", rotation_mode="anchor", size=8.5, color=INK)
    axes.tick_params(length=0)
    axes.grid(True, axis="y")
    axes.set_axisbelow(True)
    axes.set_title("correlation of token similarities with the teacher's", size=9.5, color=INK, pad=26)
    axes.legend(
        loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, frameon=False, fontsize=8.5, handletextpad=0.4,
        columnspacing=1.2, borderaxespad=0.1,
    )  # fmt: skip


def model_card(result: Mapping[str, Any], data: str) -> str:
    """Return the README.md of `best/`."""
    teacher, student, last = result["teacher"], result["student"], result["measured"]["stage 2"]
    figures = [
        ("parameters", f"{teacher['params']:,}", f"{student['params']:,}"),
        ("accuracy", _percent(teacher["accuracy"]), _percent(last["accuracy"])),
        (CHANGE, "", _change(last)),
        ("agreement with the teacher", "", _percent(last["agreement"])),
        ("loss against the teacher", "", _figure(last["loss"])),
        ("token-to-token correlation", "", _figure(last["token_correlation"])),
    ]
    return "\n".join(
        [
            f"# {teacher['name']}, all attention replaced by {result['settings']['mixer']}",
            "",
            f"A student of `{teacher['name']}`, trained by mixerzoo on {result['images']['train']} images of "
            f"`{Path(data).name}` as FAR does ([arXiv 2505.21535](https://arxiv.org/abs/2505.21535)).",
            "",
            "| | teacher | student |",
            "|---|---|---|",
            *(f"| {name} | {before} | {after} |" for name, before, after in figures),
            "",
            "On images that nothing was trained or chosen on. Its latency was not measured.",
            "",
            "```python",
            "import mixerzoo",
            "",
            'student = mixerzoo.load("best")  # this folder; images (B, C, H, W) to the teacher\'s kind of output',
            "```",
            "",
            "| site | candidate |",
            "|---|---|",
            *(f"| `{site}` | `{candidate}` |" for site, candidate in student["plan"].items()),
            "",
        ]
    )


def closing_lines(result: Mapping[str, Any], path: Path) -> list[str]:
    """Return what the command line prints: the figures on test images step by step, and where everything is."""
    lines = [
        f"task loss   {result['task_loss']}",
        f"compared    {result['compared']}",
        "",
        f"{'test images':<12}{'accuracy':>10}{CHANGE:>26}{'agreement':>12}{'loss':>10}{'token correlation':>20}"
        f"{'per image':>12}",
        f"{'teacher':<12}{_percent(result['teacher']['accuracy']):>10}",
    ]
    for step in STEPS:
        row = result["measured"][step]
        lines.append(
            f"{step:<12}{_percent(row['accuracy']):>10}{_change(row):>26}{_percent(row['agreement']):>12}"
            f"{_figure(row['loss']):>10}{_figure(row['token_correlation']):>20}{_figure(row['token_correlation_per_image']):>12}"
        )
    seconds = sum(row["seconds"] for row in result["curve"])
    return [
        *lines,
        "",
        f"parameters  {result['teacher']['params']:,} -> {result['student']['params']:,}",
        f"trained     {len(result['curve'])} epochs of {result['images']['train']} images in {seconds:.0f} s",
        f"student     {path / 'best'}   (mixerzoo.load)",
        f"picture     {path / 'far.png'}",
    ]


def _change(row: Mapping[str, Any]) -> str:
    return change_text(row.get("change_low"), row.get("change_high"))


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
