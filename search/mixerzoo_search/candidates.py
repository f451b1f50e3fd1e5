"""Which candidates there are, and their distillation into the library: closed form first, steps where it pays."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch

from mixerzoo.capture import Capture
from mixerzoo.distill import Recipe, distill
from mixerzoo.errors import MixerzooError
from mixerzoo.hosts import Teacher
from mixerzoo.library import Entry, Library, candidate_key
from mixerzoo.plan import Candidate
from mixerzoo.registry import get_registry
from mixerzoo.spec import MixerSpec, Site
from mixerzoo_search.prior import Clue, DamageForecast, predict_damage

Candidates = Mapping[str, tuple[Candidate, ...]]  # site -> candidates, without `keep`


def list_candidates(
    sites: Sequence[Site], *, mixers: Sequence[str] = (), widths: Sequence[float] = ()
) -> dict[str, tuple[Candidate, ...]]:
    """Return the candidates of every site.

    Args:
        sites: the teacher's.
        mixers: names to choose from; empty for all that are registered.
        widths: widths to choose from; empty for all. A mixer of a single width is not narrowed by it.

    Raises:
        MixerzooError: for an unknown mixer (with a suggestion), or if no candidate is left at any site.
    """
    shelf = get_registry().mixers
    specs: list[MixerSpec] = [shelf.get(name) for name in mixers] if mixers else list(shelf)
    found: dict[str, tuple[Candidate, ...]] = {}
    for site in sites:
        row: list[Candidate] = []
        for spec in specs:
            if site.kind not in spec.kinds:
                continue
            chosen = [w for w in spec.widths if not widths or len(spec.widths) == 1 or w in widths]
            row += [Candidate(spec.name, width) for width in chosen if _can_be_made(spec, site, width)]
        found[site.name] = tuple(row)
    if not any(found.values()):
        raise MixerzooError(
            f"no candidate for any site: mixers {', '.join(mixers) or 'all'}, "
            f"widths {', '.join(f'{w:g}' for w in widths) or 'all'}; see `mixerzoo mixers`"
        )
    return found


def _can_be_made(spec: MixerSpec, site: Site, width: float) -> bool:
    try:
        with torch.device("meta"):  # shapes only: some mixers are large
            spec.make(site, width)
    except MixerzooError:
        return False
    return True


class CandidateLibrary:
    """The library of one teacher and data set: distils what is missing, finds the best of what is there."""

    def __init__(self, library: Library, teacher: Teacher, *, data: str, images: int, seed: int) -> None:
        self.library = library
        self.teacher = teacher
        self.data = data
        self.images = images
        self.seed = seed

    def key(self, site: Site, candidate: Candidate, steps: int) -> str:
        """Return the library key of a candidate after so many steps."""
        return candidate_key(
            teacher=self.teacher.fingerprint,
            data=self.data,
            site=site,
            candidate=candidate,
            plugin=str(get_registry().mixers.origin(candidate.mixer)),
            recipe=Recipe(steps=steps, seed=self.seed),
            images=self.images,
        )

    def find(self, site: Site, candidate: Candidate, steps: int) -> Entry | None:
        """Return the entry if it was made before and is whole."""
        return self.library.get(self.key(site, candidate, steps))

    def make(self, site: Site, candidate: Candidate, steps: int, capture: Capture) -> Entry:
        """Distil a candidate; with steps, from its closed form."""
        start = None
        if steps:
            closed = self.find(site, candidate, 0)
            start = None if closed is None or closed.failed else self.library.state(closed.key)
        spec = get_registry().mixers.get(candidate.mixer)
        result = distill(
            spec,
            candidate.width,
            site,
            capture.sites[site.name],
            Recipe(steps=steps, seed=self.seed),
            start=start,
        )
        return self.library.put(self.key(site, candidate, steps), site, candidate, result)

    def best(self, site: Site, candidate: Candidate, steps: int) -> Entry | None:
        """Return the better of the closed form and the stepped one; None if neither is usable."""
        entries = [self.find(site, candidate, number) for number in sorted({0, steps})]
        usable = [entry for entry in entries if entry is not None and not entry.failed]
        return min(usable, key=lambda entry: entry.nmse, default=None)

    def state(self, entry: Entry) -> dict[str, torch.Tensor]:
        """Return the weights of an entry."""
        return self.library.state(entry.key)


def missing(library: CandidateLibrary, candidates: Candidates, steps: int) -> list[tuple[Site, Candidate]]:
    """Return what has to be distilled, in site order."""
    return [
        (site, candidate)
        for site in library.teacher.sites
        for candidate in candidates[site.name]
        if library.find(site, candidate, steps) is None
    ]


def forecast(
    library: CandidateLibrary,
    candidates: Candidates,
    statistics: Mapping[str, Mapping[str, float]],
    *,
    steps: int,
    scores: Mapping[tuple[str, Candidate], float] | None = None,
) -> DamageForecast:
    """Predict the damage of every candidate from its site's statistics, its error, and the scores so far."""
    clues = []
    for site in library.teacher.sites:
        for candidate in candidates[site.name]:
            entry = library.best(site, candidate, steps)
            clues.append(
                Clue(
                    site=site.name,
                    candidate=candidate,
                    statistics=statistics[site.name],
                    nmse=None if entry is None else entry.nmse,
                    kind=site.kind,
                )
            )
    return predict_damage(clues, scores)


def not_dominated(
    candidates: Candidates,
    damage: Mapping[tuple[str, Candidate], float],
    change_ms: Mapping[str, Mapping[str, float]],
    *,
    keep_share: Callable[[], bool],
    margin: float = 1.5,
    tolerance_ms: float,
) -> dict[str, tuple[Candidate, ...]]:
    """Leave out candidates that another one at the same site clearly beats in both damage and latency.

    Args:
        candidates: site -> candidates.
        damage: predicted, for each (site, candidate).
        change_ms: site -> candidate -> change of latency.
        keep_share: draws whether a beaten candidate stays all the same, so that a wrong prediction costs time
            and nothing else.
        margin: how many times the damage must be higher to be clear.
        tolerance_ms: how far two latencies must differ to be told apart.
    """
    chosen: dict[str, tuple[Candidate, ...]] = {}
    for site, row in candidates.items():
        ms = {c: change_ms[site][str(c)] for c in row}
        harm = {c: damage.get((site, c), math.inf) for c in row}
        chosen[site] = tuple(
            c
            for c in row
            if math.isfinite(harm[c])
            and (
                (
                    not any(
                        harm[o] * margin < harm[c] and ms[o] <= ms[c] + tolerance_ms for o in row if o != c
                    )
                    # Keeping the teacher's module does no damage: a candidate that is slower than it is beaten.
                    and ms[c] < -tolerance_ms
                )
                or keep_share()
            )
        )
    return chosen


def promising(
    candidates: Candidates,
    damage: Mapping[tuple[str, Candidate], float],
    change_ms: Mapping[str, Mapping[str, float]],
) -> list[tuple[str, Candidate]]:
    """Return (site, candidate) on each site's own frontier of damage and latency, most damage per ms first.

    Steps are worth most where a candidate is already useful: on the frontier of its site.
    """
    found: list[tuple[float, str, Candidate]] = []
    for site, row in candidates.items():
        best = math.inf
        for candidate in sorted(row, key=lambda c: (change_ms[site][str(c)], damage[site, c])):
            harm, ms = damage[site, candidate], change_ms[site][str(candidate)]
            if harm < best and ms < 0:
                best = harm
                found.append((harm / -ms, site, candidate))
    return [(site, candidate) for _, site, candidate in sorted(found, key=lambda f: (f[0], f[1], str(f[2])))]
