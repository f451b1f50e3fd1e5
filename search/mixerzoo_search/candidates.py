"""Which candidates there are, and where their weights come from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch

from mixerzoo.capture import Capture
from mixerzoo.code_hash import code_hash
from mixerzoo.distill import Recipe, distill
from mixerzoo.errors import MixerzooError
from mixerzoo.hosts import Teacher
from mixerzoo.latency import LatencyTable
from mixerzoo.library.entries import Entry, Order, Source
from mixerzoo.library.folder import Library
from mixerzoo.plan import Candidate
from mixerzoo.registry import get_registry
from mixerzoo.spec import MixerSpec, Site
from mixerzoo.targets import Targets

Candidates = Mapping[str, tuple[Candidate, ...]]  # site -> candidates, without `keep`
Pair = tuple[str, Candidate]  # a site and one of its candidates
Damage = Mapping[Pair, float]


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
        spec.outline(site, width)
    except MixerzooError:
        return False
    return True


def faster_than_teacher(candidates: Candidates, table: LatencyTable, *, tolerance_ms: float) -> Candidates:
    """Leave out candidates that save no time: keeping the teacher's module is as fast, and does no damage."""
    return {
        site: tuple(c for c in row if table.change_ms[site][str(c)] < -tolerance_ms)
        for site, row in candidates.items()
    }


def not_beaten(
    candidates: Candidates,
    damage: Damage,
    table: LatencyTable,
    *,
    keep_all_the_same: Callable[[], bool],
    margin: float = 1.5,
    tolerance_ms: float,
) -> Candidates:
    """Leave out candidates that another one at the same site clearly beats in both damage and latency.

    Args:
        candidates: site -> candidates.
        damage: predicted, for each (site, candidate).
        table: latencies.
        keep_all_the_same: draws whether a beaten candidate stays, so that a wrong prediction costs time and
            nothing else.
        margin: how many times the damage must be higher to be clear.
        tolerance_ms: how far two latencies must differ to be told apart.
    """
    return {
        site: tuple(
            c
            for c in row
            if not beaten(site, c, row, damage, table, margin=margin, tolerance_ms=tolerance_ms)
            or keep_all_the_same()
        )
        for site, row in candidates.items()
    }


def beaten(
    site: str,
    candidate: Candidate,
    others: Sequence[Candidate],
    damage: Damage,
    table: LatencyTable,
    *,
    margin: float,
    tolerance_ms: float,
) -> bool:
    """Say whether another candidate does clearly less damage (by `margin`) and is as fast (to the tolerance)."""
    ms, harm = table.change_ms[site], damage[site, candidate]
    return any(
        damage[site, other] * margin < harm and ms[str(other)] <= ms[str(candidate)] + tolerance_ms
        for other in others
        if other != candidate
    )


def wider_widths(pairs: Iterable[Pair]) -> dict[Pair, float]:
    """Return the width that each candidate may begin its steps from: the next wider one of its mixer before it, or 0.

    Args:
        pairs: sites and candidates, in the order in which they take steps.
    """
    found: dict[Pair, float] = {}
    before: dict[tuple[str, str], list[float]] = {}
    for site, candidate in pairs:
        widths = before.setdefault((site, candidate.mixer), [])
        found[site, candidate] = min((width for width in widths if width > candidate.width), default=0.0)
        widths.append(candidate.width)
    return found


class CandidateLibrary:
    """The part of a library that is of one teacher and data: makes what is missing, finds the best of what is there.

    Attributes:
        files: the library.
        teacher: the teacher.
        stepped: sites and candidates whose gradient steps count. Others may have taken steps in other searches: what
            a search finds must not depend on what it happens to find in the library.
        wider: the width that a candidate's steps may begin from, see `wider_widths`; it is part of what they make.
    """

    def __init__(
        self,
        library: Library,
        teacher: Teacher,
        source: Source,
        *,
        steps: int,
        seed: int,
        objective: str = "nmse",
        stepped: Iterable[Pair] = (),
        wider: Mapping[Pair, float] | None = None,
    ) -> None:
        self.files = library
        self.teacher = teacher
        self.source = source
        self.steps = steps
        self.seed = seed
        self.objective = objective
        self.stepped = set(stepped)
        self.wider = wider or {}
        self._orders: dict[tuple[str, Candidate, Recipe], tuple[str, Order]] = {}
        self._targets: Targets | None = None  # of the site at which the last candidate was made

    def _order(self, site: str, candidate: Candidate, *, stepped: bool) -> tuple[str, Order]:
        """Return what has to be made, and its key first."""
        recipe = self.recipe(stepped=stepped)
        if stepped:
            recipe = replace(recipe, wider=self.wider.get((site, candidate), 0.0))
        asked = site, candidate, recipe
        if asked not in self._orders:
            shelf = get_registry().mixers
            order = Order(
                source=self.source,
                site=self.teacher.site(site),
                candidate=candidate,
                plugin=str(shelf.origin(candidate.mixer)),
                code=code_hash(shelf.get(candidate.mixer)),
                recipe=recipe,
            )
            self._orders[asked] = order.key, order
        return self._orders[asked]

    def recipe(self, *, stepped: bool) -> Recipe:
        """Return the recipe: closed form, or gradient steps after it."""
        if not stepped:
            return Recipe(seed=self.seed)
        return Recipe(steps=self.steps, seed=self.seed, objective=self.objective)

    def find(self, site: str, candidate: Candidate, *, stepped: bool) -> Entry | None:
        """Return the entry if it was made before, by this search or another one, and is whole."""
        return self.files.get(self._order(site, candidate, stepped=stepped)[0])

    def make(
        self, site: str, candidate: Candidate, capture: Capture, *, stepped: bool, wait: bool = True
    ) -> Entry | None:
        """Distil a candidate, unless another process has; with steps, from its closed form.

        Returns None if another process is at it, unless told to `wait` for it.
        """
        key, order = self._order(site, candidate, stepped=stepped)
        with self.files.claim(key, wait=wait) as mine:
            if not mine:
                return None
            entry = self.files.get(key)
            if entry is None:
                start = wider = None
                if stepped:
                    wider = self._wider_state(site, candidate, capture)
                    closed = self.find(site, candidate, stepped=False)
                    start = None if closed is None or closed.failed else self.files.state(closed.key)
                spec = get_registry().mixers.get(candidate.mixer)
                captured = capture.sites[site]
                if self._targets is None or self._targets.pairs is not captured:
                    self._targets = Targets(captured)
                result = distill(
                    spec,
                    candidate.width,
                    order.site,
                    captured,
                    order.recipe,
                    start=start,
                    wider=wider,
                    targets=self._targets,
                )
                entry = self.files.put(order, result)
        if stepped:
            self.stepped.add((site, candidate))
        return entry

    def _wider_state(
        self, site: str, candidate: Candidate, capture: Capture
    ) -> dict[str, torch.Tensor] | None:
        """Return the weights that a candidate's steps may begin from, waiting for whoever makes them; or None."""
        width = self.wider.get((site, candidate))
        if not width:
            return None
        entry = self.make(site, Candidate(candidate.mixer, width), capture, stepped=True)
        return None if entry is None or entry.failed else self.state(entry)

    def release_targets(self) -> None:
        """Let go of what the candidates of the last site were solved for."""
        self._targets = None

    def best(self, site: str, candidate: Candidate) -> Entry | None:
        """Return the better of the closed form and the stepped one, if that counts; None if neither is usable.

        Errors only compare where steps go by them; else a stepped form that counts is better by its own objective.
        """
        forms = (False, True) if (site, candidate) in self.stepped else (False,)
        entries = [self.find(site, candidate, stepped=stepped) for stepped in forms]
        usable = [entry for entry in entries if entry is not None and not entry.failed]
        if self.objective != "nmse":
            return usable[-1] if usable else None
        return min(usable, key=lambda entry: entry.nmse, default=None)

    def state(self, entry: Entry) -> dict[str, torch.Tensor]:
        """Return the weights of an entry."""
        return self.files.state(entry.key)
