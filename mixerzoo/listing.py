"""The registered mixers for a terminal: as a table, a family after the other, or one with all it says of itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rich.table import Table
from rich.text import Text

from mixerzoo.registry import Origin, Registry
from mixerzoo.spec import MixerSpec

MARKS: Mapping[str, str] = {
    "c": "causal",
    "m": "takes masks",
    "x": "exportable",
    "i": "inherits from the teacher",
    "r": "readout in closed form",
}
LEGEND = "can: " + ", ".join(f"{mark} {meaning}" for mark, meaning in MARKS.items())


def families(specs: Iterable[MixerSpec]) -> dict[str, list[MixerSpec]]:
    """Return family -> mixers, both in the order they are given in."""
    found: dict[str, list[MixerSpec]] = {}
    for spec in specs:
        found.setdefault(spec.family, []).append(spec)
    return found


def length(spec: MixerSpec) -> str:
    """Return the numbers of tokens that a mixer's weights work for: any, those of one grid, or a fixed one."""
    return "any" if spec.caps.any_length else "grid" if "grid" in spec.asks else "fixed"


def marks(spec: MixerSpec) -> str:
    """Return what a mixer can do, a letter of MARKS each, and a dot for what it cannot."""
    caps = spec.caps
    can = (caps.causal, caps.masks, caps.exportable, spec.inherit is not None, spec.readout is not None)
    return " ".join(mark if able else "." for mark, able in zip(MARKS, can, strict=True))


def mixer_table(registry: Registry) -> Table:
    """Return all mixers as a table."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("mixer", max_width=24, overflow="fold")
    table.add_column("", no_wrap=True)
    table.add_column("at", no_wrap=True)
    table.add_column("tokens", no_wrap=True)
    table.add_column("can", no_wrap=True)
    table.add_column("widths", max_width=13)
    table.add_column("what it is", ratio=1, overflow="fold")
    origins: dict[Origin, list[MixerSpec]] = {}
    for spec in registry.mixers:
        origins.setdefault(registry.mixers.origin(spec.name), []).append(spec)
    for origin, specs in origins.items():
        of = Text(str(origin), "dim")
        for family, members in families(specs).items():
            table.add_row()
            table.add_row(Text(family, "bold"), "", "", "", "", "", of)
            of = Text()  # said once for all of its families
            for spec in members:
                table.add_row(
                    f"  {spec.name}",
                    spec.letter,
                    "both" if len(spec.kinds) > 1 else "attn" if "attention" in spec.kinds else "mlp",
                    length(spec),
                    marks(spec),
                    " ".join(f"{width:g}" for width in spec.widths),
                    Text(spec.summary),
                )
    return table


def details(spec: MixerSpec, origin: Origin) -> str:
    """Return all that a mixer says of itself, line by line."""
    claims = [name.replace("_", " ") for name, claimed in vars(spec.caps).items() if claimed]
    claims += ["inherits"] if spec.inherit else []
    claims += ["closed form"] if spec.readout else []
    lines = {
        "what it is": spec.summary,
        "letter": spec.letter,
        "from": f"{origin}, {spec.family}",
        "stands at": ", ".join(sorted(spec.kinds)),
        "widths": " ".join(f"{width:g}" for width in spec.widths),
        "tokens": length(spec),
        "can": ", ".join(claims),
        "cost": spec.cost,
        "paper": spec.paper,
    }
    return "\n".join([spec.name, *(f"  {name:<12}{value}" for name, value in lines.items() if value)])
