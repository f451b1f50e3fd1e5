"""mixerzoo_search's plugin: its commands. Heavy imports wait until a command runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mixerzoo.hookspecs import hookimpl
from mixerzoo_search.options import command_line as command_line
from mixerzoo_search.options import common_options as common_options
from mixerzoo_search.options import condition_options as condition_options
from mixerzoo_search.options import memory_option as memory_option
from mixerzoo_search.options import model_options as model_options
from mixerzoo_search.options import numbers, words
from mixerzoo_search.options import teacher_options as teacher_options

_numbers, _words = numbers, words


@hookimpl
def register_commands(cli: click.Group) -> None:
    """Add `search`, `distill`, `refit`, `finetune`, `profile`, `prune` and `study`."""
    from mixerzoo_search.distill_command import distill_command
    from mixerzoo_search.finetuning.command import finetune_command
    from mixerzoo_search.latency.command import latency_command
    from mixerzoo_search.profile.command import profile_command
    from mixerzoo_search.prune.command import prune_command
    from mixerzoo_search.search_command import search_command
    from mixerzoo_search.sparsity.command import study_group

    cli.add_command(search_command)
    cli.add_command(distill_command)
    cli.add_command(refit_command)
    cli.add_command(finetune_command)
    cli.add_command(latency_command)
    cli.add_command(profile_command)
    cli.add_command(prune_command)
    cli.add_command(study_group)


@click.command("refit")
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--plan",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A plan of this run's candidates, or the folder of a student.  [default: RUN/best]",
)
@click.option(
    "--minutes",
    default=0.0,
    show_default=True,
    help="Time for gradient steps after it, on all weights together.",
)
@click.option("--images", type=int, help="Images to refit on.  [default: the run's, up to 65,536 tokens]")
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="DIR", help="Folder to write.  [default: RUN/refit]"
)
@click.option("--tracking-uri", help="MLflow.  [default: mlflow.db in the working directory]")
@click.option("--quiet", is_flag=True, help="No progress.")
def refit_command(run: Path, quiet: bool, **options: Any) -> None:
    """Refit the best student of the finished search in RUN, site by site, in closed form.

    Each site sees what the student really feeds it, and corrects the drift of those before it; so do the
    teacher's own MLPs that the student keeps. The better of both students by validation loss is written;
    its latency stays what it was.
    """
    from mixerzoo.progress import Reporter
    from mixerzoo_search.refit_command import closing_lines, refit_run

    found = refit_run(run, reporter=Reporter(quiet=quiet), **options)
    click.echo("\n".join(closing_lines(found)))
