"""Latency: how well sums over sites predict whole students in each runtime, and whether `met` can be believed."""

from __future__ import annotations

import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import numpy as np
from common import json_option, quick_option
from rich.console import Console
from sections import Section, table

import mixerzoo
from mixerzoo.errors import BudgetOutOfReachError, MixerzooError
from mixerzoo.files import read_json
from mixerzoo.latency import REFERENCE, Conditions, Stopwatch, default_threads, environment, threads
from mixerzoo.latency.store import LatencyFile
from mixerzoo.opening import open_teacher
from mixerzoo.progress import Reporter
from mixerzoo_search import search
from mixerzoo_search.candidates import list_candidates
from mixerzoo_search.evaluate import FINAL
from mixerzoo_search.latency.check import check_table
from mixerzoo_search.latency.table import show

RUNTIMES = ("eager", "inductor", "onnxruntime")
# To compile or export a student takes seconds to a minute: a few mixers of different kinds stand for all there.
FEW = ("static", "linear_attention", "glu_mlp", "pool", "none", "mlp_slice")
QUICK = ("static", "pool", "none", "mlp_slice")
PLANS, QUICK_PLANS, QUICK_FIT = 30, 6, 8
SEARCHES, QUICK_SEARCHES = 20, 3
FASTEST, SLOWEST = 0.45, 0.95  # shares of the teacher's latency that budgets are spread over
MAPE_BAR, SPEARMAN_BAR, OVER_BAR = 0.05, 0.95, 0.03
WIDTH = 140  # of the tables, where they do not go to a terminal


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the parts are told."""

    model: str
    runtimes: tuple[str, ...]
    mixers: tuple[str, ...]
    cache: Path
    plans: int
    searches: int
    trials: int
    threads: int
    seed: int
    quick: bool


def mixers_of(options: Options, runtime: str) -> tuple[str, ...]:
    """Return the mixers that are timed under a runtime; empty for all."""
    if options.mixers:
        return options.mixers
    if options.quick:
        return QUICK
    return () if runtime == "eager" else FEW


def error(options: Options, section: Section, console: Console) -> None:
    """Compare sums over sites with random students, runtime by runtime."""
    teacher = open_teacher(options.model)
    reporter = Reporter()
    for runtime in options.runtimes:
        if runtime not in section.rows:
            console.print(f"{runtime} ...")
            began = time.perf_counter()
            conditions = Conditions(runtime=runtime, threads=options.threads)
            stopwatch = Stopwatch(teacher, conditions)
            candidates = list_candidates(teacher.sites, mixers=mixers_of(options, runtime))
            file = LatencyFile(options.cache / "latency-library", stopwatch)
            shown = show(stopwatch, candidates, file, reporter=reporter, measure=True, again=False)
            table_s = time.perf_counter() - began
            found = check_table(
                stopwatch,
                candidates,
                shown.table,
                plans=options.plans,
                seed=options.seed,
                reporter=reporter,
                **({"fit": QUICK_FIT} if options.quick else {}),
            )
            section.rows[runtime] = found.to_json() | {
                "mixers": list(mixers_of(options, runtime)) or "all",
                "candidates": sum(map(len, shown.known.placed.values())),
                "reused": shown.known.reused,
                "failed": shown.known.failed,
                "teacher_ms": shown.teacher_ms,
                "table_s": round(table_s, 1),
                "check_s": round(time.perf_counter() - began - table_s, 1),
                "environment": environment(conditions),
            }
            section.save()
    done = {runtime: section.rows[runtime] for runtime in options.runtimes}
    section.save(
        bars={"mape": MAPE_BAR, "spearman": SPEARMAN_BAR},
        passed={
            runtime: bool(
                row["corrected"]["mape"] <= MAPE_BAR and row["corrected"]["spearman"] >= SPEARMAN_BAR
            )
            for runtime, row in done.items()
        },
    )
    rows = []
    for runtime, row in done.items():
        plain, better = row["plain"], row["corrected"]
        rows.append(
            (
                runtime,
                str(row["candidates"]),
                str(sum(map(len, row["failed"].values()))),
                *(f"{quality['mape']:.1%}" for quality in (plain, better)),
                *(f"{quality['max_error']:.1%}" for quality in (plain, better)),
                *(f"{quality['spearman']:.3f}" for quality in (plain, better)),
                "yes" if section.content["passed"][runtime] else "NO",
            )
        )
    columns = (
        "runtime",
        "candidates",
        "cannot run",
        "MAPE",
        "corrected",
        "largest",
        "corrected",
        "Spearman",
        "corrected",
    )
    table(console, f"{options.plans} random plans of {options.model}", (*columns, "within the bars"), rows)


def met(options: Options, section: Section, console: Console) -> None:
    """Search for many budgets on one library, and measure each winner afresh."""
    for share in np.linspace(FASTEST, SLOWEST, options.searches).round(3).tolist():
        budget = f"{100 * share:g}%"
        if budget in section.rows:
            continue
        folder = options.cache / "latency-met" / f"{options.seed}-{'quick-' if options.quick else ''}{budget}"
        try:
            result = search(
                options.model,
                budget=budget,
                out=folder / "run",
                library=options.cache / "latency-library",
                tracking_uri=f"sqlite:///{(options.cache / 'latency-met' / 'mlflow.db').resolve()}",
                mixers=options.mixers or (QUICK if options.quick else FEW),
                images=64 if options.quick else 256,
                trials=options.trials,
                distill_steps=0,
                finetune_minutes=0.0,
                threads=options.threads,
                seed=options.seed,
                quiet=True,
            )
        except BudgetOutOfReachError as unreachable:
            section.rows[budget] = {"met": False, "out_of_reach": str(unreachable)}
            section.save()
            continue
        row: dict[str, Any] = {
            "met": result.summary["met"],
            "share": share,
            "seconds": round(result.summary["wall_s"]["total"], 1),
            "latency": {name: result_of(result.path)[name] for name in ("reused", "measured")},
            "mape": result.summary["latency_model"]["mape"],
        }
        if result.summary["met"]:
            row |= {
                "reported": result.summary["best"]["latency_ms"] / result.summary["teacher"]["latency_ms"]
            }
            row |= measured_apart(options.model, result.best, options.threads)
            row["over"] = row["fresh"] / share - 1
        section.rows[budget] = row
        section.save()
        console.print(
            f"{budget}: {'met' if row['met'] else 'not met'}, {row.get('over', 0.0):+.1%} of the budget"
        )
    wrong = [budget for budget, row in section.rows.items() if row.get("over", 0.0) > OVER_BAR]
    section.save(bar={"over": OVER_BAR}, wrong=wrong, passed=not wrong)
    rows = []
    for budget, row in section.rows.items():
        cells = [f"{row[name]:.1%}" if name in row else "" for name in ("reported", "fresh", "error", "over")]
        rows.append((budget, "yes" if row["met"] else "no", *cells, f"{row.get('seconds', 0):g}"))
    table(
        console, "searches", ("budget", "met", "reported", "fresh", "±", "over the budget", "seconds"), rows
    )
    console.print(f"met, and more than {OVER_BAR:.0%} over: {', '.join(wrong) or 'none'}")


def result_of(run: Path) -> dict[str, Any]:
    """Return what a run says of its latency table."""
    found: dict[str, Any] = read_json(run / "latency.json")
    return found


def measured_apart(model: str, best: Path, count: int) -> dict[str, float]:
    """Time in a new process: what a search leaves behind in its own is not there where its student is used."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as other:
        return other.submit(measured_again, model, best, count).result()


def measured_again(model: str, best: Path, count: int) -> dict[str, float]:
    """Time a student beside its teacher, with as many threads."""
    teacher, student = open_teacher(model), mixerzoo.load(best)
    with threads(count):
        timings = Stopwatch(teacher, Conditions(threads=count)).time({"best": student}, rounds=FINAL)
    return {
        "fresh": timings["best"].ratio,
        "error": timings["best"].error,
        "teacher_ms": timings[REFERENCE].median,
    }


PARTS = {"error": error, "met": met}
DEPENDS = {"error": ("model", "mixers", "plans"), "met": ("model", "mixers", "searches", "trials")}


def _names(text: str, known: tuple[str, ...], flag: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if unknown := [name for name in names if name not in known]:
        raise click.BadParameter(f"unknown: {unknown[0]}; known: {', '.join(known)}", param_hint=flag)
    return names


@click.command()
@click.option("--parts", default=",".join(PARTS), show_default=True)
@click.option("--model", default="digits_vit", show_default=True)
@click.option("--runtimes", default=",".join(RUNTIMES), show_default=True, help="error: under which.")
@click.option("--mixers", default="", help="To time.  [default: all under eager, else a few of each kind]")
@click.option("--plans", default=PLANS, show_default=True, help="error: random plans.")
@click.option("--searches", default=SEARCHES, show_default=True, help="met: budgets.")
@click.option("--trials", default=8, show_default=True, help="met: true evaluations of each.")
@click.option("--threads", "count", type=int, default=default_threads, help="As many as there are cores.")
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--cache", type=click.Path(path_type=Path), default=Path(".data"), show_default=True, help="Kept files."
)
@click.option("--again", is_flag=True, help="Measure again what the JSON holds already.")
@json_option
@quick_option
def main(
    parts: str,
    model: str,
    runtimes: str,
    mixers: str,
    plans: int,
    searches: int,
    trials: int,
    count: int,
    seed: int,
    cache: Path,
    again: bool,
    json_path: Path | None,
    quick: bool,
) -> None:
    """Run the benchmark; what the JSON holds already, with the same settings, is kept."""
    options = Options(
        model=model,
        runtimes=_names(runtimes, RUNTIMES, "--runtimes"),
        mixers=tuple(name for name in mixers.split(",") if name),
        cache=cache,
        plans=min(plans, QUICK_PLANS) if quick else plans,
        searches=min(searches, QUICK_SEARCHES) if quick else searches,
        trials=min(trials, 3) if quick else trials,
        threads=count,
        seed=seed,
        quick=quick,
    )
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    values = vars(options)
    try:
        for part in _names(parts, tuple(PARTS), "--parts"):
            console.rule(part)
            settings = {name: values[name] for name in (*DEPENDS[part], "threads", "seed", "quick")}
            section = Section(json_path, model, part, settings, count, again=again)
            with threads(count):
                PARTS[part](options, section, console)
    except MixerzooError as mistake:
        raise click.ClickException(str(mistake)) from None


if __name__ == "__main__":
    main()
