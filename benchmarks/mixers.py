"""The mixers themselves: latency beside exact attention, beside other implementations of the same, and growth in N."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click
import torch
from common import json_option, quick_option, write
from mixer_parts import growth
from mixer_parts.peers import Agreement, Missing, Peer, agreement, all_peers
from mixer_parts.picture import draw
from mixer_parts.shapes import (
    Shape,
    Skipped,
    build,
    builtin_mixers,
    compare,
    full_width,
    kind_of,
    prepare,
    reference_for,
    timing_json,
    weight_bytes,
)
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mixerzoo.errors import MixerzooError
from mixerzoo.latency import REFERENCE, default_threads, threads
from mixerzoo.registry import get_registry
from mixerzoo.spec import MixerSpec

SHAPES = (
    Shape(batch=1, tokens=197, dim=192, heads=3, prefix=1, grid=(14, 14)),
    Shape(batch=1, tokens=257, dim=384, heads=6, prefix=1, grid=(16, 16)),
    Shape(batch=8, tokens=1024, dim=384, heads=6, grid=(32, 32)),
)
QUICK_SHAPES = (Shape(batch=1, tokens=65, dim=64, heads=2, prefix=1, grid=(8, 8)),)
WIDE = Shape(batch=1, tokens=197, dim=768, heads=12, prefix=1, grid=(14, 14))
MORE_SHAPES = {"multihead_lstm": (WIDE,)}  # of the peers
PEER_PATIENCE = 2.0  # times what a mixer may take
ROUNDS = 25
FILE_WIDTH = 150  # of the tables, where they do not go to a terminal
PARTS = ("attention", "peers", "growth")
LIBRARIES = ("timm", "mambapy", "transformers", "fla-core")


def beside_attention(specs: list[MixerSpec], shape: Shape, rounds: int) -> list[dict[str, Any]]:
    """Time every mixer at one shape beside what it replaces."""
    x = shape.example()
    rows = []
    for spec in track(specs, description=f"{shape}", transient=True):
        row: dict[str, Any] = {"mixer": spec.name, "width": full_width(spec), "shape": str(shape)}
        rows.append(row)
        try:
            mixer = build(spec, shape)
        except Skipped as reason:
            row["skipped"] = str(reason)
            continue
        reference = reference_for(spec, shape)
        row["weights_mib"] = weight_bytes(mixer) / 2**20
        for mode in ("forward", "training"):
            try:
                ours = prepare(mode, mixer, x)
            except Skipped as reason:
                row[mode] = {"skipped": str(reason)}
                continue
            timings = compare(prepare(mode, reference, x), {"mixer": ours}, rounds)
            row[mode] = timing_json(timings["mixer"], timings[REFERENCE])
            row[mode]["attention_ms"] = timings[REFERENCE].median
    return rows


def beside_peers(spec: MixerSpec, peers: list[Peer], shape: Shape, rounds: int) -> list[dict[str, Any]]:
    """Compare a mixer with its peers at one shape; a ratio is only there where the values agree."""
    rows: list[dict[str, Any]] = [
        {"mixer": spec.name, "peer": peer.label, "shape": str(shape)} for peer in peers
    ]
    try:
        mixer = build(spec, shape)
    except Skipped as reason:
        return [row | {"skipped": str(reason)} for row in rows]
    x = shape.example()
    agreeing: dict[str, torch.nn.Module] = {}
    for row, peer in zip(rows, peers, strict=True):
        try:
            module = peer.make(mixer)
        except (Missing, Skipped) as reason:
            row["missing" if isinstance(reason, Missing) else "skipped"] = str(reason)
            continue
        trains = peer.trains_up_to is None or shape.tokens <= peer.trains_up_to
        agreed = agreement(mixer, module, x[:1], training=trains)
        row |= {"agrees": bool(agreed), "difference": agreed.values, "gradient_difference": agreed.gradients}
        if agreed:
            agreeing[peer.label] = module
            if not trains:
                row["training"] = {"skipped": "too slow"}
    for mode in ("forward", "training"):
        _time_peers(mode, mixer, agreeing, rows, x, rounds)
    return rows


def _time_peers(
    mode: str,
    mixer: torch.nn.Module,
    peers: dict[str, torch.nn.Module],
    rows: list[dict[str, Any]],
    x: torch.Tensor,
    rounds: int,
) -> None:
    of = {row["peer"]: row for row in rows}
    runs = {}
    for label, module in peers.items():
        try:
            if mode not in of[label]:
                runs[label] = prepare(mode, module, x, PEER_PATIENCE)
        except Skipped as reason:
            of[label][mode] = {"skipped": str(reason)}
    try:
        ours = prepare(mode, mixer, x)
    except Skipped as reason:
        runs = {}
        for label in peers:
            of[label].setdefault(mode, {"skipped": f"the mixer is {reason}"})
    if not runs:
        return
    timings = compare(ours, runs, rounds)
    for label in runs:
        of[label][mode] = timing_json(timings[label], timings[REFERENCE])
        of[label][mode]["mixer_ms"] = timings[REFERENCE].median


def all_beside_peers(
    specs: list[MixerSpec], peers: list[Peer], shapes: tuple[Shape, ...], quick: bool, rounds: int
) -> list[dict[str, Any]]:
    """Compare every mixer that has peers with them, at every shape that they can take."""
    jobs: dict[tuple[str, Shape], list[Peer]] = {}
    for peer in peers:
        for shape in shapes + (() if quick else MORE_SHAPES.get(peer.mixer, ())):
            jobs.setdefault((peer.mixer, peer.at(shape)), []).append(peer)
    chosen = {spec.name: spec for spec in specs}
    jobs = {job: group for job, group in jobs.items() if job[0] in chosen}
    rows = []
    for (name, shape), group in track(jobs.items(), description="peers", transient=True):
        rows += beside_peers(chosen[name], group, shape, rounds)
    return rows


def attention_table(rows: list[dict[str, Any]]) -> Table:
    """Return the table of one shape."""
    table = Table(title=f"{rows[0]['shape']} heads")
    for column in (
        "mixer",
        "width",
        "weights, MiB",
        "forward, ms",
        "of attention",
        "training, ms",
        "of attention",
    ):
        first = column == "mixer"
        table.add_column(column, justify="left" if first else "right", no_wrap=first)
    for row in rows:
        if "skipped" in row:
            table.add_row(row["mixer"], f"{row['width']:g}", "[dim]skipped")
            continue
        cells = [row["mixer"], f"{row['width']:g}", f"{row['weights_mib']:.1f}"]
        for mode in ("forward", "training"):
            if "skipped" in row[mode]:
                cells += [f"[dim]{row[mode]['skipped']}", ""]
            else:
                cells += [f"{row[mode]['median_ms']:.3g}", f"{row[mode]['ratio']:.0%}"]
        table.add_row(*cells)
    return table


def peer_table(rows: list[dict[str, Any]]) -> Table:
    """Return the table of all peers: ratios are the peer's time over the mixer's."""
    table = Table(title="peers: their time over the mixer's, same weights, same values (B x N x D / heads)")
    for column in ("mixer", "peer", "shape", "difference", "mixer, ms", "forward", "mixer, ms", "training"):
        name = column in ("mixer", "peer", "shape")
        table.add_column(column, justify="left" if name else "right", no_wrap=name)
    for row in rows:
        cells = [row["mixer"], row["peer"], row["shape"]]
        if "missing" in row or "skipped" in row:
            table.add_row(*cells, "[dim]missing" if "missing" in row else "[dim]skipped")
        elif not row["agrees"]:
            table.add_row(*cells, f"[red]{_differences(row)}", "", "[red]differs")
        else:
            for mode in ("forward", "training"):
                timing = row[mode]
                if "skipped" in timing:
                    cells += ["", f"[dim]{timing['skipped']}"]
                else:
                    spread = f"{timing['ratio_low']:.2f}-{timing['ratio_high']:.2f}"
                    cells += [f"{timing['mixer_ms']:.3g}", f"{timing['ratio']:.2f}x ({spread})"]
            table.add_row(*cells[:3], f"{row['difference']:.0e}", *cells[3:])
    return table


def reasons(rows: list[dict[str, Any]]) -> list[str]:
    """Return a line for each row that is missing or was skipped, and why; the same reason once."""
    lines = {
        f"{row.get('peer', row['mixer'])}: {row.get('missing') or row['skipped']}": None
        for row in rows
        if "missing" in row or "skipped" in row
    }
    return list(lines)


def _differences(row: dict[str, Any]) -> str:
    return str(Agreement(values=row["difference"], gradients=row["gradient_difference"]))


def library_versions() -> dict[str, str]:
    """Return the versions of the peers' libraries; empty where one is not installed."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = ""
    return found


@click.command()
@click.option("--mixers", "names", default="", help="Only these, separated by commas.")
@click.option("--parts", default=",".join(PARTS), show_default=True)
@click.option("--picture", type=click.Path(path_type=Path), help="Draw the growth here, as a PNG.")
@click.option("--fla", type=click.Path(path_type=Path), help="The sources of flash-linear-attention.")
@click.option("--rounds", default=ROUNDS, show_default=True)
@click.option("--shapes", "most", default=len(SHAPES), show_default=True, help="Only the first so many.")
@click.option(
    "--threads", "count", type=int, default=default_threads, help="Threads; as many as there are cores."
)
@json_option
@quick_option
def main(
    names: str,
    parts: str,
    picture: Path | None,
    fla: Path | None,
    rounds: int,
    most: int,
    count: int,
    json_path: Path | None,
    quick: bool,
) -> None:
    """Run the benchmark; the exit code is 1 if a peer computes something else than the mixer."""
    console = Console(width=None if sys.stdout.isatty() else FILE_WIDTH)
    specs = builtin_mixers()
    if names:
        try:
            specs = [get_registry().mixers.get(name) for name in names.split(",")]
        except MixerzooError as error:
            raise click.BadParameter(str(error), param_hint="--mixers") from None
    if unknown := set(parts.split(",")) - set(PARTS):
        raise click.BadParameter(f"unknown: {', '.join(sorted(unknown))}", param_hint="--parts")
    shapes, rounds = (QUICK_SHAPES, 3) if quick else (SHAPES[:most], rounds)
    figures: dict[str, Any] = {"peer_versions": library_versions(), "rounds": rounds, "quick": quick}
    with threads(count):
        if "attention" in parts:
            figures["attention"] = []
            for shape in shapes:
                rows = beside_attention(specs, shape, rounds)
                console.print(attention_table(rows), *reasons(rows), sep="\n", highlight=False)
                figures["attention"] += rows
        if "peers" in parts:
            figures["peers"] = all_beside_peers(specs, all_peers(fla), shapes, quick, rounds)
            if figures["peers"]:
                lines = reasons(figures["peers"])
                console.print(peer_table(figures["peers"]), *lines, sep="\n", highlight=False)
        if "growth" in parts:
            at_attention = [spec for spec in specs if kind_of(spec) == "attention"]
            figures["growth"] = growth.grow(at_attention, quick, rounds)
            for figure in ("ms", "peak_bytes"):
                console.print(growth.table(figures["growth"], figure))
            if picture is not None:
                draw(figures["growth"], picture)
    differing = [row for row in figures.get("peers", ()) if row.get("agrees") is False]
    figures["agree"] = not differing
    write(json_path, figures, threads=count, echo=False)
    for row in differing:
        console.print(f"[red]{row['mixer']} and {row['peer']} differ at {row['shape']}: {_differences(row)}")
    sys.exit(1 if differing else 0)


if __name__ == "__main__":
    main()
