"""Part `library`: capture and all closed forms at all attention sites, in teacher passes over the same images."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from distill_figures import Section, Settings, table, verdict
from distill_subjects import Subject, median, widest
from rich.console import Console

from mixerzoo.library import Library, Source
from mixerzoo.plan import Candidate
from mixerzoo_search.candidates import CandidateLibrary

MIXERS = ("static", "glu_mlp", "linear_attention", "multihead_lstm", "gmlp", "retention", "dwconv", "mamba2")
QUICK_MIXERS = ("static", "linear_attention")
BAR = 6.0  # teacher passes


def run(subject: Subject, settings: Settings, section: Section, console: Console) -> None:
    """Build the library in one process, and in several where there is a way; the teacher is timed around both."""
    candidates = [widest(name) for name in settings.mixers]
    todo = [(site.name, candidate) for site in subject.attention for candidate in candidates]
    passes = [subject.pass_seconds()]
    ways = ["one process"] if _parallel() is None else ["one process", "all cores"]
    built = {}
    for way in ways:
        built[way] = _build(subject, settings, todo, parallel=way == "all cores")
        passes.append(subject.pass_seconds())
    teacher_s = median(passes)
    for figures in built.values():
        figures["passes"] = round((figures["capture_s"] + figures["build_s"]) / teacher_s, 3)
    section.rows.update(built)
    section.save(
        teacher_s=teacher_s,
        teacher_passes_s=[round(seconds, 4) for seconds in passes],
        candidates=len(todo),
        images=len(subject.indices),
    )
    by_mixer = built["one process"]["seconds_by_mixer"]
    console.print(f"a pass of the teacher over {len(subject.indices)} images: {teacher_s:.1f} s")
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
        what = f"{way}: capture {figures['capture_s']:.1f} s, closed forms {figures['build_s']:.1f} s, teacher passes"
        figures["met"] = verdict(console, what, figures["passes"], BAR)
        if figures["failed"]:
            console.print(f"[red]failed: {', '.join(figures['failed'])}")
    section.save()


def _build(
    subject: Subject, settings: Settings, todo: list[tuple[str, Candidate]], *, parallel: bool
) -> dict[str, Any]:
    """Capture, and build a library from nothing as a search does."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        captured = subject.capture()
        capture_s = time.perf_counter() - began
        source = Source.of(subject.teacher, subject.data, subject.indices)
        shelf = CandidateLibrary(
            Library(Path(folder) / "library"), subject.teacher, source, steps=0, seed=settings.seed
        )
        began = time.perf_counter()
        make_all = _parallel() if parallel else None
        if make_all is None:
            for site, candidate in todo:
                shelf.make(site, candidate, captured, stepped=False)
        else:
            make_all(shelf, todo, captured, stepped=False)
        build_s = time.perf_counter() - began
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
