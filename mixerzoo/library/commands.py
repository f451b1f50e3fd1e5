"""`mixerzoo library`: look into a library, check it, and tidy it up. Heavy imports wait until a command runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mixerzoo.errors import MixerzooError

if TYPE_CHECKING:
    from mixerzoo.library.folder import Library
    from mixerzoo.library.upkeep import Shelved

LIST_COLUMNS = (
    "key", "site", "candidate", "start", "solved", "final", "steps", "params", "size", "used", "teacher", "data"
)  # fmt: skip


@click.group("library")
def library_group() -> None:
    """Look into a library of distilled candidates, check it, and tidy it up."""


folder_argument = click.argument(
    "folder", metavar="[DIR]", required=False, type=click.Path(path_type=Path), default=Path("runs/library")
)


@library_group.command("list")
@folder_argument
@click.option("--json", "as_json", is_flag=True, help="Print the entries as JSON.")
def list_command(folder: Path, as_json: bool) -> None:
    """List the candidates in DIR, runs/library unless given.

    The errors (NMSE) are those at the start, once the readout is solved, and in the end; `used` is for how long
    no search has used it; teacher and data are the beginnings of their hashes.
    """
    from rich.console import Console
    from rich.table import Table

    from mixerzoo.library.upkeep import shelved

    found = shelved(_open(folder))
    if as_json:
        click.echo(json.dumps([item.to_json() for item in found], indent=2))
        return
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name in LIST_COLUMNS:
        left = name in ("key", "site", "candidate", "teacher", "data")
        table.add_column(name, justify="left" if left else "right", no_wrap=True)
    for item in found:
        table.add_row(*_row(item))
    (Console() if sys.stdout.isatty() else Console(width=200)).print(table, highlight=False)
    bytes_used = sum(item.size for item in found)
    click.echo(f"\n{len(found)} candidates, {size_text(bytes_used)}, in {folder}")


def _short(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:g}"


@library_group.command("show")
@click.argument("key")
@folder_argument
def show_command(key: str, folder: Path) -> None:
    """Tell all about the candidate whose key begins with KEY."""
    from mixerzoo.library.upkeep import shelved

    found = [item for item in shelved(_open(folder)) if item.entry.key.startswith(key)]
    if len(found) != 1:
        problem = "no such key" if not found else f"{len(found)} keys begin with it; give more of it"
        raise MixerzooError(f"library '{folder}': key '{key}': {problem}")
    for name, value in found[0].to_json().items():
        text = ", ".join(f"{k} {_short(v)}" for k, v in value.items()) if isinstance(value, dict) else value
        click.echo(f"{name:<12} {'-' if text is None or text == '' else text}")


@library_group.command("verify")
@folder_argument
def verify_command(folder: Path) -> None:
    """Compare every file in DIR with its checksum; name those that are damaged or belong to nothing."""
    from mixerzoo.library.upkeep import faults

    library = _open(folder)
    found = faults(library)
    for fault in found:
        click.echo(f"{fault.what:<9} {fault.name}  {fault.about}".rstrip())
    if found:
        raise MixerzooError(
            f"library '{folder}': {len(found)} faults; `mixerzoo library prune {folder}` removes them, and a search "
            "makes again what it needs"
        )
    click.echo(f"{len(library)} candidates, all whole")


@library_group.command("prune")
@folder_argument
@click.option("--older-than", type=float, metavar="DAYS", help="Also candidates not used for so many days.")
@click.option(
    "--failed", is_flag=True, help="Also the records of candidates that failed: they are tried again."
)
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
def prune_command(folder: Path, older_than: float | None, failed: bool, dry_run: bool) -> None:
    """Remove from DIR what is damaged, what belongs to nothing, and what ended processes left.

    While a search uses the library, its candidates stay, and so does what is being made.
    """
    from mixerzoo.library.upkeep import prune

    if older_than is not None and not older_than >= 0:
        raise MixerzooError(f"--older-than {older_than:g}: give 0 or more days")
    pruned = prune(_open(folder), older_than=older_than, failed=failed, dry_run=dry_run)
    for fault in pruned.removed:
        click.echo(f"{fault.what:<9} {fault.name}  {fault.about}".rstrip())
    bytes_freed = sum(fault.size for fault in pruned.removed)
    verb = "would be removed" if dry_run else "removed"
    click.echo(f"{len(pruned.removed)} {verb}, {size_text(bytes_freed)}")
    if pruned.in_use and (failed or older_than is not None):
        click.echo("a search is using this library: its candidates stay", err=True)


def size_text(size: int) -> str:
    """Return a number of bytes as people read it."""
    value = float(size)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"


def age_text(seconds: float) -> str:
    """Return a span of time in its largest unit."""
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def _open(folder: Path) -> Library:
    from mixerzoo import locks
    from mixerzoo.library.folder import Library, is_library

    if not is_library(folder):
        problem = f"not a library: it has no {locks.LIBRARY}" if folder.exists() else "no such folder"
        raise MixerzooError(
            f"library '{folder}': {problem}; give the folder that a search kept its candidates in"
        )
    return Library(folder)


def _row(item: Shelved) -> list[str]:
    entry = item.entry
    errors = [f"{value:.4f}" if value == value else "-" for value in (entry.nmse_start, entry.nmse_solved)]
    return [
        entry.key[:8],
        entry.site,
        entry.candidate,
        *errors,
        "failed" if entry.failed else f"{entry.nmse:.4f}",
        str(entry.steps),
        f"{entry.params:,}",
        size_text(item.size),
        age_text(item.unused_s),
        f"{entry.model} {entry.teacher[:8]}",
        f"{Path(entry.data_name).name} {entry.data[:8]}",
    ]
