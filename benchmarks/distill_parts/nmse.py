"""Part `nmse`: held-out NMSE at two layers, in closed form and after gradient steps from it."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from sections import Section, Settings, table, verdict
from subjects import Subject, spread_sites

from mixerzoo.capture import SiteCapture
from mixerzoo.distill import Recipe, distill
from mixerzoo.plan import Candidate
from mixerzoo.registry import get_registry
from mixerzoo.spec import Site

DEPTHS = (0.25, 0.67)  # layers 3 and 8 of 12
WIDTHS: dict[str, tuple[float, ...]] = {  # empty for all
    "static": (),
    "glu_mlp": (),
    "linear_attention": (),
    "multihead_lstm": (1.0,),
}
QUICK_STEPS = 10
# Of the better width, at blocks.3.attn and blocks.8.attn of DINOv2-S on MNIST.
BARS = {
    "static": (0.076, 0.097),
    "glu_mlp": (0.06, 0.09),
    "linear_attention": (0.12, 0.08),
    "multihead_lstm": (0.20, 0.20),
}


def run(subject: Subject, settings: Settings, section: Section, console: Console) -> None:
    """Distil every candidate that the file does not have yet."""
    sites = spread_sites(subject.attention, DEPTHS)
    names = list(WIDTHS)[:1] if settings.quick else list(WIDTHS)
    candidates = [
        Candidate(name, width)
        for name in names
        for width in WIDTHS[name] or get_registry().mixers.get(name).widths
    ]
    todo = [
        (site, candidate)
        for candidate in candidates
        for site in sites
        if f"{site.name} {candidate}" not in section.rows
    ]
    captured = subject.capture(sites) if todo else None
    for site, candidate in todo:
        assert captured is not None
        section.rows[f"{site.name} {candidate}"] = _distilled(
            site, candidate, captured.sites[site.name], settings
        )
        section.save()
    _print(section, sites, candidates, console)
    bars = BARS if settings.teacher == "dinov2" else {}
    met = {}
    for name, limits in bars.items():
        for site, limit in zip(sites, limits, strict=True):
            found = [
                row["nmse"]
                for candidate in candidates
                if candidate.mixer == name
                and "failed" not in (row := section.rows[f"{site.name} {candidate}"])
            ]
            if found:
                met[f"{site.name} {name}"] = verdict(console, f"{site.name} {name}", min(found), limit)
    section.save(met=met)


def _distilled(site: Site, candidate: Candidate, captured: SiteCapture, settings: Settings) -> dict[str, Any]:
    spec = get_registry().mixers.get(candidate.mixer)
    closed = distill(spec, candidate.width, site, captured, Recipe(seed=settings.seed))
    if closed.failed:
        return {"failed": closed.failed}
    steps = QUICK_STEPS if settings.quick else settings.steps
    recipe = Recipe(steps=steps, seed=settings.seed)
    stepped = distill(spec, candidate.width, site, captured, recipe, start=closed.state)
    better = closed if stepped.failed or stepped.nmse > closed.nmse else stepped
    return {
        "nmse_start": round(closed.nmse_start, 5),
        "nmse_closed": round(closed.nmse, 5),
        "nmse": round(better.nmse, 5),
        "closed_s": round(closed.seconds, 3),
        "steps": stepped.steps,
        "steps_s": round(stepped.seconds, 3),
        "steps_failed": stepped.failed,
    }


def _print(section: Section, sites: tuple[Site, ...], candidates: list[Candidate], console: Console) -> None:
    rows = []
    for site in sites:
        for candidate in candidates:
            row = section.rows[f"{site.name} {candidate}"]
            cells = (
                ["[red]failed", "", "", "", "", ""]
                if "failed" in row
                else [
                    f"{row['nmse_start']:.3f}",
                    f"{row['nmse_closed']:.4f}",
                    f"{row['closed_s']:.2f}",
                    f"{row['nmse']:.4f}",
                    str(row["steps"]),
                    f"{row['steps_s']:.1f}",
                ]
            )
            rows.append((f"{site.name} {candidate}", *cells))
    columns = ("site and candidate", "start", "closed form", "s", "after steps", "steps", "s")
    table(console, "held-out NMSE", columns, rows)
