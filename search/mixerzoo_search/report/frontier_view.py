"""What both pictures of a frontier have to agree on: ranges, labels, which plans are listed."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from mixerzoo.spec import KINDS
from mixerzoo_search.report.content import EvaluationRow, Report, SiteRow

LISTED_PLANS = 16


def ordered_sites(sites: Sequence[SiteRow]) -> list[SiteRow]:
    """Return attention sites, then mlp sites, then others; each in forward order."""
    rank: dict[str, int] = {kind: at for at, kind in enumerate(KINDS)}
    return sorted(sites, key=lambda site: rank.get(site.kind, len(rank)))


def site_label(site: SiteRow, kind_index: int) -> str:
    """Return a column heading: the first number in the site's name, else its position among its kind."""
    found = re.search(r"\d+", site.name)
    return found.group() if found else str(kind_index)


def site_labels(sites: Sequence[SiteRow]) -> list[str]:
    """Return the headings of `ordered_sites`; positions where numbers in the names would repeat."""
    labels: list[str] = []
    for kind in dict.fromkeys(site.kind for site in sites):
        group = [site for site in sites if site.kind == kind]
        names = [site_label(site, at) for at, site in enumerate(group)]
        labels += names if len(set(names)) == len(names) else [str(at) for at in range(len(names))]
    return labels


def listed_frontier(report: Report, most: int = LISTED_PLANS) -> list[EvaluationRow]:
    """Return up to `most` plans of the frontier, fastest first, the winner always among them."""
    rows = report.frontier()
    best = report.best
    if best is not None:  # once: it was timed again, so that its row may be another one
        others = [row for row in rows if (row.plan, row.source) != (best.plan, best.source)]
        rows = sorted([*others, best], key=lambda row: row.latency_ms)
    if len(rows) <= most:
        return rows
    kept = {round(at * (len(rows) - 1) / (most - 1)) for at in range(most)}
    if best is not None and rows.index(best) not in kept:
        near = min(kept - {0, len(rows) - 1}, key=lambda at: abs(at - rows.index(best)))
        kept = (kept - {near}) | {rows.index(best)}
    return [rows[at] for at in sorted(kept)]


def log_losses(report: Report) -> bool:
    """Return whether losses span so much that only a logarithmic axis shows them."""
    losses = [row.loss for row in report.evaluations if row.loss > 0 and math.isfinite(row.loss)]
    return len(losses) > 1 and max(losses) / min(losses) > 20


def latency_range(report: Report) -> tuple[float, float]:
    """Return the limits of the latency axis in ms, with the teacher, the budget and all students inside."""
    values = [row.latency_ms for row in report.evaluations if math.isfinite(row.latency_ms)]
    values += [report.teacher.latency_ms, report.budget_ms, *(x for x, _ in report.exact_line)]
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 0.05 * high
    return low - margin, high + margin


def loss_range(report: Report, log: bool) -> tuple[float, float]:
    """Return the limits of the loss axis: of what was measured, with room for the labels at the top."""
    rows = [*report.evaluations, *([] if report.best is None else [report.best])]
    losses = [row.loss for row in rows if math.isfinite(row.loss)]
    high = max(losses, default=1.0)
    if log:
        # A student that is all but the teacher should not stretch the axis over many empty decades.
        low = max(min(loss for loss in losses if loss > 0), high / 1e4)
        reach = math.log10(high / low)
        return low / 10 ** (0.08 * reach), high * 10 ** (0.16 * reach)
    low, high = min(0.0, *losses, 0.0), max(high, 1e-12)
    return low - 0.04 * (high - low), high + 0.16 * (high - low)


def shown_losses(rows: Sequence[EvaluationRow], bottom: float) -> list[float]:
    """Return the students' losses, those under the axis (0 on a logarithmic one) drawn at its lower end."""
    return [max(row.loss, bottom) for row in rows]
