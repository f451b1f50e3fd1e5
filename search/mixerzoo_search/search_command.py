"""`mixerzoo search`. Heavy imports wait until the command runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from mixerzoo_search.options import common_options, memory_option, numbers, objective_option, words

if TYPE_CHECKING:
    from mixerzoo_search.joining import Joined


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
@objective_option
@click.option(
    "--finetune-minutes", default=1.0, show_default=True, help="Distillation of the best plans as a whole."
)
@memory_option
@click.option("--seed", default=0, show_default=True, help="Of everything random; with --from, of the study.")
@click.option(
    "--from",
    "source",
    type=click.Path(path_type=Path),
    metavar="RUN",
    help="Take over what this run has measured and distilled; options that are left out are its own.",
)
@click.option(
    "--join",
    is_flag=False,
    flag_value="",
    metavar="[RUN]",
    help="Take part in a search that another process has begun: in RUN, or in that of the same options.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Run directory.  [default: runs/<model>-<budget>; with --from, <run>-<budget>]",
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
def search_command(
    as_json: bool, budget_ms: str | None, source: Path | None, join: str | None, **options: Any
) -> None:
    """Find the most faithful student within a latency budget.

    With nothing but a budget it searches the embedded teacher on the embedded digits. The same command goes on
    where a killed one stopped.
    """
    from mixerzoo.errors import BudgetOutOfReachError, MixerzooError
    from mixerzoo.tracking import resolve_uri
    from mixerzoo_search import join as join_search
    from mixerzoo_search import search
    from mixerzoo_search.joining import Joined

    if source is not None and join is not None:
        raise MixerzooError(
            "--from begins a search of its own, and --join takes part in one: give one of them"
        )
    if budget_ms is not None and options["budget"] is not None:
        raise MixerzooError("give one of --budget-ms 5 and --budget 60%")
    if budget_ms is not None:
        if budget_ms.strip().endswith("%"):
            raise MixerzooError(f"--budget-ms {budget_ms}: give milliseconds, or --budget {budget_ms}")
        options["budget"] = budget_ms  # Budget takes a plain number for milliseconds
    if options["budget"] is None and source is None and not join and (join is None or options["out"] is None):
        raise MixerzooError("give one of --budget-ms 5 and --budget 60%")
    options["mixers"] = words(options["mixers"])
    options["widths"] = numbers(options["widths"])
    options["quiet"] = options["quiet"] or as_json
    tracking_uri = resolve_uri(options["tracking_uri"])
    if source is not None or join is not None:
        given = click.get_current_context().get_parameter_source
        kept = {name: value for name, value in options.items() if given(name) != ParameterSource.DEFAULT}
        options = kept | {
            "budget": options["budget"],
            "threads": options["threads"],
            "quiet": options["quiet"],
        }
    result = search(from_run=source, **options) if join is None else join_search(join or None, **options)
    if isinstance(result, Joined):
        click.echo(json.dumps(_joined(result)) if as_json else _told(result))
        return
    _show(result, as_json, tracking_uri)
    if not result.summary["met"]:
        budget = options.get("budget") or f"of {result.summary['budget_ms']:.3g} ms"
        raise BudgetOutOfReachError(f"budget {budget}: no student met it when it was measured again")


def _show(result: Any, as_json: bool, tracking_uri: str) -> None:
    from mixerzoo_search.results import closing_lines

    if as_json:
        click.echo(json.dumps(result.summary, indent=2))
    else:
        click.echo("\n".join(closing_lines(result.summary, result.path, tracking_uri)))


def _joined(result: Joined) -> dict[str, Any]:
    return {"run": str(result.path), "evaluated": result.evaluated, "trials": result.trials}


def _told(result: Joined) -> str:
    return (
        f"took part in {result.path}: evaluated {result.evaluated} of its {result.trials} plans; the process that "
        "leads it writes the result"
    )
