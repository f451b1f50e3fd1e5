"""Part `memory`: peak memory of capture and closed forms, with some images and with four times as many.

Each is a fresh process (this file, run as a script). The memory limit is half of what the activations of fewer images
take, so that both spill. A thread samples anonymous memory; the total is the system's own peak.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # as a script

from rich.console import Console
from sections import Section, Settings, table, verdict
from subjects import Subject, open_subject, widest

IMAGES = {"dinov2": (1000, 4000), "digits_vit": (280, 1120)}
QUICK_IMAGES = (80, 320)
MIXERS = ("static", "linear_attention", "multihead_lstm")
QUICK_MIXERS = ("static",)
SAMPLE_S = 0.005
BAR = 1.10  # times as much memory


def run(subject: Subject, settings: Settings, section: Section, console: Console) -> None:
    """Measure both in processes of their own."""
    few, many = QUICK_IMAGES if settings.quick else IMAGES[settings.teacher]
    bytes_an_image = sum(4 * site.tokens * site.dim for site in subject.teacher.sites)
    limit_gb = bytes_an_image * few / 2 / 2**30
    for images in (few, many):
        section.rows[str(images)] = _measured(settings, images, limit_gb)
        section.save(memory_limit_gb=round(limit_gb, 4), mixers=QUICK_MIXERS if settings.quick else MIXERS)
    rows = [section.rows[str(images)] for images in (few, many)]
    columns = ("images", "at the start, MiB", "peak, MiB", "anonymous, MiB", "activations, MiB", "s")
    table(
        console,
        f"peak memory at a limit of {limit_gb:.2f} GiB",
        columns,
        [
            (
                str(images),
                f"{row['start_mib']:.0f}",
                f"{row['peak_mib']:.0f}",
                f"{row['anonymous_mib']:.0f}",
                f"{bytes_an_image * images / 2**20:.0f}",
                f"{row['seconds']:.0f}",
            )
            for images, row in zip((few, many), rows, strict=True)
        ],
    )
    met = True
    for kind, name in (("peak_mib", "peak"), ("anonymous_mib", "anonymous")):
        ratio = round(rows[1][kind] / rows[0][kind], 4)
        met &= verdict(console, f"{name} with {many} images, over {few}", ratio, BAR)
        section.save(**{f"{name}_ratio": ratio})
    section.save(met=met)


def _measured(settings: Settings, images: int, limit_gb: float) -> dict[str, Any]:
    order = {
        "teacher": settings.teacher,
        "cache": str(settings.cache),
        "data": None if settings.data is None else str(settings.data),
        "images": images,
        "limit_gb": limit_gb,
        "mixers": QUICK_MIXERS if settings.quick else MIXERS,
        "threads": settings.threads,
        "seed": settings.seed,
    }
    done = subprocess.run(
        [sys.executable, __file__, json.dumps(order)], check=True, stdout=subprocess.PIPE, text=True
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def status_mib(field: str) -> float:
    """Return a field of this process's status, in MiB."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    match = re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)
    if match is None:
        raise RuntimeError(f"/proc/self/status has no {field}: the part `memory` needs Linux")
    return int(match[1]) / 1024


class Sampler:
    """The highest anonymous memory during a `with` block."""

    def __init__(self) -> None:
        self.highest = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _sample(self) -> None:
        while True:
            self.highest = max(self.highest, status_mib("RssAnon"))
            if self._ended.wait(SAMPLE_S):
                return


def main() -> None:
    """Do as the order in the first argument says, and print what it took."""
    import tempfile

    import torch

    from mixerzoo.capture import capture
    from mixerzoo.data import image_batches
    from mixerzoo.library.entries import Source
    from mixerzoo.library.folder import Library
    from mixerzoo_search.candidates import CandidateLibrary

    order = json.loads(sys.argv[1])
    torch.set_num_threads(order["threads"])
    data = None if order["data"] is None else Path(order["data"])
    subject = open_subject(order["teacher"], images=order["images"], cache=Path(order["cache"]), data=data)
    if len(subject.indices) != order["images"]:
        sys.exit(f"there are only {len(subject.indices)} images to distil on, not {order['images']}")
    start, began = status_mib("VmRSS"), time.perf_counter()
    with Sampler() as sampler, tempfile.TemporaryDirectory() as folder:
        images = image_batches(subject.data, subject.indices, subject.teacher.image)  # as they are needed
        captured = capture(
            subject.teacher,
            images,
            len(subject.indices),
            memory_limit_gb=order["limit_gb"],
            spill_dir=Path(folder),
        )
        if not os.listdir(folder):
            sys.exit("the activations were not spilled")
        source = Source.of(subject.teacher, subject.data, subject.indices)
        library = Library(Path(folder) / "library")
        shelf = CandidateLibrary(library, subject.teacher, source, steps=0, seed=order["seed"])
        for site in subject.attention:
            for name in order["mixers"]:
                entry = shelf.make(site.name, widest(name), captured, stepped=False)
                if entry is None or entry.failed:
                    sys.exit(f"{name} at {site.name} failed: {entry and entry.failed}")
    print(
        json.dumps(
            {
                "start_mib": round(start, 1),
                "peak_mib": round(status_mib("VmHWM"), 1),
                "anonymous_mib": round(sampler.highest, 1),
                "seconds": round(time.perf_counter() - began, 2),
            }
        )
    )


if __name__ == "__main__":
    main()
