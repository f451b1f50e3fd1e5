"""mixerzoo_search's plugin: its commands. Heavy imports wait until a command runs."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from mixerzoo.hookspecs import hookimpl


@hookimpl
def register_commands(cli: click.Group) -> None:
    """Add `search`, `distill`, `refit`, `profile` and `study`."""
    # These take options from here.
    from mixerzoo_search.distill_command import distill_command
    from mixerzoo_search.profile.command import profile_command
    from mixerzoo_search.sparsity.command import study_group

    cli.add_command(search_command)
    cli.add_command(distill_command)
    cli.add_command(refit_command)
    cli.add_command(profile_command)
    cli.add_command(study_group)


def common_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that name the teacher and the data, and say under what latency is measured."""
    for option in (
        click.option(
            "--runtime",
            default="eager",
            show_default=True,
            help="Under which latency is measured: eager, inductor, onnxruntime, or a plugin's.",
        ),
        click.option("--dtype", default="float32", show_default=True, help="In which latency is measured."),
        click.option("--device", default="cpu", show_default=True, help="On which latency is measured."),
        click.option("--threads", type=int, help="At which latency is measured.  [default: all cores]"),
        click.option("--batch-size", default=1, show_default=True, help="At which latency is measured."),
    ):
        command = option(command)
    return teacher_options(command)


def teacher_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that name the teacher and the data."""
    for option in (
        click.option(
            "--data", default="digits", show_default=True, help="digits, a folder of images, or an .npz file."
        ),
        click.option(
            "--checkpoint", type=click.Path(path_type=Path), help="Its weights, a safetensors file."
        ),
        click.option(
            "--model", default="digits_vit", show_default=True, help="Name of the teacher, as timm has it."
        ),
    ):
        command = option(command)
    return command


def memory_option(command: Callable[..., None]) -> Callable[..., None]:
    """Add the option that limits the memory of the teacher's activations."""
    return click.option(
        "--memory-limit",
        default=4.0,
        metavar="GIB",
        show_default=True,
        help="Activations above this are kept in files.",
    )(command)


@click.command("search")
@click.option("--budget-ms", metavar="MS", help="Latency budget in milliseconds.")
@click.option("--budget", metavar="SHARE", help="Latency budget as a share of the teacher's, such as 60%.")
@common_options
@click.option("--mixers", metavar="A,B", help="Mixers to choose from.  [default: all]")
@click.option("--widths", metavar="X,Y", help="Widths to choose from.  [default: all]")
@click.option("--trials", default=48, show_default=True, help="True evaluations of stitched students.")
@click.option("--minutes", type=float, help="Most minutes of true evaluations.")
@click.option("--images", default=512, show_default=True, help="Most images to distil on.")
@click.option(
    "--distill-steps", default=60, show_default=True, help="Gradient steps of a promising candidate."
)
@click.option(
    "--distill-minutes",
    type=float,
    help="Most minutes of those steps, in all.  [default: at most 1.5 candidates a site get steps]",
)
@click.option(
    "--finetune-minutes", default=1.0, show_default=True, help="Distillation of the best plans as a whole."
)
@memory_option
@click.option("--seed", default=0, show_default=True, help="Of everything random.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Run directory.  [default: runs/<model>-<budget>]"
)
@click.option(
    "--library",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Distilled candidates, which searches share.  [default: library, beside the run directory]",
)
@click.option("--storage", help="Optuna storage URL.  [default: SQLite in the run directory]")
@click.option("--tracking-uri", help="MLflow.  [default: mlflow.db in the working directory]")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON and nothing else.")
@click.option("--quiet", is_flag=True, help="No progress.")
def search_command(**options: Any) -> None:
    """Find the most faithful student within a latency budget.

    With nothing but a budget it searches the embedded teacher on the embedded digits. The same command goes on
    where a killed one stopped.
    """
    from mixerzoo.errors import BudgetOutOfReachError, MixerzooError
    from mixerzoo.latency import default_threads
    from mixerzoo.tracking import resolve_uri
    from mixerzoo_search import search
    from mixerzoo_search.results import closing_lines
    from mixerzoo_search.settings import Budget

    as_json, budget_ms = options.pop("as_json"), options.pop("budget_ms")
    if (budget_ms is None) == (options["budget"] is None):
        raise MixerzooError("give one of --budget-ms 5 and --budget 60%")
    if budget_ms is not None:
        if budget_ms.strip().endswith("%"):
            raise MixerzooError(f"--budget-ms {budget_ms}: give milliseconds, or --budget {budget_ms}")
        options["budget"] = budget_ms  # Budget takes a plain number for milliseconds
    Budget.parse(options["budget"])
    options["mixers"] = _words(options["mixers"])
    options["widths"] = _numbers(options["widths"])
    options["threads"] = options["threads"] if options["threads"] is not None else default_threads()
    options["quiet"] = options["quiet"] or as_json
    tracking_uri = resolve_uri(options["tracking_uri"])
    result = search(**options)
    if as_json:
        click.echo(json.dumps(result.summary, indent=2))
    else:
        click.echo("\n".join(closing_lines(result.summary, result.path, tracking_uri)))
    if not result.summary["met"]:
        raise BudgetOutOfReachError(
            f"budget {options['budget']}: no student met it when it was measured again"
        )


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


def command_line() -> str:
    """Return the command that this process was started with, as one would type it."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def _words(text: str | None) -> tuple[str, ...]:
    return () if text is None else tuple(word.strip() for word in text.split(",") if word.strip())


def _numbers(text: str | None) -> tuple[float, ...]:
    from mixerzoo.errors import MixerzooError

    try:
        return tuple(float(word) for word in _words(text))
    except ValueError:
        raise MixerzooError(f"--widths '{text}': give numbers, such as 0.25,0.5") from None
