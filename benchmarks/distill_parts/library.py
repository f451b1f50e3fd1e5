"""Part `library`: capture and all closed forms at all attention sites, in teacher passes over the same images.

The passes are interleaved: beside every captured batch and beside every site's candidates the teacher runs over some
of the images, so that what else the machine does slows both sides.
"""

from __future__ import annotations

import copy
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from sections import Section, Settings, table, verdict
from subjects import Subject, widest

from mixerzoo.library.entries import Source
from mixerzoo.library.folder import Library
from mixerzoo.plan import Candidate
from mixerzoo_search.candidates import CandidateLibrary

MIXERS = ("static", "glu_mlp", "linear_attention", "multihead_lstm", "gmlp", "retention", "dwconv", "pool")
QUICK_MIXERS = ("static", "linear_attention")
BAR = 6.0  # teacher passes
PARALLEL_PARTS = 3  # of the sites, with the teacher beside each


def run(subject: Subject, settings: Settings, section: Section, console: Console) -> None:
    """Build the library in one process, and in several where there is a way; the teacher is timed around both."""
    candidates = [widest(name) for name in settings.mixers]
    todo = [(site.name, candidate) for site in subject.attention for candidate in candidates]
    ways = ["one process"] if _parallel() is None else ["one process", "all cores"]
    built = {way: _build(subject, settings, todo, parallel=way == "all cores") for way in ways}
    section.rows.update(built)
    section.save(candidates=len(todo), images=len(subject.indices))
    by_mixer = built["one process"]["seconds_by_mixer"]
    table(
        console,
        f"closed form of {len(todo)} candidates, one process",
        ("mixer", "seconds a site", "mean NMSE"),
        [
            (
                name,
                f"{seconds / len(subject.attention):.2f}",
                f"{built['one process']['nmse_by_mixer'][name]:.3f}",
            )
            for name, seconds in by_mixer.items()
        ],
    )
    for way, figures in built.items():
        what = (
            f"{way}: capture {figures['capture_passes']:.2f} teacher passes, closed forms "
            f"{figures['build_passes']:.2f}, both"
        )
        figures["met"] = verdict(console, what, figures["passes"], BAR)
        if figures["failed"]:
            console.print(f"[red]failed: {', '.join(figures['failed'])}")
    section.save()


@dataclass
class _Passes:
    """The teacher's passes beside what is measured."""

    subject: Subject
    seconds: float = 0.0
    images: int = 0
    model: torch.nn.Module = field(init=False)

    def __post_init__(self) -> None:
        self.model = copy.deepcopy(self.subject.teacher.model)  # without the hooks of a capture
        self.run(1)
        self.seconds, self.images = 0.0, 0

    def run(self, batches: int) -> None:
        """Run over the next batches of the images."""
        every = self.subject.batches
        began = time.perf_counter()
        with torch.inference_mode():
            for _ in range(batches):
                batch = every[self.images // len(every[0]) % len(every)]
                self.model(batch)
                self.images += len(batch)
        self.seconds += time.perf_counter() - began

    def whole(self) -> float:
        """Return the seconds of a pass over all images."""
        return self.seconds * len(self.subject.indices) / self.images


def _build(
    subject: Subject, settings: Settings, todo: list[tuple[str, Candidate]], *, parallel: bool
) -> dict[str, Any]:
    """Capture, and build a library from nothing as a search does."""
    with tempfile.TemporaryDirectory() as folder:
        beside, also_beside = _Passes(subject), _Passes(subject)
        began = time.perf_counter()
        captured = subject.capture(subject.attention, on_batch=lambda done: beside.run(1))
        capture_s = time.perf_counter() - began - beside.seconds
        source = Source.of(subject.teacher, subject.data, subject.indices)
        shelf = CandidateLibrary(
            Library(Path(folder) / "library"), subject.teacher, source, steps=0, seed=settings.seed
        )
        # Processes are started for many sites at once, as a search does.
        sites = list(dict.fromkeys(site for site, _ in todo))
        together = -(-len(sites) // PARALLEL_PARTS) if parallel else 1
        share = -(-len(subject.batches) * together // len(sites))  # batches beside so many sites' candidates
        began = time.perf_counter()
        make_all = _parallel() if parallel else None
        for first in range(0, len(sites), together):
            here = sites[first : first + together]
            group = [(site, candidate) for site, candidate in todo if site in here]
            if make_all is None:
                for site, candidate in group:
                    shelf.make(site, candidate, captured, stepped=False)
            else:
                make_all(shelf, group, captured, stepped=False)
            also_beside.run(share)
        build_s = time.perf_counter() - began - also_beside.seconds
        entries = [shelf.find(site, candidate, stepped=False) for site, candidate in todo]
    seconds: dict[str, float] = {}
    errors: dict[str, list[float]] = {}
    for (_, candidate), entry in zip(todo, entries, strict=True):
        assert entry is not None
        seconds[candidate.mixer] = round(seconds.get(candidate.mixer, 0.0) + entry.seconds, 3)
        errors.setdefault(candidate.mixer, []).append(entry.nmse)
    return {
        "capture_s": round(capture_s, 3),
        "build_s": round(build_s, 3),
        "pass_s": [round(passes.whole(), 3) for passes in (beside, also_beside)],
        "capture_passes": round(capture_s / beside.whole(), 3),
        "build_passes": round(build_s / also_beside.whole(), 3),
        "passes": round(capture_s / beside.whole() + build_s / also_beside.whole(), 3),
        "seconds_by_mixer": seconds,
        "nmse_by_mixer": {name: round(sum(row) / len(row), 4) for name, row in errors.items()},
        "failed": [f"{entry.candidate} at {entry.site}" for entry in entries if entry and entry.failed],
    }


def _parallel() -> Any:
    """Return the function that builds in several processes, or None in a version that has none."""
    try:
        from mixerzoo_search.making import make_all
    except ImportError:
        return None
    return make_all
