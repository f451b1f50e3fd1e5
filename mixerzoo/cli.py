"""The command line. Every command is a thin wrapper; heavy imports wait until a command runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from mixerzoo import __version__
from mixerzoo.compare.command import compare_command
from mixerzoo.errors import MixerzooError
from mixerzoo.export.command import export_command
from mixerzoo.library.commands import library_group
from mixerzoo.predict.command import predict_command


class Group(click.Group):
    """Loads the commands of plugins before it lists or looks up any, and prints mixerzoo's errors on one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return all commands, those of plugins too."""
        self._load()
        return super().list_commands(ctx)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command, one of a plugin too."""
        self._load()
        return super().get_command(ctx, cmd_name)

    def _load(self) -> None:
        if not self.__dict__.get("loaded"):
            from mixerzoo.registry import get_registry, is_strict

            self.__dict__["loaded"] = True
            get_registry().add_commands(self, strict=is_strict())

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; an error of mixerzoo becomes one line and its exit code."""
        try:
            return super().invoke(ctx)
        except MixerzooError as error:
            click.echo(f"mixerzoo: {error}", err=True)
            ctx.exit(error.exit_code)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
def main() -> None:
    """Fit a pretrained transformer to a latency budget, site by site."""


@main.command()
@click.argument("names", nargs=-1)
def mixers(names: tuple[str, ...]) -> None:
    """List the mixers, and the plugins that could not be loaded; with NAMES, all about those mixers."""
    from rich.console import Console
    from rich.text import Text

    from mixerzoo.listing import LEGEND, details, mixer_table
    from mixerzoo.registry import get_registry

    registry = get_registry()
    if names:
        known = registry.mixers
        told = [details(known.get(name), known.origin(name)) for name in names]
        click.echo("\n\n".join(told))
        return
    console = Console() if sys.stdout.isatty() else Console(width=200)
    console.print(mixer_table(registry))
    console.print(f"\n{LEGEND}", highlight=False)
    for broken in registry.broken:
        origin = broken.origin
        line = Text.assemble(("broken", "red"), f" plugin '{origin.plugin}' of {origin}: {broken.error}")
        console.print(line, soft_wrap=True)


@main.command()
@click.argument("names", nargs=-1)
@click.option("--all", "every", is_flag=True, help="Check every registered mixer.")
def check(names: tuple[str, ...], every: bool) -> None:
    """Check that mixers do what their specs claim."""
    from mixerzoo.registry import get_registry
    from mixerzoo.testing import run_checks

    shelf = get_registry().mixers
    if not names and not every:
        raise MixerzooError("name a mixer, or give --all; `mixerzoo mixers` lists them")
    failed = 0
    for spec in list(shelf) if every else [shelf.get(name) for name in names]:
        for result in run_checks(spec):
            failed += result.failed
            mark = "ok  " if result.passed else "FAIL" if result.failed else "-   "
            click.echo(f"{mark} {spec.name:<18} {result.name:<24} {result.message}".rstrip())
    if failed:
        raise MixerzooError(f"{failed} checks failed")


@main.command("new-plugin")
@click.argument("name")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder of the plugin; it must not exist.  [default: mixerzoo-<name>]",
)
def new_plugin(name: str, out: Path | None) -> None:
    """Write a plugin with a small mixer called NAME, to begin from.

    It is a complete distribution that passes its own tests once it is installed.
    """
    from mixerzoo import new_plugin as plugin

    mixer, folder = plugin.new_plugin(name, out)
    click.echo(plugin.next_steps(mixer, folder))


@main.command()
@click.option("--model", default="digits_vit", show_default=True, help="Name of the teacher, as timm has it.")
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Its weights, a safetensors file.")
def sites(model: str, checkpoint: Path | None) -> None:
    """List the sites of a model, and what looks like one and is not."""
    from mixerzoo.opening import open_teacher

    teacher = open_teacher(model, checkpoint)
    for site in teacher.sites:
        shape = f"N={site.tokens} D={site.dim} " + (
            f"H={site.heads}" if site.kind == "attention" else f"hidden={site.hidden} {site.activation}"
        )
        click.echo(f"{site.name:<24} {site.kind:<10} {shape}")
    for rejected in teacher.rejected:
        click.echo(f"{rejected.name:<24} not a site: {rejected.reason}")


@main.command()
@click.option("--tracking-uri", help="MLflow's store.  [default: mlflow.db in the working directory]")
@click.option("--port", default=5000, show_default=True)
def ui(tracking_uri: str | None, port: int) -> None:
    """Open MLflow on 127.0.0.1 to compare runs."""
    from mixerzoo.tracking import open_ui

    open_ui(tracking_uri, port)


main.add_command(library_group)
main.add_command(export_command)
main.add_command(predict_command)
main.add_command(compare_command)


if __name__ == "__main__":
    main()
