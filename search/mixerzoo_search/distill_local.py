"""`mixerzoo distill --recipe local`: a library of candidates for a teacher and its data, without budget or search.

The candidates are made as a search makes them, and lie under the same keys: a search with the same teacher, data,
images and seed finds them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixerzoo.capture import Capture, capture
from mixerzoo.data import Dataset, image_batches
from mixerzoo.errors import MixerzooError
from mixerzoo.hosts import Teacher
from mixerzoo.library.entries import Entry, Source
from mixerzoo.library.folder import Library, check_folder
from mixerzoo.plan import Candidate
from mixerzoo.progress import Reporter
from mixerzoo.registry import get_registry
from mixerzoo_search.candidates import CandidateLibrary, Candidates, list_candidates
from mixerzoo_search.making import make_all
from mixerzoo_search.settings import MEMORY_LIMIT, OBJECTIVES, check_memory_limit, check_objective

SCHEMA = 1
Todo = list[tuple[str, Candidate]]


@dataclass(frozen=True, kw_only=True)
class LocalSettings:
    """What is distilled, and how far.

    Attributes:
        mixers: names; empty for all.
        widths: widths; empty for all.
        images: most images to distil on.
        steps: gradient steps of every candidate after the closed form.
        objective: what those steps make smaller.
        seed: of everything random.
        memory_limit: GiB of the teacher's activations above which they are kept in files.
    """

    mixers: tuple[str, ...] = ()
    widths: tuple[float, ...] = ()
    images: int = 512
    steps: int = 0
    objective: str = OBJECTIVES[0]
    seed: int = 0
    memory_limit: float = MEMORY_LIMIT

    def __post_init__(self) -> None:
        for flag, value, least in (
            ("images", self.images, 20),
            ("distill-steps", self.steps, 0),
            ("seed", self.seed, 0),
        ):
            if value < least:
                raise MixerzooError(f"--{flag} {value}: give at least {least}")
        check_memory_limit(self.memory_limit)
        check_objective(self.objective)


@dataclass(frozen=True, kw_only=True)
class Built:
    """A library after `distill_local`.

    Attributes:
        library: its folder.
        images: how many were distilled on.
        entries: all that were asked for, in the order of sites; the better where there are two of a candidate.
        made: how many entries this call made; the others were there.
        left_out: site, mixer and reason of what cannot be built.
        damaged: what was found damaged and made again, in words.
        capture_s: seconds of the teacher's pass; 0 if nothing was to be made.
        distill_s: seconds of making candidates.
    """

    library: Path
    images: int
    entries: tuple[Entry, ...]
    made: int
    left_out: tuple[tuple[str, str, str], ...]
    damaged: tuple[str, ...]
    capture_s: float
    distill_s: float

    @property
    def failed(self) -> list[Entry]:
        """The candidates that failed."""
        return [entry for entry in self.entries if entry.failed]

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        kept = ("site", "candidate", "key", "nmse", "nmse_start", "nmse_solved", "steps", "params", "seconds")
        rows = [entry.to_json() for entry in self.entries]
        return {
            "schema": SCHEMA,
            "recipe": "local",
            "library": str(self.library),
            "images": self.images,
            "made": self.made,
            "wall_s": {
                "capture": round(self.capture_s, 3),
                "distill": round(self.distill_s, 3),
                "total": round(self.capture_s + self.distill_s, 3),
            },
            "left_out": [dict(zip(("site", "mixer", "reason"), each, strict=True)) for each in self.left_out],
            "candidates": [{name: row[name] for name in (*kept, "failed")} for row in rows],
        }


def distill_local(
    teacher: Teacher, data: Dataset, settings: LocalSettings, *, library: Path, reporter: Reporter
) -> Built:
    """Distil every candidate of every site, unless it is in the library.

    Raises:
        MixerzooError: for an unknown mixer, no candidate at all, or a folder that holds something else; nothing is
            written then.
    """
    candidates = list_candidates(teacher.sites, mixers=settings.mixers, widths=settings.widths)
    check_folder(library)
    indices = data.splits.calibration[: settings.images]
    shelf = CandidateLibrary(
        Library(library),
        teacher,
        Source.of(teacher, data, indices),
        steps=settings.steps,
        seed=settings.seed,
        objective=settings.objective,
    )
    every = [(site.name, candidate) for site in teacher.sites for candidate in candidates[site.name]]
    builder = _Builder(shelf, teacher, data, indices, reporter, settings.memory_limit)
    builder.make(every, "closed-form candidates", stepped=False)
    if settings.steps:
        closed = {pair: shelf.find(*pair, stepped=False) for pair in every}
        usable = [pair for pair, entry in closed.items() if entry and not entry.failed and entry.params]
        builder.make(usable, "gradient steps", stepped=True)
        shelf.stepped.update(usable)
    return Built(
        library=library,
        images=len(indices),
        entries=tuple(_entry(shelf, *pair) for pair in every),
        made=builder.made,
        left_out=tuple(_left_out(teacher, settings, candidates)),
        damaged=tuple(shelf.files.damaged),
        capture_s=builder.capture_s,
        distill_s=builder.distill_s,
    )


def _left_out(
    teacher: Teacher, settings: LocalSettings, candidates: Candidates
) -> Iterator[tuple[str, str, str]]:
    """Yield site, mixer and reason of mixers that could stand at a site by their kind, and cannot be built for it."""
    shelf = get_registry().mixers
    for spec in [shelf.get(name) for name in settings.mixers] if settings.mixers else shelf:
        for site in teacher.sites:
            if site.kind in spec.kinds and all(c.mixer != spec.name for c in candidates[site.name]):
                try:
                    spec.outline(site, spec.widths[0])
                except MixerzooError as error:
                    yield site.name, spec.name, str(error.__cause__ or error)


def _entry(shelf: CandidateLibrary, site: str, candidate: Candidate) -> Entry:
    """Return the better entry of a candidate, or the record of its failure."""
    entry = shelf.best(site, candidate) or shelf.find(site, candidate, stepped=False)
    assert entry is not None, f"{candidate} at {site} was not made"
    return entry


class _Builder:
    """Makes what is missing; the teacher's activations are taken once, and only if something is."""

    def __init__(
        self,
        shelf: CandidateLibrary,
        teacher: Teacher,
        data: Dataset,
        indices: Sequence[int],
        reporter: Reporter,
        memory_limit: float,
    ) -> None:
        self.shelf, self.teacher, self.data, self.indices = shelf, teacher, data, indices
        self.reporter, self.memory_limit = reporter, memory_limit
        self.made = 0
        self.capture_s = self.distill_s = 0.0
        self._captured: Capture | None = None

    def make(self, wanted: Todo, title: str, *, stepped: bool) -> None:
        """Distil what the library lacks."""
        todo = [pair for pair in wanted if self.shelf.find(*pair, stepped=stepped) is None]
        if not todo:
            return
        captured = self._activations()
        began = time.perf_counter()
        with self.reporter.phase(title, len(todo)) as report:
            make_all(self.shelf, todo, captured, stepped=stepped, on_made=report)
        self.made += len(todo)
        self.distill_s += time.perf_counter() - began

    def _activations(self) -> Capture:
        if self._captured is None:
            began = time.perf_counter()
            with self.reporter.phase("teacher's activations", len(self.indices)) as report:
                batches = image_batches(self.data, self.indices, self.teacher.image)
                self._captured = capture(
                    self.teacher,
                    batches,
                    len(self.indices),
                    memory_limit_gb=self.memory_limit,
                    on_batch=report,
                )
            self.capture_s = time.perf_counter() - began
        return self._captured
