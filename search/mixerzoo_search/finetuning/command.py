"""`mixerzoo finetune`. Heavy imports wait until the command runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from mixerzoo_search.options import command_line


@click.command("finetune")
@click.argument("source", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--minutes", type=float, help="Time for it, over all starts.  [default: 10]")
@click.option("--steps", type=int, help="Gradient steps, instead of minutes: the same result every time.")
@click.option("--lr", default=1e-4, show_default=True, help="Highest learning rate.")
@click.option(
    "--labels",
    default=0.0,
    metavar="WEIGHT",
    show_default=True,
    help="Weight of a loss on labels, where there are any.",
)
@click.option("--images", type=int, help="Most images to train on.  [default: all to distil on]")
@click.option("--batch-size", default=16, show_default=True, help="Images in a step.")
@click.option("--seed", default=0, show_default=True, help="Of the order of images.")
@click.option("--device", default="cpu", show_default=True, help="Where it is trained.")
@click.option("--dtype", help="float32, or bfloat16 for autocast.  [default: bfloat16 on a GPU that has it]")
@click.option(
    "--run",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="The run of the teacher, for a student outside of it.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="DIR", help="Folder to write.  [default: RUN/finetuned]"
)
@click.option("--tracking-uri", help="MLflow.  [default: mlflow.db in the working directory]")
@click.option("--json", "as_json", is_flag=True, help="Print result.json and nothing else.")
@click.option("--quiet", is_flag=True, help="No progress.")
def finetune_command(
    source: Path,
    run: Path | None,
    out: Path | None,
    tracking_uri: str | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Distil the best student of the finished run in RUN as a whole.

    RUN may also be the folder of a student within a run. All its weights are trained together, on the teacher's
    output and hidden states. The better of both students by validation loss is written. The same command goes on
    where a killed one stopped.
    """
    from mixerzoo.denormals import tiny_as_zero
    from mixerzoo.progress import Reporter
    from mixerzoo_search.finetuning.run import finetune_run
    from mixerzoo_search.finetuning.settings import MINUTES, FinetuneSettings
    from mixerzoo_search.improved import closing_lines

    if options["minutes"] is None and options["steps"] is None:
        options["minutes"] = MINUTES
    settings = FinetuneSettings(**options)
    with tiny_as_zero():  # before the first of PyTorch's threads
        found = finetune_run(
            source,
            settings,
            run=run,
            out=out,
            tracking_uri=tracking_uri,
            reporter=Reporter(quiet=quiet or as_json),
            command=command_line(),
        )
    if as_json:
        click.echo(json.dumps(found.result, indent=2))
        return
    lines = closing_lines(found.result, found.path)
    if found.result["stopped"] is not None:
        lines.insert(3, f"ended early: {found.result['stopped']}; try a lower --lr than {settings.lr:g}")
    click.echo("\n".join(lines))
