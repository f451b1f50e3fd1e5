"""Numbers as people read them."""

from __future__ import annotations

import math


def ms(value: float | None) -> str:
    """Return a latency with three significant digits, such as `4.87 ms`."""
    if value is None or not math.isfinite(value):
        return "–"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 0.1 else 3
    return f"{value:.{digits}f} ms"


def percent(share: float | None) -> str:
    """Return a fraction as a percentage with one decimal, `–` where there is none."""
    return "–" if share is None or not math.isfinite(share) else f"{100 * share:.1f} %"


def short(value: float | None) -> str:
    """Return any number with three significant digits."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def count(value: float | None) -> str:
    """Return a number of parameters, such as `22.1 M`."""
    if value is None:
        return "–"
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.3g} {name}"
    return f"{value:.0f}"


def seconds(value: float) -> str:
    """Return a duration, such as `42 s`, `3 min 05 s` or `2 h 10 min`."""
    if value < 1:
        return f"{value:.2f} s"
    if value < 10:
        return f"{value:.1f} s"
    if value < 59.5:
        return f"{value:.0f} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
