"""Candidates and plans: what stands at each site. Plain data, JSON in and out, never an import."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from mixerzoo.errors import MixerzooError
from mixerzoo.spec import KINDS, Site

KEEP = "keep"
KEEP_LETTER = "A"  # "as it was"

_CANDIDATE = re.compile(r"(?P<mixer>[a-z][a-z0-9_]*)(@(?P<width>[^\s\[\]]+)(\[(?P<sizes>[^\[\]]+)\])?)?")
_SIZE = re.compile(r"(?P<kind>[a-z][a-z0-9_]*)=(?P<count>[1-9][0-9]{0,8})")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _sizes(text: str | None) -> tuple[tuple[str, int], ...] | None:
    """Read `heads=2,hidden=40`; None if it is not that, or names a kind twice."""
    matches = [_SIZE.fullmatch(part) for part in text.split(",")] if text else []
    sizes = {match["kind"]: int(match["count"]) for match in matches if match}
    return tuple(sorted(sizes.items())) if len(sizes) == len(matches) else None


@dataclass(frozen=True, order=True)
class Candidate:
    """A mixer at a width, written `glu_mlp@0.5`; `keep` has no width.

    One that was pruned has fewer units of some kinds than its width says, `glu_mlp@0.5[heads=2]`; sizes are in the
    order of the kinds' names.
    """

    mixer: str
    width: float = 1.0
    sizes: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        if self.mixer == KEEP:
            return KEEP
        short = f"{self.width:g}"
        # Six digits do for 0.5, not for a third: what is written must be read back as the same width.
        text = f"{self.mixer}@{short if float(short) == self.width else repr(self.width)}"
        return f"{text}[{','.join(f'{kind}={count}' for kind, count in self.sizes)}]" if self.sizes else text

    @property
    def is_keep(self) -> bool:
        """Whether the teacher's own module stays."""
        return self.mixer == KEEP

    def resized(self, sizes: Mapping[str, int]) -> Candidate:
        """Return it with so many units of some kinds."""
        return replace(self, sizes=tuple(sorted({**dict(self.sizes), **sizes}.items())))

    @classmethod
    def parse(cls, text: str) -> Candidate:
        """Read `mixer@width`, `mixer` (width 1), `mixer@width[kind=units,...]` or `keep`.

        Raises:
            MixerzooError: for anything else.
        """
        match = _CANDIDATE.fullmatch(text) if isinstance(text, str) else None
        width = 1.0 if match is None or match["width"] is None else _number(match["width"])
        sizes = None if match is None else _sizes(match["sizes"])
        if (
            match is None
            or sizes is None
            or not 0 < width < math.inf
            or (text != KEEP and match["mixer"] == KEEP)
        ):
            raise MixerzooError(f"candidate '{text}': write mixer@width, such as glu_mlp@0.5, or {KEEP}")
        return cls(match["mixer"], width, sizes)


KEEP_CANDIDATE = Candidate(KEEP)


@dataclass(frozen=True)
class Plan:
    """One candidate a site, in site order."""

    choices: tuple[tuple[str, Candidate], ...]

    @classmethod
    def of(cls, choices: Mapping[str, Candidate], sites: Sequence[Site]) -> Plan:
        """Make a plan in site order; sites that are not named keep the teacher's module.

        Raises:
            MixerzooError: if a name is not a site.
        """
        unknown = set(choices) - {site.name for site in sites}
        if unknown:
            raise MixerzooError(f"plan: '{sorted(unknown)[0]}' is not a site of this teacher")
        return cls(tuple((site.name, choices.get(site.name, KEEP_CANDIDATE)) for site in sites))

    def __getitem__(self, site: str) -> Candidate:
        return dict(self.choices)[site]

    def to_json(self) -> dict[str, str]:
        """Return site -> candidate, in site order."""
        return {site: str(candidate) for site, candidate in self.choices}

    @classmethod
    def from_json(cls, data: Mapping[str, str]) -> Plan:
        """Rebuild a plan from `to_json`."""
        return cls(tuple((site, Candidate.parse(text)) for site, text in data.items()))

    @property
    def key(self) -> str:
        """A short stable hash of the choices."""
        return hashlib.sha256(json.dumps(self.to_json()).encode()).hexdigest()[:12]

    def replaced(self) -> int:
        """Return how many sites do not keep the teacher's module."""
        return sum(not candidate.is_keep for _, candidate in self.choices)

    def short_name(self, sites: Sequence[Site], letters: Mapping[str, str]) -> str:
        """Return a nickname such as `A3-G4-N1`: run-length, each mixer by its letter (A: as it was).

        Attention sites come first, then, after a slash, mlp sites. Widths are not in it.
        """
        kinds = {site.name: site.kind for site in sites}
        parts = []
        for kind in KINDS:
            row = [
                KEEP_LETTER if candidate.is_keep else letters.get(candidate.mixer, candidate.mixer[0].upper())
                for site, candidate in self.choices
                if kinds[site] == kind
            ]
            if row:
                parts.append("-".join(f"{letter}{len(list(run))}" for letter, run in groupby(row)))
        return "/".join(parts)
