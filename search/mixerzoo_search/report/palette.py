"""Colours of reports: one per mixer and per source of a plan, told apart with any kind of colour vision."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from mixerzoo.plan import KEEP, Candidate
from mixerzoo_search.report.content import Report

INK, SOFT, LINE, CARD, PAGE = "#1b2430", "#5c6773", "#e3e6ea", "#ffffff", "#f6f7f9"
GOOD, BAD, ACCENT = "#007a5e", "#b84a00", "#0072b2"
KIND_COLOURS = {"attention": ACCENT, "mlp": "#e69f00"}
KEPT, REMOVED = "#e6e9ed", "#2f3640"

# Okabe and Ito's eight, then Paul Tol's muted set; letters in the cells back them up.
_CYCLE = (
    "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442",
    "#332288", "#999933", "#882255", "#44aa99", "#ddcc77", "#aa4499", "#117733", "#cc6677", "#88ccee",
)  # fmt: skip

# source -> (colour, plotly symbol, matplotlib marker)
_SOURCES: Mapping[str, tuple[str, str, str]] = {
    "exact": ("#0072b2", "diamond", "D"),
    "sampler": ("#56b4e9", "circle", "o"),
    "refit": ("#e69f00", "square", "s"),
    "finetuned": ("#d55e00", "triangle-up", "^"),
}
_OTHER_SOURCES = (
    ("#009e73", "cross", "P"),
    ("#cc79a7", "x", "X"),
    ("#999933", "triangle-down", "v"),
    ("#332288", "pentagon", "p"),
)


def mixer_colours(mixers: Iterable[str]) -> dict[str, str]:
    """Return a colour for each mixer; `keep` is pale, `none` is dark."""
    fixed = {KEEP: KEPT, "none": REMOVED}
    others = [mixer for mixer in dict.fromkeys(mixers) if mixer not in fixed]
    return fixed | {mixer: _CYCLE[at % len(_CYCLE)] for at, mixer in enumerate(others)}


def colours_of(report: Report) -> dict[str, str]:
    """Return a colour for each mixer of a report: those on its frontier first, since colours are fewer."""
    rows = [*report.frontier(), *([] if report.best is None else [report.best])]
    used = {Candidate.parse(choice).mixer for row in rows for choice in row.plan.values()}
    first = [mixer for mixer in report.mixers if mixer in used]
    return mixer_colours([*first, *sorted(used), *report.mixers])


def source_styles(sources: Iterable[str]) -> dict[str, tuple[str, str, str]]:
    """Return (colour, plotly symbol, matplotlib marker) for each source, well-known ones first."""
    present = set(sources)
    styles = {name: style for name, style in _SOURCES.items() if name in present}
    for at, name in enumerate(sorted(present - set(_SOURCES))):
        styles[name] = _OTHER_SOURCES[at % len(_OTHER_SOURCES)]
    return styles


def ink_on(colour: str) -> str:
    """Return the text colour that reads best on a background: dark or white."""

    def linear(channel: int) -> float:
        value = channel / 255
        return value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4

    red, green, blue = (linear(int(colour[at : at + 2], 16)) for at in (1, 3, 5))
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    return INK if luminance > 0.22 else "#ffffff"


def heat(share: float) -> str:
    """Return a colour from near white (0) to deep blue (1)."""
    share = min(max(share, 0.0), 1.0)
    stops = ((247, 250, 253), (158, 202, 225), (49, 130, 189), (8, 64, 124))
    place = share * (len(stops) - 1)
    at = min(int(place), len(stops) - 2)
    mixed = (a + (b - a) * (place - at) for a, b in zip(stops[at], stops[at + 1], strict=True))
    return "#" + "".join(f"{round(channel):02x}" for channel in mixed)
