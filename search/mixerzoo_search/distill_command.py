"""`mixerzoo distill`: a library of candidates, or FAR's procedure. Heavy imports wait until the command runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mixerzoo.errors import MixerzooError
from mixerzoo_search.options import command_line, numbers, teacher_options, words
from mixerzoo_search.settings import MEMORY_LIMIT

if TYPE_CHECKING:
    from mixerzoo.hosts import Teacher
    from mixerzoo.progress import Reporter
    from mixerzoo_search.distill_local import Built

RECIPES = ("local", "far")
# What one recipe takes and the other does not: name -> what it is without being said.
ONLY: dict[str, dict[str, Any]] = {
    "local": {
        "mixers": "",
        "widths": "",
        "library": Path("runs/library"),
        "distill_steps": 0,
        "objective": "nmse",
        "memory_limit": MEMORY_LIMIT,
    },
    "far": {
        "mixer": "multihead_lstm",
        "minutes": None,
        "epochs": None,
        "batch_size": 32,
        "lr": 2e-3,
        "augment": "mix",
        "out": None,
        "tracking_uri": None,
    },
}
MINUTES = 10.0
LEAST = 5e-4  # NMSE that three decimals do not show
LOCAL_IMAGES = 512  # as in a search, whose keys it must have


@click.command("distill")
@click.option(
    "--recipe",
    type=click.Choice(RECIPES),
    default="local",
    show_default=True,
    help="local: a library of candidates. far: all attention at once, as FAR does.",
)
@teacher_options
@click.option("--images", type=int, help="Most images to distil on.  [default: 512; far: all]")
@click.option("--seed", default=0, show_default=True, help="Of everything random.")
@click.option("--mixers", metavar="A,B", help="local: mixers to distil.  [default: all]")
@click.option("--widths", metavar="X,Y", help="local: widths to distil.  [default: all]")
@click.option(
    "--library",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="local: the library, which searches share.  [default: runs/library]",
)
@click.option(
    "--distill-steps",
    type=int,
    help="local: gradient steps of every candidate after the closed form.  [default: 0]",
)
@click.option(
    "--objective", metavar="NAME", help="local: what they make smaller, nmse or cosine.  [default: nmse]"
)
@click.option(
    "--memory-limit",
    type=float,
    metavar="GIB",
    help=f"local: activations above this are kept in files.  [default: {MEMORY_LIMIT:g}]",
)
@click.option(
    "--mixer",
    metavar="MIXER[@WIDTH]",
    help="far: what stands at all attention sites.  [default: multihead_lstm]",
)
@click.option("--minutes", type=float, help="far: of training, both stages together.  [default: 10]")
@click.option("--epochs", type=int, help="far: of training, both stages together, instead of minutes.")
@click.option("--batch-size", type=int, help="far: images in a training step.  [default: 32]")
@click.option("--lr", type=float, help="far: highest learning rate of stage 1.  [default: 0.002]")
@click.option(
    "--augment",
    type=click.Choice(("none", "mix", "deit")),
    help="far: mix: mixup and cutmix; deit: random crops, flips, RandAugment and erasing too, for photographs."
    "  [default: mix]",
)
@click.option(
    "--out", type=click.Path(path_type=Path), help="far: run directory.  [default: runs/<model>-far]"
)
@click.option("--tracking-uri", help="far: MLflow.  [default: mlflow.db in the working directory]")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON and nothing else.")
@click.option("--quiet", is_flag=True, help="No progress.")
def distill_command(**options: Any) -> None:
    """Distil a teacher without a budget and without a search.

    The recipe `local` makes every candidate of every site, each on its own, in closed form; later searches with this
    teacher, data, number of images and seed find them in the library. The recipe `far` replaces all attention at once
    and trains the student as a whole, as FAR does (arXiv 2505.21535). Either goes on where a killed one stopped.
    """
    from mixerzoo.progress import Reporter

    run = {"local": _local, "far": _far}[options["recipe"]]
    run(options | _of_recipe(options), Reporter(quiet=options["quiet"] or options["as_json"]))


def _of_recipe(options: dict[str, Any]) -> dict[str, Any]:
    """Return the recipe's own options with their defaults.

    Raises:
        MixerzooError: if one was given that is of another recipe.
    """
    recipe = options["recipe"]
    for other, names in ONLY.items():
        for name in names:
            if other != recipe and options[name] is not None:
                raise MixerzooError(
                    f"--{name.replace('_', '-')} is for --recipe {other}; leave it out, or give that recipe"
                )
    own = ONLY[recipe]
    return {name: own[name] if options[name] is None else options[name] for name in own}


def _local(options: dict[str, Any], reporter: Reporter) -> None:
    from mixerzoo.opening import open_data, open_teacher
    from mixerzoo_search.distill_local import LocalSettings, distill_local

    settings = LocalSettings(
        mixers=words(options["mixers"]),
        widths=numbers(options["widths"]),
        images=LOCAL_IMAGES if options["images"] is None else options["images"],
        steps=options["distill_steps"],
        objective=options["objective"],
        seed=options["seed"],
        memory_limit=options["memory_limit"],
    )
    teacher = open_teacher(options["model"], options["checkpoint"])
    data = open_data(options["data"])
    built = distill_local(teacher, data, settings, library=options["library"], reporter=reporter)
    if options["as_json"]:
        click.echo(json.dumps(built.to_json(), indent=2))
        return
    _print_errors(teacher, built)
    click.echo("\n".join(_closing(built)))


def _print_errors(teacher: Teacher, built: Built) -> None:
    """Print held-out errors, one table a kind: a row a candidate, the best first, and a column a site."""
    from rich.console import Console
    from rich.table import Table

    from mixerzoo_search.report.content import SiteRow
    from mixerzoo_search.report.frontier_view import site_labels

    nmse = {(entry.site, entry.candidate): entry for entry in built.entries}
    for kind in dict.fromkeys(site.kind for site in teacher.sites):
        sites = [site.name for site in teacher.sites if site.kind == kind]
        names = dict.fromkeys(entry.candidate for entry in built.entries if entry.site in sites)
        if not names:
            continue
        best = {
            site: min((e.nmse for e in built.entries if e.site == site and not e.failed), default=None)
            for site in sites
        }
        rows = []
        for name in names:
            found = [nmse.get((site, name)) for site in sites]
            known = [entry.nmse for entry in found if entry is not None and not entry.failed]
            mean = sum(known) / len(known) if known else float("inf")
            cells = [
                "" if entry is None else "failed" if entry.failed else _error(entry.nmse, best[entry.site])
                for entry in found
            ]
            rows.append((mean, name, cells))
        table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
        table.add_column(f"{kind}, NMSE at", no_wrap=True)
        for label in site_labels([SiteRow(name=site, kind=kind, statistics={}) for site in sites]):
            table.add_column(label, justify="right", no_wrap=True)
        table.add_column("mean", justify="right", no_wrap=True)
        for mean, name, cells in sorted(rows):
            table.add_row(name, *cells, "" if mean == float("inf") else _error(mean, None))
        console = Console() if sys.stdout.isatty() else Console(width=40 + 12 * len(sites))
        console.print(table, highlight=False)
        click.echo()


def _error(nmse: float, best: float | None) -> str:
    text = f"{nmse:.0e}" if nmse < LEAST else f"{nmse:.3f}" if nmse < 10 else f"{nmse:.3g}"
    return f"[bold]{text}[/bold]" if nmse == best else text


def _closing(built: Built) -> list[str]:
    """Return the last lines: what was left out or failed and why, what was done in which time, and where it is."""
    lines = [f"left out   {text}" for text in _grouped(built.left_out)]
    lines += [
        f"failed     {text}" for text in _grouped((e.site, e.candidate, e.failed) for e in built.failed)
    ]
    lines += [f"damaged    {what}; distilled again" for what in built.damaged]
    made = f"{built.made} made" + (
        f" in {built.capture_s + built.distill_s:.1f} s, {built.capture_s:.1f} s of it the teacher's pass"
        if built.made
        else ""
    )
    lines.append(
        f"candidates {len(built.entries)} (NMSE on held-out images of {built.images}): {made}; "
        f"{len(built.failed)} failed"
    )
    return [*lines, f"library    {built.library}   (mixerzoo search --library {built.library})"]


def _grouped(rows: Iterable[tuple[str, str, str]]) -> list[str]:
    """Return rows of site, candidate and reason as text, sites of one candidate and reason together."""
    sites: dict[tuple[str, str], list[str]] = {}
    for site, candidate, reason in rows:
        sites.setdefault((candidate, reason), []).append(site)
    return [f"{candidate} at {', '.join(found)}: {reason}" for (candidate, reason), found in sites.items()]


def _far(options: dict[str, Any], reporter: Reporter) -> None:
    from mixerzoo.denormals import tiny_as_zero
    from mixerzoo.opening import open_data, open_teacher
    from mixerzoo.plan import Candidate
    from mixerzoo_search.far.report import closing_lines
    from mixerzoo_search.far.run import run_far
    from mixerzoo_search.far.settings import FarSettings
    from mixerzoo_search.run_directory import RunDirectory

    minutes, epochs = options["minutes"], options["epochs"]
    settings = FarSettings(
        model=options["model"],
        checkpoint=options["checkpoint"],
        data=options["data"],
        mixer=Candidate.parse(options["mixer"]),
        minutes=MINUTES if minutes is None and epochs is None else minutes,
        epochs=epochs,
        images=options["images"],
        batch_size=options["batch_size"],
        lr=options["lr"],
        augment=options["augment"],
        seed=options["seed"],
    )
    out = options["out"] or Path("runs") / f"{settings.model.replace('/', '-')}-far"
    with tiny_as_zero():  # before the first of PyTorch's threads
        result = run_far(
            settings,
            open_teacher(settings.model, settings.checkpoint),
            open_data(settings.data),
            RunDirectory(out),
            reporter=reporter,
            tracking_uri=options["tracking_uri"],
            command=command_line(),
        )
    click.echo(json.dumps(result, indent=2) if options["as_json"] else "\n".join(closing_lines(result, out)))
