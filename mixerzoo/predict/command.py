"""`mixerzoo predict`: the classes of images. Heavy imports wait until it runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mixerzoo.errors import MixerzooError

if TYPE_CHECKING:
    from mixerzoo.predict.predictor import Predictions


@click.command("predict")
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("images", metavar="IMAGE...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--top", default=5, show_default=True, help="Classes to show, the most probable ones.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else.")
def predict_command(run: Path, images: tuple[Path, ...], top: int, as_json: bool) -> None:
    """Show what a student sees in images.

    RUN is a run directory, a student's folder, its .safetensors file, or a file of mixerzoo export --format onnx,
    which ONNX Runtime then runs. Images are prepared as the teacher's were. Those that cannot be read are named,
    and the others go on.
    """
    from mixerzoo.predict.predictor import open_predictor, predict

    if top < 1:
        raise MixerzooError(f"--top {top}: give at least 1")
    found = predict(open_predictor(run), images, top=top)
    for path, why in found.unreadable.items():
        click.echo(f"mixerzoo: image '{path}': {why}", err=True)
    if not found.found:
        raise MixerzooError(f"none of the {len(found.unreadable)} images can be read; give image files")
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=2))
    else:
        _print(found)


def _print(found: Predictions) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("image", no_wrap=True)
    table.add_column("class", no_wrap=True)
    table.add_column("probability", justify="right")
    for path, guesses in found.found.items():
        for number, guess in enumerate(guesses):
            table.add_row(Text("" if number else str(path)), Text(guess.name), f"{guess.probability:.2%}")
    (Console() if sys.stdout.isatty() else Console(width=200)).print(table, highlight=False)
