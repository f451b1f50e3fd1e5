"""`mixerzoo compare`: students side by side. Heavy imports wait until it runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mixerzoo.errors import MixerzooError

if TYPE_CHECKING:
    from rich.table import Table

    from mixerzoo.compare.comparison import Comparison


@click.command("compare")
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--picture", type=click.Path(path_type=Path), metavar="FILE", help="Write a picture, a .png file."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else.")
def compare_command(runs: tuple[Path, ...], picture: Path | None, as_json: bool) -> None:
    """Show students side by side: accuracy, agreement, latency, parameters and size.

    Of an accuracy less the teacher's there is the 95 % interval: what chance may do on so many images.

    Each RUN is a run directory, whose best student is meant, or the folder or file of a student. The figures are
    those that were measured when it was made; where data, teacher or conditions were others, that is said.
    """
    from mixerzoo.compare.comparison import compare
    from mixerzoo.files import write_bytes

    if picture is not None and picture.suffix.lower() != ".png":
        raise MixerzooError(f"--picture {picture}: give a .png file")
    found = compare(runs)
    if picture is not None:
        from mixerzoo.compare.picture import compare_picture

        try:
            write_bytes(picture, compare_picture(found))
        except OSError as error:
            raise MixerzooError(f"--picture {picture}: cannot be written ({error.strerror})") from None
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=2))
        return
    _print(found)
    if picture is not None:
        click.echo(f"\npicture    {picture}")


def _print(found: Comparison) -> None:
    from rich.console import Console

    console = Console() if sys.stdout.isatty() else Console(width=200)
    console.print(_table(found), highlight=False)
    if found.notes:
        click.echo("")
    for note in found.notes:
        click.echo(note)


def _table(found: Comparison) -> Table:
    from rich.table import Table
    from rich.text import Text

    from mixerzoo.significance import CHANGE, change_text

    columns = ("replaced", "accuracy", CHANGE, "agreement", "latency", "of teacher", "parameters", "on disk")
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("student")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for name, (accuracy, ms, params) in _teachers(found).items():
        cells = ["", _percent(accuracy), "", "", _ms(ms), "", _count(params), ""]
        table.add_row(Text(name), *cells, style="dim")
    for row in found.rows:
        figures = row.figures
        replaced = sum(candidate != "keep" for candidate in row.plan.values())
        table.add_row(
            Text(row.name),
            f"{replaced} of {len(row.plan)}",
            _percent(figures.accuracy),
            change_text(figures.change_low, figures.change_high) or "-",
            _percent(figures.agreement),
            _ms(figures.latency_ms),
            "-" if figures.share is None else f"{figures.share:.0%}",
            _count(figures.params),
            f"{row.bytes / 2**20:.2f} MiB",
        )
    return table


def _teachers(found: Comparison) -> dict[str, tuple[float | None, float | None, int | None]]:
    """Return name -> accuracy, latency, parameters; where they were measured more than once, with whose they are."""
    measured: dict[tuple[str, float | None, float | None, int | None], list[str]] = {}
    for row in found.rows:
        figures = row.figures
        if figures.teacher_params is not None:
            key = (row.teacher, figures.teacher_accuracy, figures.teacher_ms, figures.teacher_params)
            measured.setdefault(key, []).append(row.name)
    several = len(measured) > len({teacher for teacher, *_ in measured})
    return {
        f"{teacher} (teacher{' of ' + ', '.join(names) if several else ''})": (accuracy, ms, params)
        for (teacher, accuracy, ms, params), names in measured.items()
    }


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} ms"


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"
