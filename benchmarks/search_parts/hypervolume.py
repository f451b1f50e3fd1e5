"""Part `hypervolume`: the front of loss and latency in the embedded teacher's full space, beside Optuna's samplers.

The loss of every plan is that of the stitched student on validation images. Its latency is predicted, for all samplers
alike, by changes measured one candidate at a time and corrected on random students: it would take hours to measure.
Every evaluation is kept, so that the same command goes on, and a plan that two samplers find is evaluated once.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from sections import Section
from sections import table as print_table

from mixerzoo.files import read_json, write_json
from mixerzoo.latency import Conditions, measure_table
from mixerzoo.opening import open_teacher
from mixerzoo.plan import KEEP, Candidate, Plan
from mixerzoo_search.additive import AdditiveModel
from mixerzoo_search.pareto import hypervolume
from search_parts.samplers import OTHERS_OF_TWO as OTHERS
from search_parts.samplers import exact_plans, ours, run
from search_parts.space import CpuStopwatch, Space

ATTENTION = (
    KEEP, "none@1", "linear@1", "pool@1", "static@0.25", "static@1", "linear_attention@0.5", "linear_attention@1",
    "token_mlp@0.25", "dwconv@0.5", "fewer_heads@0.25",
)  # fmt: skip
MLP = (
    KEEP,
    "none@1",
    *(f"mlp_slice@{width:g}" for width in (0.0625, 0.125, 0.1875, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)),
)
IMAGES = 96
FIT_PLANS = 12
SWEEP = 8  # exact plans that ours begins with, the fastest included
MIXERZOO = "mixerzoo"
METHODS = (MIXERZOO, *OTHERS)


class Evaluations:
    """True losses of plans, kept one file a plan: any number of processes may add to them."""

    def __init__(self, space: Space, folder: Path) -> None:
        self._space, self._folder = space, folder
        self.judge = space.judge()

    def loss(self, plan: Mapping[str, str]) -> float:
        """Return the loss of a plan, evaluated now or before."""
        name = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()[:24]
        path = self._folder / f"{name}.json"
        if not path.exists():
            loss = self.judge.evaluate_modules(self._space.modules(plan)).loss
            write_json(path, {"plan": dict(plan), "loss": loss})
        return float(read_json(path)["loss"])


def measure(section: Section, console: Console, *, cache: Path, evaluations: int, seeds: int) -> bool:
    """Run what is missing, print the hypervolumes and their ratios, and say whether ours is the largest everywhere."""
    names = {
        site.name: ATTENTION if site.kind == "attention" else MLP for site in open_teacher("digits_vit").sites
    }
    space = Space(names, cache / "hypervolume", images=IMAGES, processes=os.cpu_count() or 1)
    judged = Evaluations(space, cache / "hypervolume" / "evaluations")
    model = _model(space, judged, cache / "hypervolume")
    constant = judged.judge.constant_loss()

    def truth(plan: Mapping[str, str]) -> tuple[float, float]:
        return judged.loss(plan), _predicted(model, plan)

    fastest = model.predict_ms(model.fastest())
    budgets = np.linspace(fastest, model.base_ms, SWEEP + 1)[:-1].tolist()
    for seed in range(seeds):
        for method in METHODS:
            key = f"{method} {seed}"
            if key in section.rows:
                continue
            sampler = ours(model, None, None, seed) if method == MIXERZOO else OTHERS[method](seed)
            first = exact_plans(model, budgets) if method == MIXERZOO else []
            points = run(sampler, names, truth, evaluations=evaluations, budget_ms=None, seeds=first)
            area = hypervolume([(ms, loss) for loss, ms in points], (model.base_ms, constant))
            section.rows[key] = {"hypervolume": area, "evaluations": len(points)}
            section.save(reference={"ms": model.base_ms, "loss": constant})
            console.print(f"{key}: {area:.4f}", highlight=False)
    return _report(section, console, seeds)


def _report(section: Section, console: Console, seeds: int) -> bool:
    ratios: dict[str, list[float]] = {
        method: [
            section.rows[f"{MIXERZOO} {seed}"]["hypervolume"]
            / max(section.rows[f"{method} {seed}"]["hypervolume"], 1e-12)
            for seed in range(seeds)
        ]
        for method in OTHERS
    }
    section.save(ratios=ratios)
    lines = [[method, *(f"{ratio:.3f}" for ratio in row)] for method, row in ratios.items()]
    columns = ["hypervolume over that of", *(f"seed {seed}" for seed in range(seeds))]
    print_table(console, "mixerzoo's sampler and Optuna's", columns, lines)
    return all(ratio > 1 for row in ratios.values() for ratio in row)


def _model(space: Space, judged: Evaluations, folder: Path) -> AdditiveModel:
    """Return scores, latencies and the correction, measured once."""
    path = folder / "latency.json"
    if not path.exists():
        watch = CpuStopwatch(space.teacher, Conditions(threads=1))
        rows = {site: [Candidate.parse(c) for c in row if c != KEEP] for site, row in space.names.items()}
        table = measure_table(watch, rows)
        rng = np.random.default_rng(0)
        plans = [
            {
                site: row[int(rng.integers(1, len(row)))] if rng.random() < share else KEEP
                for site, row in space.names.items()
            }
            for share in rng.random(FIT_PLANS)
        ]
        timings = watch.time({str(at): space.student(plan) for at, plan in enumerate(plans)})
        ms = [table.base_ms * timings[str(at)].ratio for at in range(len(plans))]
        write_json(
            path, {"base_ms": table.base_ms, "change_ms": table.change_ms, "plans": plans, "measured_ms": ms}
        )
    stored: dict[str, Any] = read_json(path)
    rows = {
        site: {
            Candidate.parse(c): (judged.loss({site: c}), stored["change_ms"][site][c])
            for c in row
            if c != KEEP
        }
        for site, row in space.names.items()
    }
    model = AdditiveModel.from_scores(rows, base_ms=stored["base_ms"])
    raw = [_predicted(model, plan) for plan in stored["plans"]]
    return model.calibrated(raw, stored["measured_ms"])


def _predicted(model: AdditiveModel, plan: Mapping[str, str]) -> float:
    return model.predict_ms(Plan.from_json(dict(plan)))
