"""Part `kill`: a build that is killed again and again makes nothing twice, and a flipped byte costs one candidate.

The build is of a small library on the embedded teacher, in a process of its own (this file, run as a script) that is
sent SIGKILL at random moments and started again.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # as a script

from rich.console import Console
from sections import Section, Settings, table
from subjects import Subject, open_subject, widest

KILLS, QUICK_KILLS = 20, 2
FLIPS, QUICK_FLIPS = 4, 1  # of weights, and of entries
IMAGES = 64
MIXERS = ("static", "linear_attention", "pool", "linear", "dwconv", "glu_mlp", "gmlp", "retention")
LATEST = 0.5  # moment of a kill, in times of a whole build
STARTED = "building"


def run(subject: Subject, settings: Settings, section: Section, console: Console) -> None:
    """Kill builds, then flip bytes."""
    del subject  # always on the embedded teacher
    draw = random.Random(settings.seed)
    kills, flips = (QUICK_KILLS, QUICK_FLIPS) if settings.quick else (KILLS, FLIPS)
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        build_s = _build(whole, settings)
        killed = _kill_many(Path(folder), build_s, len(_made(whole)), kills, draw, settings)
        flipped = {
            kind: _flip_many(whole, suffix, flips, draw, settings)
            for kind, suffix in (("weights", "safetensors"), ("entries", "json"))
        }
    section.rows.update({"kill": killed, "flip": flipped})
    met = killed["built_twice"] == killed["lost"] == 0
    table(
        console,
        f"{killed['kills']} kills during builds of {killed['candidates']} candidates",
        ("", "candidates"),
        [
            ("finished before a kill", str(killed["finished"])),
            ("of these, built again", str(killed["built_twice"])),
            ("of these, missing at the end", str(killed["lost"])),
        ],
    )
    rows = []
    for kind, found in flipped.items():
        met &= found["rebuilt"] == found["flips"] and not found["others_rebuilt"]
        rows.append((kind, *(str(found[name]) for name in ("flips", "rebuilt", "others_rebuilt"))))
    table(console, "a flipped byte", ("in", "flips", "rebuilt", "others rebuilt"), rows)
    console.print(f"[{'green' if met else 'red'}]{'met' if met else 'not met'}")
    section.save(met=met)


@dataclass(frozen=True)
class _Making:
    """When the weights of a candidate were written, and which they are."""

    inode: int
    written_ns: int
    entry: bytes


def _made(library: Path) -> dict[str, _Making]:
    """Return the finished candidates: those whose entry is there. A process may be writing."""
    found = {}
    for path in library.glob("*.json"):
        weights = path.with_suffix(".safetensors")
        if weights.exists():
            status = weights.stat()
            found[path.stem] = _Making(status.st_ino, status.st_mtime_ns, path.read_bytes())
    return found


def _kill_many(
    folder: Path, build_s: float, candidates: int, kills: int, draw: random.Random, settings: Settings
) -> dict[str, Any]:
    """Kill builds at random moments; the next one goes on, or begins another library where that one got whole."""
    number = finished = twice = lost = 0
    moments: list[float] = []
    while len(moments) < kills or (folder / f"killed-{number}").exists():
        library = folder / f"killed-{number}"
        known = _made(library)
        worker, began = _start(library, settings), time.perf_counter()
        try:
            # Those that are left after the last kill are finished in peace.
            worker.wait(draw.uniform(0, LATEST * build_s) if len(moments) < kills else None)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
            moments.append(round(time.perf_counter() - began, 3))
        if worker.returncode > 0:
            raise RuntimeError(f"a build ended with exit code {worker.returncode}")
        now = _made(library)
        twice += sum(now[key] != making for key, making in known.items() if key in now)
        lost += sum(key not in now for key in known)
        if worker.returncode == 0:
            _demand(len(now) == candidates)
            finished += len(known)
            number += 1
    return {
        "kills": len(moments),
        "after_s": moments,
        "build_s": round(build_s, 3),
        "candidates": candidates,
        "libraries": number,
        "finished": finished,
        "built_twice": twice,
        "lost": lost,
    }


def _flip_many(
    library: Path, suffix: str, flips: int, draw: random.Random, settings: Settings
) -> dict[str, Any]:
    """Flip a bit in a file of one candidate after the other, and build again."""
    rebuilt = others = 0
    missed = []
    for key in draw.sample(sorted(_made(library)), flips):
        before = _made(library)
        path = library / f"{key}.{suffix}"
        content = bytearray(path.read_bytes())
        place, bit = draw.randrange(len(content)), draw.randrange(8)
        content[place] ^= 1 << bit
        path.write_bytes(content)  # in place: only what is built again is another file
        _build(library, settings)
        after = _made(library)
        _demand(set(after) == set(before))
        changed = {name for name, making in before.items() if making.inode != after[name].inode}
        rebuilt += key in changed
        others += len(changed - {key})
        if key not in changed:
            missed.append(
                {"byte": place, "bit": bit, "near": bytes(content[max(0, place - 20) : place + 8]).hex()}
            )
    return {"flips": flips, "rebuilt": rebuilt, "others_rebuilt": others, "missed": missed}


def _demand(same: bool) -> None:
    """Refuse to go on where a whole build holds other candidates than the first one: their keys depend on the code."""
    if not same:
        raise RuntimeError(
            "a build made other candidates than the one before; did the code of mixerzoo change?"
        )


def _start(library: Path, settings: Settings) -> subprocess.Popen[str]:
    """Start a build; returns when it has captured the teacher, before the first candidate."""
    order = json.dumps({"library": str(library), "seed": settings.seed, "quick": settings.quick})
    worker = subprocess.Popen([sys.executable, __file__, order], stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    with worker.stdout as said:
        started = said.readline().strip() == STARTED
    if not started:
        raise RuntimeError(f"the build did not start; exit code {worker.wait()}")
    return worker


def _build(library: Path, settings: Settings) -> float:
    """Build to the end; returns the seconds that the candidates took."""
    worker = _start(library, settings)
    began = time.perf_counter()
    if worker.wait():
        raise RuntimeError(f"a build ended with exit code {worker.returncode}")
    return time.perf_counter() - began


def main() -> None:
    """Build the library that the first argument names."""
    import torch

    from mixerzoo.library.entries import Source
    from mixerzoo.library.folder import Library
    from mixerzoo_search.candidates import CandidateLibrary

    order = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    subject = open_subject("digits_vit", images=IMAGES, cache=Path(), data=None)
    source = Source.of(subject.teacher, subject.data, subject.indices)
    library = Library(Path(order["library"]))
    shelf = CandidateLibrary(library, subject.teacher, source, steps=0, seed=order["seed"])
    captured = subject.capture(subject.attention)
    print(STARTED, flush=True)
    for site in subject.attention:
        for name in MIXERS[:2] if order["quick"] else MIXERS:
            shelf.make(site.name, widest(name), captured, stepped=False)


if __name__ == "__main__":
    main()
