"""`mixerzoo profile`: of a teacher, or of what a search knows of one. Heavy imports wait until the command runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from mixerzoo.errors import MixerzooError
from mixerzoo_search.options import command_line, common_options, memory_option

if TYPE_CHECKING:
    from mixerzoo_search.report import Profile

WITH_RUN = {"run", "out", "as_json", "quiet"}  # everything else a run has of its own


@click.command("profile")
@common_options
@click.option("--images", default=256, show_default=True, help="Images that the statistics are taken on.")
@memory_option
@click.option(
    "--library",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Predict the damage of the candidates in this library, too.",
)
@click.option(
    "--run",
    type=click.Path(path_type=Path),
    metavar="RUN",
    help="Measure nothing; show what the search in this run directory knows, finished or not.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder.  [default: profiles/<model>; with --run: RUN]"
)
@click.option("--json", "as_json", is_flag=True, help="Print the profile as JSON and nothing else.")
@click.option("--quiet", is_flag=True, help="No progress.")
def profile_command(run: Path | None, **options: Any) -> None:
    """Draw the attention statistics and the latency of every site, and what the prior makes of them.

    With --run it shows, for each candidate at each site, the damage that was predicted before any score, the one
    predicted from the scores of all others, the one that was measured, and how well they rank, mixer by mixer.
    """
    from mixerzoo_search.profile.measure import (
        damage_table,
        profile_json,
        profile_table,
        rank_table,
        write_profile,
    )

    if run is None:
        found, folder = _measured(**options), Path("profiles") / options["model"].replace("/", "-")
    else:
        _refuse_what_a_run_has(click.get_current_context())
        from mixerzoo_search.profile.of_run import profile_run

        found, folder = profile_run(run, command=command_line()), run
    folder = options["out"] or folder
    write_profile(folder, found)
    if options["as_json"]:
        click.echo(json.dumps(profile_json(found), indent=2))
        return
    _print(profile_table(found), left=1)
    if found.prior is not None and not found.prior.rows:
        click.echo(f"\nlibrary '{options['library']}' has no candidates of this teacher and data")
    elif found.prior is not None:
        click.echo()
        _print(damage_table(found.prior), left=3)
        if found.prior.overall.scores:
            click.echo()
            _print(rank_table(found.prior), left=1)
    click.echo(f"\nprofile  {folder / 'profile.html'}")


def _measured(
    *,
    model: str,
    checkpoint: Path | None,
    data: str,
    images: int,
    memory_limit: float,
    library: Path | None,
    out: Path | None,
    as_json: bool,
    quiet: bool,
    **measured: Any,
) -> Profile:
    from mixerzoo.latency import Conditions, check_device, default_threads
    from mixerzoo.opening import open_data, open_teacher
    from mixerzoo.progress import Reporter
    from mixerzoo_search.profile.measure import profile

    del out
    measured["threads"] = measured["threads"] if measured["threads"] is not None else default_threads()
    for name, value in {"images": images, **measured}.items():
        if isinstance(value, int) and value < 1:
            raise MixerzooError(f"--{name.replace('_', '-')} {value}: give at least 1")
    check_device(measured["device"], measured["dtype"])
    teacher = open_teacher(model, checkpoint)
    return profile(
        teacher,
        open_data(data),
        Conditions(**measured),
        images=images,
        reporter=Reporter(quiet=quiet or as_json),
        command=command_line(),
        library=library,
        memory_limit=memory_limit,
    )


def _refuse_what_a_run_has(click_context: click.Context) -> None:
    """Raise MixerzooError for an option that has no meaning beside --run."""
    for name in click_context.params:
        given = click_context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        if given and name not in WITH_RUN:
            raise MixerzooError(
                f"--{name.replace('_', '-')} does not go with --run: a run has its own; leave it out"
            )


def _print(rows: Sequence[Sequence[str]], *, left: int) -> None:
    """Print rows as a table, its first columns to the left."""
    from rich.console import Console
    from rich.table import Table

    header, *body = rows
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, name in enumerate(header):
        table.add_column(name, justify="left" if number < left else "right")
    for row in body:
        table.add_row(*row)
    (Console() if sys.stdout.isatty() else Console(width=140)).print(table)
