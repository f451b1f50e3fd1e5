"""Search: the sampler beside others where the optimum is known and where it is not, and the exact solver."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import click
from common import json_option, quick_option
from rich.console import Console
from search_parts import regret, solver
from sections import Section

from mixerzoo.latency import threads

PARTS = ("table", "hypervolume", "solver")
SEEDS, QUICK_SEEDS = 20, 2
VOLUME_SEEDS, VOLUME_EVALUATIONS = 5, 100
QUICK_VOLUME_SEEDS, QUICK_VOLUME_EVALUATIONS = 1, 20
FILE_WIDTH = 160  # of the tables, where they do not go to a terminal


def _shares(text: str) -> tuple[float, ...]:
    """Return comma-separated numbers between 0 and 1."""
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or not all(0 < share < 1 for share in found):
        raise click.BadParameter(
            f"'{text}': give numbers between 0 and 1, as in .2,.5", param_hint="--budgets"
        )
    return found


@click.command()
@click.option("--parts", default=",".join(PARTS), show_default=True)
@click.option("--seeds", type=int, help="table: runs of each method.  [default: 20; 2 with --quick]")
@click.option("--methods", default="", help="table: some of the methods.  [default: all]")
@click.option(
    "--budgets",
    default=",".join(map(str, regret.BUDGETS)),
    show_default=True,
    help="table: shares of the way from the fastest plan to the teacher.",
)
@click.option("--picture", type=click.Path(path_type=Path), help="table: draw the regret curves here.")
@click.option(
    "--cache", type=click.Path(path_type=Path), default=Path(".data"), show_default=True, help="Kept files."
)
@click.option(
    "--processes", type=int, default=lambda: os.cpu_count() or 1, help="table: at once.  [default: all cores]"
)
@click.option("--again", is_flag=True, help="Measure again what the JSON holds already.")
@json_option
@quick_option
def main(
    parts: str,
    seeds: int | None,
    methods: str,
    budgets: str,
    picture: Path | None,
    cache: Path,
    processes: int,
    again: bool,
    json_path: Path | None,
    quick: bool,
) -> None:
    """Run the benchmark; what the JSON holds already, with the same settings, is kept. Exit code 1: a bar is missed."""
    chosen = _chosen(parts, PARTS, "--parts")
    names = _chosen(methods, regret.METHODS, "--methods") if methods else regret.METHODS
    shares = _shares(budgets)
    runs = seeds or (QUICK_SEEDS if quick else SEEDS)
    console = Console(width=None if sys.stdout.isatty() else FILE_WIDTH)

    def section(part: str, **settings: object) -> Section:
        return Section(json_path, "digits_vit", part, {**settings, "quick": quick}, 1, again=again)

    def run_table() -> bool:
        found = section("table", seeds=runs)
        met = regret.measure(found, console, seeds=runs, processes=processes, methods=names, budgets=shares)
        if picture:
            regret.draw(found.rows, picture, runs, shares)
        return met

    def run_hypervolume() -> bool:
        from search_parts import hypervolume

        evaluations = QUICK_VOLUME_EVALUATIONS if quick else VOLUME_EVALUATIONS
        found = section("hypervolume", evaluations=evaluations)
        return hypervolume.measure(
            found,
            console,
            cache=cache,
            evaluations=evaluations,
            seeds=QUICK_VOLUME_SEEDS if quick else VOLUME_SEEDS,
        )

    def run_solver() -> bool:
        return solver.measure(section("solver"), console, seed=0)

    run: dict[str, Callable[[], bool]] = {
        "table": run_table,
        "hypervolume": run_hypervolume,
        "solver": run_solver,
    }
    met = True
    with threads(1):
        for part in chosen:
            console.rule(part)
            met &= run[part]()
    sys.exit(0 if met or quick else 1)


def _chosen(text: str, known: tuple[str, ...], flag: str) -> tuple[str, ...]:
    """Return the names in a comma-separated list, in the order of the known ones."""
    names = {name.strip() for name in text.split(",")}
    if unknown := sorted(names - set(known)):
        raise click.BadParameter(f"unknown: {unknown[0]}; known: {', '.join(known)}", param_hint=flag)
    return tuple(name for name in known if name in names)


if __name__ == "__main__":
    main()
