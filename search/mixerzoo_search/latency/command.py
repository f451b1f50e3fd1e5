"""`mixerzoo latency`. Heavy imports wait until the command runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mixerzoo.errors import MixerzooError
from mixerzoo_search.options import condition_options, model_options, numbers, words

if TYPE_CHECKING:
    from mixerzoo_search.latency.check import Check
    from mixerzoo_search.latency.table import Shown

WIDTH = 100  # of a table that does not go to a terminal


@click.command("latency")
@model_options
@condition_options
@click.option("--mixers", metavar="A,B", help="Mixers to show.  [default: all]")
@click.option("--widths", metavar="X,Y", help="Widths to show.  [default: all]")
@click.option(
    "--library",
    type=click.Path(path_type=Path),
    metavar="DIR",
    default=Path("runs/library"),
    show_default=True,
    help="Where the table is kept; searches that share the library take it.",
)
@click.option(
    "--measure/--stored",
    default=True,
    help="Measure what is missing, after a check that the rest still holds; or only show what is there.",
)
@click.option("--again", is_flag=True, help="Measure everything anew.")
@click.option(
    "--check",
    "plans",
    type=int,
    metavar="N",
    help="Assemble N random plans, time them, and compare them with the sums over their sites.",
)
@click.option("--seed", default=0, show_default=True, help="Of the random plans.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON and nothing else.")
@click.option("--quiet", is_flag=True, help="No progress.")
def latency_command(as_json: bool, **options: Any) -> None:
    """Show what every candidate takes at every site, beside the teacher's own module there.

    The table is kept in the library: a search under the same conditions measures nothing that is in it. Candidates are
    timed in place, at all sites of one shape at once, with fresh weights: latency depends on shapes.
    """
    shown, checked = _found(as_json=as_json, **options)
    if as_json:
        from mixerzoo_search.latency.table import to_json

        content = to_json(shown) | ({} if checked is None else {"check": checked.to_json()})
        click.echo(json.dumps(content, indent=2))
        return
    _print(shown)
    if checked is not None:
        _print_check(checked)


def _found(
    *,
    model: str,
    checkpoint: Path | None,
    mixers: str | None,
    widths: str | None,
    library: Path,
    measure: bool,
    again: bool,
    plans: int | None,
    seed: int,
    as_json: bool,
    quiet: bool,
    **conditions: Any,
) -> tuple[Shown, Check | None]:
    from mixerzoo.latency import Conditions, Stopwatch, check_device, default_threads, threads
    from mixerzoo.latency.store import LatencyFile
    from mixerzoo.library.folder import check_folder
    from mixerzoo.opening import open_teacher
    from mixerzoo.progress import Reporter
    from mixerzoo_search.candidates import list_candidates
    from mixerzoo_search.latency.check import LEAST, check_table
    from mixerzoo_search.latency.table import show
    from mixerzoo_search.timing import demand_candidates

    given, chosen = words(mixers), numbers(widths)
    if not measure and (again or plans is not None):
        raise MixerzooError("--stored measures nothing; leave out --again and --check, or --stored")
    if plans is not None and plans < LEAST:
        raise MixerzooError(f"--check {plans}: give at least {LEAST} plans")
    conditions["threads"] = conditions["threads"] if conditions["threads"] is not None else default_threads()
    for name in ("threads", "batch_size"):
        if conditions[name] < 1:
            raise MixerzooError(f"--{name.replace('_', '-')} {conditions[name]}: give at least 1")
    check_device(conditions["device"], conditions["dtype"])
    if measure:
        check_folder(library)
    teacher = open_teacher(model, checkpoint)
    reporter = Reporter(quiet=quiet or as_json)
    with threads(conditions["threads"]):
        stopwatch = Stopwatch(teacher, Conditions(**conditions))
        candidates = list_candidates(teacher.sites, mixers=given, widths=chosen)
        demand_candidates(candidates, stopwatch.runtime)
        file = LatencyFile(library, stopwatch)
        shown = show(stopwatch, candidates, file, reporter=reporter, measure=measure, again=again)
        checked = None
        if plans is not None:
            checked = check_table(
                stopwatch, candidates, shown.table, plans=plans, seed=seed, reporter=reporter
            )
    return shown, checked


def _print(shown: Shown) -> None:
    from rich.console import Console
    from rich.table import Table

    from mixerzoo_search.latency.table import text_rows, unmeasured

    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    of = shown.conditions
    ms = "" if shown.teacher_ms is None else f"{shown.teacher_ms:.2f} ms  "
    where = f"batch {of.batch_size}, {of.threads} threads, {of.dtype}, {of.device}, {of.runtime}"
    click.echo(f"teacher  {shown.model}  {ms}{where}")
    for block in shown.blocks:
        own = (
            "" if block.own_ms is None else f": the teacher's own module takes {block.own_ms:.3f} ms at each"
        )
        click.echo(f"\n{block.shape}\n{len(block.sites)} sites, {block.sites[0]} the first{own}")
        header, *body = text_rows(block)
        if body:
            table = Table(box=None, pad_edge=False, header_style="bold")
            for number, name in enumerate(header):
                table.add_column(name, justify="right" if 0 < number < len(header) - 1 else "left")
            for row in body:
                table.add_row(*row)
            console.print(table)
        for line in unmeasured(block):
            click.echo(f"-  {line}")
    known = shown.known
    counts = [f"{known.reused} from the library", f"{known.measured} measured"]
    counts += [f"{known.missing} not known"] if known.missing else []
    click.echo(f"\ntable    {shown.file}  ({', '.join(counts)})")
    if known.drift:
        click.echo(f"measured anew: {known.drift}")


def _print_check(checked: Check) -> None:
    click.echo()
    for name, quality in (("sum over sites", checked.plain), ("corrected", checked.corrected)):
        click.echo(
            f"{name:<16} MAPE {quality.mape:.1%}, largest error {quality.max_error:.1%}, "
            f"Spearman {quality.spearman:.3f} on {quality.plans} random plans"
        )
    click.echo(
        f"correction       {checked.intercept_ms:+.3f} ms + {checked.slope:.3f} x sum, "
        f"fitted on {checked.fitted_on} other plans"
    )
