"""`mixerzoo prune`. Heavy imports wait until the command runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from mixerzoo_search.options import command_line
from mixerzoo_search.prune.settings import BY, FINETUNE_MINUTES, MINUTES, TARGETS


@click.command("prune")
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("more", nargs=-1, metavar="")
@click.option(
    "--targets",
    multiple=True,
    metavar="SHARE...",
    help=f"Shares of the teacher's to reach: 80%,60% or 80% 60%.  [default: {','.join(TARGETS)}]",
)
@click.option(
    "--by",
    type=click.Choice(BY),
    default="latency",
    show_default=True,
    help="What is to reach them: measured latency, parameters, or operations.",
)
@click.option("--minutes", type=float, help=f"Time for training with the penalty.  [default: {MINUTES:g}]")
@click.option("--steps", type=int, help="Gradient steps of it, instead of minutes.")
@click.option(
    "--finetune-minutes",
    type=float,
    help=f"Time for distillation as a whole of each student.  [default: {FINETUNE_MINUTES:g}]",
)
@click.option("--finetune-steps", type=int, help="Gradient steps of it, instead of minutes.")
@click.option("--penalty", default=0.1, show_default=True, help="Weight of the share of units in use.")
@click.option("--lr", default=2e-4, show_default=True, help="Highest learning rate.")
@click.option("--images", type=int, help="Most images to train on.  [default: all to distil on]")
@click.option("--seed", default=0, show_default=True, help="Of the order of images.")
@click.option("--threads", type=int, help="At which latency is measured.  [default: the run's]")
@click.option(
    "--plan",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A plan of this run's candidates, or the folder of a student.  [default: RUN/best]",
)
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="DIR", help="Folder to write.  [default: RUN/pruned]"
)
@click.option("--tracking-uri", help="MLflow.  [default: mlflow.db in the working directory]")
@click.option("--json", "as_json", is_flag=True, help="Print prune.json and nothing else.")
@click.option("--quiet", is_flag=True, help="No progress.")
def prune_command(
    run: Path,
    more: tuple[str, ...],
    targets: tuple[str, ...],
    plan: Path | None,
    out: Path | None,
    threads: int | None,
    tracking_uri: str | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Make a family of smaller students from the best student of the finished run in RUN.

    It is trained with a penalty on units in use: of LSTMs, of MLPs, heads, and what else mixers name. For each
    target, units below one threshold are cut out of all modules, which are refitted in closed form and distilled as
    a whole. The same command goes on where a killed one stopped, and with more targets adds to the family.
    """
    from mixerzoo.denormals import tiny_as_zero
    from mixerzoo.errors import MixerzooError
    from mixerzoo.progress import Reporter
    from mixerzoo_search.prune.report import closing_lines
    from mixerzoo_search.prune.run import prune_run
    from mixerzoo_search.prune.settings import PruneSettings, parse_targets

    if more and not targets:
        raise MixerzooError(f"'{more[0]}': give one run, and shares with --targets")
    if threads is not None and threads < 1:
        raise MixerzooError(f"--threads {threads}: give at least 1")
    shares = parse_targets((*targets, *more) or TARGETS)
    settings = PruneSettings(targets=shares, **options)
    with tiny_as_zero():  # before the first of PyTorch's threads
        record = prune_run(
            run,
            settings,
            plan=plan,
            out=out,
            threads=threads,
            tracking_uri=tracking_uri,
            reporter=Reporter(quiet=quiet or as_json),
            command=command_line(),
        )
    if as_json:
        click.echo(json.dumps(record, indent=2))
    else:
        click.echo("\n".join(closing_lines(record, out or run / "pruned")))
