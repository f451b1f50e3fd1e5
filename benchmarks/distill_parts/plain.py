"""Part `plain`: a candidate in closed form beside the plain way to train it.

The plain way: each candidate alone, a random start, the teacher run live up to the site for each batch, AdamW on
the error until the held-out NMSE is that of the closed form, or for 500 steps. Checks are not in its time, nor is
the preparation of images in either's. A closed form is charged for its share of the capture of all sites.
"""

from __future__ import annotations

import math
import time
from contextlib import suppress
from typing import Any

import torch
from rich.console import Console
from sections import Section, Settings, table, verdict
from subjects import Subject, median, spread_sites, widest
from torch import nn

from mixerzoo.capture import SiteCapture
from mixerzoo.distill import Recipe, distill
from mixerzoo.pairs import BATCH, evaluate, held_out_rows, spread
from mixerzoo.plan import Candidate
from mixerzoo.registry import get_registry
from mixerzoo.spec import Site

DEPTHS = (0.1, 0.35, 0.6, 0.85)  # of the four sites
COMPARED = 6  # mixers
STEPS, CHECK_EVERY, LR = 500, 25, 1e-3
QUICK_STEPS = 50
BAR = 20.0


def run(subject: Subject, settings: Settings, section: Section, console: Console) -> None:
    """Measure every pair of site and mixer that the file does not have yet."""
    depths, mixers = (
        (DEPTHS[:1], settings.mixers[:2]) if settings.quick else (DEPTHS, settings.mixers[:COMPARED])
    )
    sites = spread_sites(subject.attention, depths)
    pairs = [(site, widest(name)) for name in mixers for site in sites]
    todo = [(site, candidate) for site, candidate in pairs if f"{site.name} {candidate}" not in section.rows]
    if todo:
        subject.batches  # noqa: B018  prepared before the clock runs
        began = time.perf_counter()
        captured = subject.capture()
        section.content.setdefault("captures_s", []).append(round(time.perf_counter() - began, 3))
    for site, candidate in todo:
        section.rows[f"{site.name} {candidate}"] = _compare(
            subject, site, candidate, captured.sites[site.name], settings
        )
        section.save()
        console.print(
            _line(f"{site.name} {candidate}", section.rows[f"{site.name} {candidate}"]), highlight=False
        )
    _summarise(section, len(pairs), console)


def _compare(
    subject: Subject, site: Site, candidate: Candidate, captured: SiteCapture, settings: Settings
) -> dict[str, Any]:
    """Time both ways; the closed form before and after the plain one, which takes minutes."""
    spec = get_registry().mixers.get(candidate.mixer)
    with torch.no_grad():
        spec.make(site, candidate.width)(captured.x[:BATCH].float())  # what is only done once is not timed
    recipe = Recipe(seed=settings.seed)
    ours = [distill(spec, candidate.width, site, captured, recipe)]
    if ours[0].failed:
        return {"failed": ours[0].failed}
    plain = train_plainly(subject, site, candidate, captured, ours[0].nmse, settings)
    ours.append(distill(spec, candidate.width, site, captured, recipe))
    return {"closed_s": median([one.seconds for one in ours]), "nmse": round(ours[0].nmse, 5), "plain": plain}


def train_plainly(
    subject: Subject,
    site: Site,
    candidate: Candidate,
    captured: SiteCapture,
    target: float,
    settings: Settings,
) -> dict[str, Any]:
    """Train until the held-out NMSE is at most `target`; returns the steps, their seconds and the lowest NMSE."""
    most = QUICK_STEPS if settings.quick else STEPS
    torch.manual_seed(settings.seed)
    mixer = get_registry().mixers.get(candidate.mixer).make(site, candidate.width)
    if not list(mixer.parameters()):
        return {"failed": "it has nothing to train"}
    optimizer = torch.optim.AdamW(mixer.parameters(), lr=LR, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LR, total_steps=most, pct_start=0.2)
    train, _ = held_out_rows(len(captured.x))
    size = spread(captured, train) / captured.y[train].numel()
    images = torch.cat(subject.batches)[train]
    best, steps, live_steps, live_s = evaluate(mixer.eval(), captured), 0, 0, 0.0
    with LiveSite(subject.teacher.model, site) as live:
        while steps < most and best > target:
            mixer.train()
            runs_live = steps % settings.live_every == 0
            began = time.perf_counter()
            rows = torch.randint(train.stop, (BATCH,))
            x, y = (
                live.pairs(images[rows])
                if runs_live
                else (captured.x[rows].float(), captured.y[rows].float())
            )
            loss = (mixer(x) - y).square().mean() / size
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(mixer.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if runs_live:
                live_s += time.perf_counter() - began
                live_steps += 1
            steps += 1
            if steps % CHECK_EVERY == 0 or steps == most:
                best = min(best, evaluate(mixer.eval(), captured))
    return {
        "seconds": round(live_s * steps / max(live_steps, 1), 3),
        "timed_steps": live_steps,
        "steps": steps,
        "nmse": round(best, 5),
        "reached": best <= target,
    }


class _Seen(Exception):
    """Ends the teacher's pass behind the site."""


class LiveSite:
    """The teacher's inputs and outputs at a site, of images as they come, during a `with` block."""

    def __init__(self, model: nn.Module, site: Site) -> None:
        self.model, self.module = model, model.get_submodule(site.name)
        self._seen: tuple[torch.Tensor, torch.Tensor] | None = None

    def __enter__(self) -> LiveSite:
        self._handle = self.module.register_forward_hook(self._record)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    def _record(self, _module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        self._seen = args[0], output
        raise _Seen

    @torch.no_grad()
    def pairs(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the teacher on images (B, C, H, W) as far as the site; returns its x and y (B, N, D)."""
        with suppress(_Seen):
            self.model(images)
        assert self._seen is not None
        return self._seen


def _ratio(row: dict[str, Any], share_s: float) -> float:
    return float(row["plain"]["seconds"] / (row["closed_s"] + share_s))


def _line(name: str, row: dict[str, Any]) -> str:
    if "failed" in row or "failed" in row["plain"]:
        return f"{name}: {row.get('failed') or row['plain']['failed']}"
    plain = row["plain"]
    return (
        f"{name}: closed form {row['closed_s']:.2f} s to {row['nmse']:.3f}; "
        f"plain {plain['seconds']:.0f} s, {plain['steps']} steps to {plain['nmse']:.3f}"
    )


def _summarise(section: Section, pairs: int, console: Console) -> None:
    share_s = median(section.content["captures_s"]) / pairs
    rows = {
        name: row
        for name, row in section.rows.items()
        if "failed" not in row and "failed" not in row["plain"]
    }
    if not rows:
        return
    ratios = [_ratio(row, share_s) for row in rows.values()]
    ours_s = sum(row["closed_s"] + share_s for row in rows.values())
    summary = {
        "pairs": len(rows),
        "failed": len(section.rows) - len(rows),
        "capture_share_s": round(share_s, 4),
        "ratio_of_totals": round(sum(row["plain"]["seconds"] for row in rows.values()) / ours_s, 2),
        "ratio_geometric_mean": round(math.exp(sum(map(math.log, ratios)) / len(ratios)), 2),
        "ratio_lowest": round(min(ratios), 2),
        "nmse_mean": round(sum(row["nmse"] for row in rows.values()) / len(rows), 4),
        "plain_nmse_mean": round(sum(row["plain"]["nmse"] for row in rows.values()) / len(rows), 4),
        "plain_reached": sum(row["plain"]["reached"] for row in rows.values()),
    }
    table(
        console,
        "closed form beside the plain way",
        ("site and candidate", "closed form + share, s", "NMSE", "plain, s", "steps", "NMSE", "ratio"),
        [
            (
                name,
                f"{row['closed_s'] + share_s:.2f}",
                f"{row['nmse']:.3f}",
                f"{row['plain']['seconds']:.0f}",
                str(row["plain"]["steps"]),
                f"{row['plain']['nmse']:.3f}",
                f"{_ratio(row, share_s):.0f}x",
            )
            for name, row in rows.items()
        ],
    )
    console.print(
        f"geometric mean {summary['ratio_geometric_mean']:.3g}x, lowest {summary['ratio_lowest']:.3g}x; "
        f"the plain way came as far in {summary['plain_reached']} of {len(rows)}",
        highlight=False,
    )
    met = verdict(console, "plain over ours, all seconds", summary["ratio_of_totals"], BAR, least=True)
    met &= verdict(
        console, "mean NMSE of ours, over the plain way's", summary["nmse_mean"], summary["plain_nmse_mean"]
    )
    section.save(summary=summary | {"met": met and len(rows) == pairs})
