"""Part `table`: regret on the tabular benchmark, where the optimum is known."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from sections import Section, verdict
from sections import table as print_table
from table import PRIORS, Table, load_table

from search_parts.samplers import OTHERS, exact_plans, ours, run

EVALUATIONS = (8, 16, 32, 64)
FOUND_WITHIN = 32
FOUND = 0.9
SAVED = 5  # runs after which the figures are written
BUDGETS = (0.2, 0.35, 0.5)  # of the way from the fastest plan to the teacher
EXACT = "exact"
MIXERZOO = "mixerzoo"
ABLATION = ("mixerzoo-off", "mixerzoo-shuffled")
UNSCORED = tuple(f"unscored-{kind}" for kind in PRIORS)  # a prior from statistics, and no model
METHODS = (MIXERZOO, *ABLATION, *UNSCORED, EXACT, "additive", *OTHERS)


@cache
def _table() -> Table:
    return load_table()


def budget_of(table: Table, share: float) -> float:
    """Return the budget in ms at a share of the way from the fastest plan to the teacher."""
    fastest = float(table.ms.min())
    return fastest + share * (table.teacher_ms - fastest)


def trajectory(method: str, share: float, seed: int) -> list[float | None]:
    """Return the best loss within the budget after each evaluation, None where there is none yet."""
    table = _table()
    budget = budget_of(table, share)
    model = table.model()
    space = dict(zip(table.sites, table.candidates, strict=True))
    most = max(EVALUATIONS)

    def truth(plan: Mapping[str, str]) -> tuple[float, float]:
        at = table.at(plan)
        return float(table.loss[at]), float(table.ms[at])

    if method == EXACT:
        results = [truth(plan) for plan in exact_plans(model, [budget])]
    elif method == "additive":
        results = [truth(plan) for plan in _by_prediction(table, budget)[:most]]
    elif method in OTHERS:
        results = run(OTHERS[method](seed), space, truth, evaluations=most, budget_ms=budget)
    else:
        name, _, kind = method.partition("-")
        scored = name == MIXERZOO
        prior = table.prior(kind or "on", scored=scored, seed=seed)
        sampler = ours(model if scored else None, prior, budget if scored else None, seed)
        results = run(sampler, space, truth, evaluations=most, budget_ms=budget)
    best: float | None = None
    found: list[float | None] = []
    for at in range(most):
        if at < len(results) and results[at][1] <= budget and (best is None or results[at][0] < best):
            best = results[at][0]
        found.append(best)
    return found


def _by_prediction(table: Table, budget: float) -> list[dict[str, str]]:
    """Return the plans that are predicted within the budget, by predicted loss."""
    loss, ms = (predicted.ravel() for predicted in table.predictions())
    order = [int(at) for at in np.argsort(loss, kind="stable") if ms[at] <= budget]
    places = [np.unravel_index(at, table.loss.shape) for at in order]
    return [
        {site: row[int(to)] for site, row, to in zip(table.sites, table.candidates, place, strict=True)}
        for place in places
    ]


def measure(
    section: Section,
    console: Console,
    *,
    seeds: int,
    processes: int,
    methods: tuple[str, ...] = METHODS,
    budgets: tuple[float, ...] = BUDGETS,
) -> bool:
    """Run what is missing, print the figures, and say whether the bars are met."""
    wanted = [
        (method, share, seed)
        for method in methods
        for share in budgets
        for seed in range(1 if method in (EXACT, "additive") else seeds)
    ]
    todo = [one for one in wanted if _key(*one) not in section.rows]
    with ExitStack() as stack:
        found = map(_task, todo)
        if processes > 1:
            found = stack.enter_context(ProcessPoolExecutor(processes)).map(_task, todo)
        for done, (one, best) in enumerate(zip(todo, found, strict=True)):
            section.rows[_key(*one)] = best
            if done % SAVED == 0:
                section.save()
    figures = summary(section.rows, _table(), seeds, methods, budgets)
    section.save(**figures)
    return report(figures, console)


def _task(one: tuple[str, float, int]) -> list[float | None]:
    return trajectory(*one)


def _key(method: str, share: float, seed: int) -> str:
    return f"{method} {share:g} {seed}"


def summary(
    rows: Mapping[str, list[float | None]],
    table: Table,
    seeds: int,
    methods: tuple[str, ...],
    budgets: tuple[float, ...] = BUDGETS,
) -> dict[str, Any]:
    """Return median regrets by method, budget and evaluations, and how often the optimum was found."""
    regrets: dict[str, dict[str, dict[str, float | None]]] = {}
    found: dict[str, dict[str, float]] = {}
    counts: dict[str, int] = {}
    for method in methods:
        for share in budgets:
            best = table.best(budget_of(table, share))
            runs = [rows[key] for seed in range(seeds) if (key := _key(method, share, seed)) in rows]
            counts[method] = min(counts.get(method, seeds), len(runs))
            regret = [[np.inf if loss is None else loss - best for loss in run] for run in runs]
            regrets.setdefault(method, {})[f"{share:g}"] = {
                str(count): _finite(statistics.median(run[count - 1] for run in regret))
                for count in EVALUATIONS
            }
            hits = [run[FOUND_WITHIN - 1] <= 1e-12 for run in regret]
            found.setdefault(method, {})[f"{share:g}"] = sum(hits) / len(hits)
    return {
        "optimum": {f"{share:g}": table.best(budget_of(table, share)) for share in budgets},
        "runs": counts,
        "median_regret": regrets,
        f"found_within_{FOUND_WITHIN}": found,
    }


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def report(figures: Mapping[str, Any], console: Console) -> bool:
    """Print the tables and the bars."""
    regrets, found = figures["median_regret"], figures[f"found_within_{FOUND_WITHIN}"]
    budgets = list(figures["optimum"])
    columns = ["method", *(f"{share}: {n}" for share in budgets for n in EVALUATIONS), "found in 32", "runs"]
    lines = []
    for method, by_budget in regrets.items():
        cells = [by_budget[share][str(n)] for share in budgets for n in EVALUATIONS]
        found_share = statistics.fmean(found[method].values())
        shown = ("-" if c is None else f"{1e3 * c:.3g}" for c in cells)
        lines.append([method, *shown, f"{found_share:.0%}", str(figures["runs"][method])])
    print_table(console, "median regret in millinats, by budget and evaluations", columns, lines)
    if MIXERZOO not in regrets:
        return True
    others = [method for method in regrets if method in OTHERS or method == EXACT]
    lost = [
        f"{method} at {share}, {n}"
        for method in others
        for share, row in regrets[method].items()
        for n, value in row.items()
        if not _below(regrets[MIXERZOO][share][n], value)
    ]
    for line in lost:
        console.print(f"[red]not below {line}[/red]", highlight=False)
    share = statistics.fmean(found[MIXERZOO].values())
    met = verdict(console, f"the optimum within {FOUND_WITHIN} evaluations", share, FOUND, least=True)
    return met and not lost


def _below(ours: float | None, theirs: float | None) -> bool:
    """Say whether a regret is below another one; a regret of 0 cannot be beaten."""
    if ours is None:
        return False
    return theirs is None or ours < theirs or ours <= 1e-12


def draw(
    rows: Mapping[str, list[float | None]], path: Path, seeds: int, budgets: tuple[float, ...] = BUDGETS
) -> None:
    """Draw the median regret over evaluations, one panel a budget."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    table = _table()
    figure, axes = plt.subplots(
        1, len(budgets), figsize=(4.2 * len(budgets), 3.6), sharey=True, squeeze=False
    )
    style: Callable[[str], dict[str, Any]] = lambda method: {  # noqa: E731
        "lw": 2.4 if method == MIXERZOO else 1.2,
        "ls": ":" if method in (EXACT, "additive") else "-",
    }
    for axis, share in zip(axes[0], budgets, strict=True):
        best = table.best(budget_of(table, share))
        for method in (MIXERZOO, EXACT, "additive", *OTHERS):
            runs = [rows[key] for seed in range(seeds) if (key := _key(method, share, seed)) in rows]
            if runs:
                regret = np.median([[np.inf if x is None else x - best for x in run] for run in runs], axis=0)
                shown = np.maximum(regret, 1e-6)
                axis.step(np.arange(1, len(shown) + 1), shown, where="post", label=method, **style(method))
        axis.set(
            yscale="log", xscale="log", xlabel="evaluations", title=f"budget {budget_of(table, share):.2f} ms"
        )
        axis.set_xticks([1, 2, 4, 8, 16, 32, 64], ["1", "2", "4", "8", "16", "32", "64"])
    axes[0][0].set_ylabel("median regret, nats (1e-6: the optimum)")
    axes[0][-1].legend(fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
