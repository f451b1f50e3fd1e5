"""How latency and memory of a mixer grow with the number of tokens: forward passes of one sample, N 64 to 16,384."""

from __future__ import annotations

import math
import os
import re
from typing import Any

from rich.progress import track
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from mixer_parts.shapes import Shape, Skipped, build, fitting_rounds, prepare, reference_for
from mixerzoo.latency import REFERENCE, Run, measure
from mixerzoo.spec import MixerSpec

DIM, HEADS = 64, 2
SIDES = (8, 16, 32, 64, 128)  # of the square grid
QUICK_SIDES = (4, 8, 16)
STEEP = 1.2  # a slope above it is not linear
ATTENTION = "attention"
PATIENCE = 4.0  # exact attention is what all is measured against: it may take longer
ROUNDS = 9

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces every start and stop


def shape_of(side: int) -> Shape:
    """Return one sample with a square grid and no prefix."""
    return Shape(batch=1, tokens=side * side, dim=DIM, heads=HEADS, grid=(side, side))


def is_linear(cost: str) -> bool:
    """Say whether a spec's cost claims linear growth in N; a logarithm counts as none, of `min(a, b)` b counts."""
    cost = re.sub(r"min\([^,]*, ([^)]*)\)", r"\1", cost)
    return bool(cost) and re.search(r"N\^|sqrt|N N", cost) is None


def peak_bytes(run: Run) -> int:
    """Return the most memory that PyTorch held during a run beyond what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    kineto: Any = record.profiler
    events = [event for event in kineto.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def grow(specs: list[MixerSpec], quick: bool, rounds: int) -> list[dict[str, Any]]:
    """Measure exact attention, then every mixer, at every size that it can take."""
    sides = QUICK_SIDES if quick else SIDES
    rows: list[dict[str, Any]] = []
    for spec in track([None, *specs], description="growth", transient=True):
        runs: dict[int, tuple[Run, float]] = {}
        memory: dict[int, int] = {}
        skipped: dict[int, str] = {}
        for side in sides:
            shape = shape_of(side)
            try:
                module = reference_for(specs[0], shape) if spec is None else build(spec, shape)
                runs[side**2] = prepare("forward", module, shape.example(), 1 if spec else PATIENCE)
            except Skipped as reason:
                skipped[side**2] = str(reason)
                continue
            memory[side**2] = peak_bytes(runs[side**2][0])
        rows.append(
            {
                "mixer": ATTENTION if spec is None else spec.name,
                "family": ATTENTION if spec is None else spec.family,
                "cost": "N D^2 + N^2 D" if spec is None else spec.cost,
                "ms": _latencies(runs, min(rounds, ROUNDS)),
                "peak_bytes": memory,
                "skipped": skipped,
            }
        )
    for row in rows:
        first, last = sides[-3] ** 2, sides[-1] ** 2
        row["slope"] = slope(row["ms"], first, last)
        row["memory_slope"] = slope(row["peak_bytes"], first, last)
        slopes = (row["slope"], row["memory_slope"])
        row["steep"] = is_linear(row["cost"]) and any(s is not None and s > STEEP for s in slopes)
    return rows


def _latencies(runs: dict[int, tuple[Run, float]], rounds: int) -> dict[int, float]:
    """Time the sizes in the same rounds, beside one in the middle: so a drift of the machine does not bend the line."""
    if not runs:
        return {}
    base = sorted(runs)[len(runs) // 2]
    subjects = {REFERENCE: runs[base][0]} | {str(n): run for n, (run, _) in runs.items() if n != base}
    once = 2 * runs[base][1] + sum(seconds for _, seconds in runs.values())
    timings = measure(subjects, rounds=fitting_rounds(rounds, once))
    return {n: timings[REFERENCE if n == base else str(n)].median for n in runs}


def slope(figures: dict[int, float] | dict[int, int], first: int, last: int) -> float | None:
    """Return the slope between two sizes on a log-log scale, or None where one is lacking."""
    if not figures.get(first) or not figures.get(last):
        return None
    return math.log(figures[last] / figures[first]) / math.log(last / first)


def table(rows: list[dict[str, Any]], figure: str) -> Table:
    """Return `ms` or `peak_bytes` at every size, with the slope; red where it should be linear and is not."""
    title, of, unit = {
        "ms": ("one forward pass, ms", "slope", 1),
        "peak_bytes": ("peak memory of one forward pass, MiB", "memory_slope", 2**20),
    }[figure]
    sizes = sorted({n for row in rows for n in (*row["ms"], *row["skipped"])})
    grown = Table(title=f"growth: {title} (1 x N x {DIM}, {HEADS} heads)")
    grown.add_column("mixer", no_wrap=True)
    for heading in (*(f"N = {n:,}" for n in sizes), f"slope from {sizes[-3]:,}"):
        grown.add_column(heading, justify="right")
    for row in rows:
        cells = [f"{row[figure][n] / unit:.3g}" if n in row[figure] else "[dim]-" for n in sizes]
        found = row[of]
        steep = found is not None and found > STEEP and is_linear(row["cost"])
        grown.add_row(row["mixer"], *cells, "[dim]-" if found is None else f"{'[red]' * steep}{found:.2f}")
    return grown
