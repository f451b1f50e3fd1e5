"""`mixerzoo export`: a student as a file or folder to be served or shared. Heavy imports wait until it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click


@click.command("export")
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--format",
    metavar="FORMAT",
    required=True,
    help="onnx, torch-export, safetensors or hub.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="File to write, or folder for hub.  [default: in RUN/export]",
)
@click.option("--images", default=200, show_default=True, help="Real images to compare on.")
@click.option("--data", help="What they are taken from.  [default: the run's data]")
@click.option(
    "--tolerance",
    type=float,
    help="Largest difference of an output that can be rounding.  [default: 1e-4, or what it does to the student]",
)
@click.option("--threads", type=int, help="At which latency is measured.  [default: the run's, or all cores]")
@click.option("--batch-size", type=int, help="At which latency is measured.  [default: the run's, or 1]")
@click.option("--no-latency", is_flag=True, help="Do not time it.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON and nothing else.")
@click.option("--quiet", is_flag=True, help="No progress.")
def export_command(run: Path, no_latency: bool, as_json: bool, quiet: bool, **options: Any) -> None:
    """Export the student in RUN: a run directory, a student's folder, or its .safetensors file.

    What was written is compared with the student on real images; where it computes something else, it is removed
    again. A file of --format onnx or torch-export takes any number of images at a time, and what serving it takes
    (the size, the pixels, the classes) is in the JSON file beside it. The format safetensors is one file with the
    plan in it, hub is a folder with a model card; mixerzoo.load takes both.
    """
    from mixerzoo.export.run import closing_lines, export_student
    from mixerzoo.progress import Reporter

    found = export_student(run, timed=not no_latency, reporter=Reporter(quiet=quiet or as_json), **options)
    click.echo(json.dumps(found.to_json(), indent=2) if as_json else "\n".join(closing_lines(found)))
