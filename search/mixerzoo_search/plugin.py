"""mixerzoo_search's plugin: adds `mixerzoo search`. Heavy imports wait until the command runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from mixerzoo.hookspecs import hookimpl


@hookimpl
def register_commands(cli: click.Group) -> None:
    """Add the search command."""
    cli.add_command(search_command)


@click.command("search")
@click.option("--model", default="digits_vit", show_default=True, help="Name of the teacher, as timm has it.")
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Its weights, a safetensors file.")
@click.option(
    "--data", default="digits", show_default=True, help="digits, a folder of images, or an .npz file."
)
@click.option("--budget-ms", metavar="MS", help="Latency budget in milliseconds.")
@click.option("--budget", metavar="SHARE", help="Latency budget as a share of the teacher's, such as 60%.")
@click.option("--mixers", metavar="A,B", help="Mixers to choose from.  [default: all]")
@click.option("--widths", metavar="X,Y", help="Widths to choose from.  [default: all]")
@click.option("--trials", default=48, show_default=True, help="True evaluations of stitched students.")
@click.option("--minutes", type=float, help="Most minutes of true evaluations.")
@click.option("--images", default=512, show_default=True, help="Most images to distil on.")
@click.option(
    "--distill-steps", default=60, show_default=True, help="Gradient steps of a promising candidate."
)
@click.option(
    "--finetune-minutes", default=1.0, show_default=True, help="Distillation of the best plans as a whole."
)
@click.option("--batch-size", default=1, show_default=True, help="At which latency is measured.")
@click.option("--threads", type=int, help="At which latency is measured.  [default: all cores]")
@click.option("--device", default="cpu", show_default=True, help="On which latency is measured.")
@click.option("--dtype", default="float32", show_default=True, help="In which latency is measured.")
@click.option("--runtime", default="eager", show_default=True, help="Under which latency is measured.")
@click.option("--seed", default=0, show_default=True, help="Of everything random.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Run directory.  [default: runs/<model>-<budget>]"
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
    from mixerzoo.errors import MixerzooError
    from mixerzoo.latency import default_threads
    from mixerzoo.tracking import resolve_uri
    from mixerzoo_search import search
    from mixerzoo_search.results import closing_lines
    from mixerzoo_search.settings import Budget

    as_json, budget_ms = options.pop("as_json"), options.pop("budget_ms")
    if (budget_ms is None) == (options["budget"] is None):
        raise MixerzooError("give one of --budget-ms 5 and --budget 60%")
    if budget_ms is not None:
        options["budget"] = f"{budget_ms}ms"
    Budget.parse(options["budget"])
    options["mixers"] = _words(options["mixers"])
    options["widths"] = _numbers(options["widths"])
    options["threads"] = options["threads"] if options["threads"] is not None else default_threads()
    options["quiet"] = options["quiet"] or as_json
    tracking_uri = resolve_uri(options["tracking_uri"])
    result = search(**options)
    if as_json:
        click.echo(json.dumps(result.summary, indent=2))
        return
    click.echo("\n".join(closing_lines(result.summary, result.path, tracking_uri)))
    if not result.summary["met"]:
        from mixerzoo.errors import BudgetOutOfReachError

        raise BudgetOutOfReachError(
            f"budget {options['budget']}: no student met it when it was measured again"
        )


def _words(text: str | None) -> tuple[str, ...]:
    return () if text is None else tuple(word.strip() for word in text.split(",") if word.strip())


def _numbers(text: str | None) -> tuple[float, ...]:
    from mixerzoo.errors import MixerzooError

    try:
        return tuple(float(word) for word in _words(text))
    except ValueError:
        raise MixerzooError(f"--widths '{text}': give numbers, such as 0.25,0.5") from None
