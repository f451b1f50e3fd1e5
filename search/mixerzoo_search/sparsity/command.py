"""`mixerzoo study`: experiments of the papers on one's own model. Heavy imports wait until a command runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mixerzoo_search.options import command_line, teacher_options

if TYPE_CHECKING:
    from rich.table import Table


@click.group("study")
def study_group() -> None:
    """Repeat an experiment of the papers on your own model."""


@study_group.command("sparsity")
@teacher_options
@click.option(
    "--mixer",
    metavar="A,B",
    default="multihead_lstm",
    show_default=True,
    help="What stands in place of a group; of several, one after the other.",
)
@click.option("--width", type=float, help="Its width.  [default: the natural one]")
@click.option(
    "--group-size", type=int, help="Consecutive attention layers replaced at once.  [default: a fifth of all]"
)
@click.option(
    "--stride", default=1, show_default=True, help="Layers from the start of one group to that of the next."
)
@click.option(
    "--steps",
    default=60,
    show_default=True,
    help="Gradient steps for each group.",
)
@click.option("--images", default=256, show_default=True, help="Most images to distil on.")
@click.option("--seed", default=0, show_default=True, help="Of everything random.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder.  [default: studies/<model>-sparsity]")
@click.option("--json", "as_json", is_flag=True, help="Print sparsity.json and nothing else.")
@click.option("--quiet", is_flag=True, help="No progress.")
def sparsity_command(mixer: str, out: Path | None, as_json: bool, quiet: bool, **options: Any) -> None:
    """See whether layers with sparser attention are easier to replace.

    Groups of consecutive attention layers are replaced, one group at a time, under the same training budget. The
    loss on test images is related to each attention statistic by rank. The same command goes on where a killed
    one stopped.
    """
    from mixerzoo.opening import open_data, open_teacher
    from mixerzoo.progress import Reporter
    from mixerzoo_search.sparsity.settings import StudySettings
    from mixerzoo_search.sparsity.study import run_study

    mixers = tuple(word.strip() for word in mixer.split(",") if word.strip())
    settings = StudySettings(mixers=mixers, **options)
    teacher = open_teacher(settings.model, settings.checkpoint)
    folder = out or Path("studies") / f"{settings.model.replace('/', '-')}-sparsity"
    found = run_study(
        settings,
        teacher,
        open_data(settings.data),
        folder,
        reporter=Reporter(quiet=quiet or as_json),
        command=command_line(),
    )
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        _print(found, folder)


def _print(found: Mapping[str, Any], folder: Path) -> None:
    from rich.console import Console

    console = Console() if sys.stdout.isatty() else Console(width=160)
    for mixer, part in found["mixers"].items():
        click.echo(f"{mixer}\n")
        console.print(_groups_table(part["groups"], found["teacher"]["accuracy"]), highlight=False)
        click.echo("")
        console.print(_relations_table(part["relations"]), highlight=False)
        for group in part["groups"]:
            if group["failed"]:
                click.echo(f"layers {group['layers']} failed: {group['failed']}")
        click.echo(f"\n{part['verdict']}")
        if part["closest"]:
            click.echo(part["closest"])
        click.echo("")
    click.echo(f"picture    {folder / 'sparsity.png'}")
    click.echo(f"figures    {folder / 'sparsity.json'}")


def _groups_table(groups: list[dict[str, Any]], accuracy: float | None) -> Table:
    from mixerzoo.statistics import ATTENTION_STATISTICS

    names = [name for name in ATTENTION_STATISTICS if groups[0]["statistics"][name] is not None]
    header = ["layers", *(name.replace("_", " ") for name in names), "loss", "+-", "untrained", "agreement"]
    table = _table(header + ([] if accuracy is None else ["accuracy drop"]), left=1)
    for group in groups:
        cells = [group["layers"], *(f"{group['statistics'][name]:.3g}" for name in names)]
        if group["failed"]:
            cells += ["failed"]
        else:
            after = group["trained"]
            cells += [f"{after['loss']:.3g}", f"{after['loss_error']:.1g}", f"{group['solved']['loss']:.3g}"]
            cells += [f"{after['agreement']:.1%}"]
            cells += [] if accuracy is None else [f"{100 * (accuracy - after['accuracy']):+.1f}"]
        table.add_row(*cells)
    return table


def _relations_table(relations: list[dict[str, Any]]) -> Table:
    from mixerzoo_search.sparsity.relation import p_text

    table = _table(
        ["statistic", "sparser is", "Spearman", "p, groups", "p, layers", "sparser is easier"], left=2
    )
    for relation in relations:
        spearman, easier = relation["spearman"], relation["sparser_is_easier"]
        table.add_row(
            relation["statistic"].replace("_", " "),
            relation["sparser"] or "",
            "-" if spearman is None else f"{spearman:+.2f}",
            p_text(relation["p_groups"]),
            p_text(relation["p_layers"]),
            "" if relation["sparser"] is None else {None: "unclear", True: "yes", False: "no"}[easier],
        )
    return table


def _table(header: list[str], *, left: int) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for number, name in enumerate(header):
        table.add_column(name, justify="left" if number < left else "right")
    return table
