"""What a candidate changes: it stands at all sites of one shape at once, beside the teacher.

Latency depends on shapes, not on weights, so that untrained mixers do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from mixerzoo.hosts import Replacement, assemble
from mixerzoo.latency.rounds import REFERENCE, Rounds
from mixerzoo.latency.stopwatch import Stopwatch
from mixerzoo.plan import Candidate
from mixerzoo.registry import get_registry
from mixerzoo.spec import Site

PLACED_PARAMS = 100_000_000  # a candidate stands at as many sites at once as stay below this
# A slower candidate than the teacher's own module is of no use, however much slower: seen by a site's share.
# Many are timed; what they take less once their caches are warm is left to the correction on whole students.
TABLE = Rounds(least=7, most=27, precision=0.015, slow=1.02, settle_ms=0)


@dataclass(frozen=True, kw_only=True)
class InPlace:
    """A candidate at several sites of one shape, measured.

    Attributes:
        ratio: the student's latency over the teacher's.
        error: half the width of its 95 % confidence interval, relative.
        sites: at how many sites it stood.
    """

    ratio: float
    error: float
    sites: int

    @property
    def change(self) -> float:
        """What it changes at one site, as a share of the teacher's latency; negative is faster."""
        return (self.ratio - 1) / self.sites

    @property
    def change_error(self) -> float:
        """Error of the change, in the same unit."""
        return self.ratio * self.error / self.sites


Placed = Mapping[str, Mapping[str, InPlace]]  # shape -> candidate -> measured


@dataclass(frozen=True, kw_only=True)
class LatencyTable:
    """What each candidate does to the teacher's latency, in ms: negative is faster.

    Attributes:
        base_ms: the teacher.
        change_ms: site -> candidate -> change; sites of the same shape share their measurements.
        error_ms: site -> candidate -> half the width of its 95 % confidence interval.
    """

    base_ms: float
    change_ms: dict[str, dict[str, float]]
    error_ms: dict[str, dict[str, float]] = field(default_factory=dict)

    @classmethod
    def of(cls, sites: Sequence[Site], placed: Placed, *, base_ms: float) -> LatencyTable:
        """Make the table of what was measured at each shape of site."""
        rows = {
            site.name: placed.get(shape, {}) for shape, group in by_shape(sites).items() for site in group
        }
        return cls(
            base_ms=base_ms,
            change_ms={s.name: {c: base_ms * p.change for c, p in rows[s.name].items()} for s in sites},
            error_ms={s.name: {c: base_ms * p.change_error for c, p in rows[s.name].items()} for s in sites},
        )


def measure_in_place(
    stopwatch: Stopwatch,
    candidates: Mapping[str, Sequence[Candidate]],
    *,
    rounds: Rounds = TABLE,
    on_round: Callable[[int], None] = lambda done: None,
) -> tuple[float, dict[str, dict[str, InPlace]]]:
    """Time every candidate in place; return the teacher's latency in ms, and shape -> candidate -> measured.

    Args:
        stopwatch: the teacher and the conditions.
        candidates: shape -> candidates, without `keep`.
        rounds: how long to measure.
        on_round: called with the number of rounds done, `rounds.least` in all.
    """
    teacher = stopwatch.teacher
    students: dict[str, nn.Module] = {}
    placed: dict[str, int] = {}
    groups = by_shape(teacher.sites)
    for shape, row in candidates.items():
        for candidate in row:
            modules = place_many(candidate, groups[shape])
            students[f"{shape} {candidate}"] = assemble(teacher.model, modules)
            placed[f"{shape} {candidate}"] = len(modules)
    timings = stopwatch.time(students, rounds=rounds, on_round=on_round)
    found: dict[str, dict[str, InPlace]] = {}
    for shape, row in candidates.items():
        found[shape] = {}
        for candidate in row:
            name = f"{shape} {candidate}"
            timing = timings[name]
            found[shape][str(candidate)] = InPlace(ratio=timing.ratio, error=timing.error, sites=placed[name])
    return timings[REFERENCE].median, found


def measure_table(
    stopwatch: Stopwatch,
    candidates: Mapping[str, Sequence[Candidate]],
    *,
    rounds: Rounds = TABLE,
    on_round: Callable[[int], None] = lambda done: None,
) -> LatencyTable:
    """Time every candidate in place, and keep nothing.

    Args:
        stopwatch: the teacher and the conditions.
        candidates: site -> candidates, without `keep`.
        rounds: how long to measure.
        on_round: called with the number of rounds done, `rounds.least` in all.
    """
    sites = stopwatch.teacher.sites
    base, placed = measure_in_place(stopwatch, of_shapes(sites, candidates), rounds=rounds, on_round=on_round)
    return LatencyTable.of(sites, placed, base_ms=base)


def of_shapes(
    sites: Sequence[Site], candidates: Mapping[str, Sequence[Candidate]]
) -> dict[str, list[Candidate]]:
    """Return shape -> candidates, from site -> candidates."""
    return {
        shape: list(dict.fromkeys(c for site in group for c in candidates.get(site.name, ())))
        for shape, group in by_shape(sites).items()
    }


def place_many(candidate: Candidate, sites: Sequence[Site]) -> dict[str, nn.Module]:
    """Return a fresh replacement for each site, or for the first few where the candidate is large."""
    spec = get_registry().mixers.get(candidate.mixer)
    modules: dict[str, nn.Module] = {}
    total = 0
    for site in sites:
        mixer = spec.make(site, candidate.width, dict(candidate.sizes)).eval().requires_grad_(False)
        modules[site.name] = Replacement(mixer, site, masks=spec.caps.masks)
        total += sum(p.numel() for p in mixer.parameters())
        if total > PLACED_PARAMS:
            break
    return modules


def by_shape(sites: Sequence[Site]) -> dict[str, list[Site]]:
    """Return groups of sites that a candidate cannot tell apart."""
    groups: dict[str, list[Site]] = {}
    for site in sites:
        groups.setdefault(shape_of(site), []).append(site)
    return groups


def shape_of(site: Site) -> str:
    """Return all of a site that a candidate's latency there can depend on, as people can read it."""
    known: dict[str, object] = {"D": site.dim, "N": site.tokens}
    if site.kind == "attention":
        known |= {"H": site.heads}
    else:
        known |= {"hidden": site.hidden, "activation": site.activation}
    parts = [f"{name}={value}" for name, value in known.items()]
    parts += [f"prefix={site.prefix}"] if site.prefix else []
    parts += [f"grid={site.grid[0]}x{site.grid[1]}"] if site.grid else []
    parts += ["gated"] if site.gated else []
    parts += ["causal"] if site.causal else []
    return f"{site.kind} {' '.join(parts)}"
