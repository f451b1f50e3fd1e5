"""Latency of an exported file under its runtime, beside the teacher's, exported likewise, and the student in eager."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from mixerzoo.export.formats import Bundle, Format
from mixerzoo.export.parity import Call
from mixerzoo.latency import REFERENCE, Conditions, Rounds, Timing, environment, measure, threads
from mixerzoo.runtimes import Run, prepare_eager

ROUNDS = Rounds(least=9, most=45, precision=0.01)
EXPORTED, EAGER = "exported", "eager"


@dataclass(frozen=True, kw_only=True)
class FileLatency:
    """Latencies, timed in turns; `teacher` is the teacher in the same format under the same runtime.

    Attributes:
        runtime: of the file and of the teacher.
        timings: `teacher`, `exported` and, where the runtime is another one, `eager`: the student in PyTorch.
        environment: what they depend on.
    """

    runtime: str
    timings: Mapping[str, Timing]
    environment: Mapping[str, Any]

    @property
    def share(self) -> float:
        """The file's latency, as a share of the teacher's."""
        return self.timings[EXPORTED].ratio

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready data, in ms."""
        eager = self.timings.get(EAGER)
        return {
            "runtime": self.runtime,
            "exported_ms": self.timings[EXPORTED].median,
            "teacher_ms": self.timings[REFERENCE].median,
            "share": self.share,
            "share_error": self.timings[EXPORTED].error,
            "eager_ms": None if eager is None else eager.median,
            "environment": dict(self.environment),
        }


def time_file(
    form: Format,
    bundle: Bundle,
    path: Path,
    teacher: nn.Module,
    *,
    batch_size: int,
    thread_count: int,
    rounds: Rounds = ROUNDS,
    on_round: Callable[[int], None] = lambda done: None,
) -> FileLatency:
    """Time an exported file.

    Args:
        form: its format.
        bundle: what it was made from.
        path: the file.
        teacher: a model of the teacher's architecture, whatever its weights: latency depends on shapes.
        batch_size: images at a time.
        thread_count: threads of each.
        rounds: how long to measure.
        on_round: called with the number of rounds done, `rounds.least` in all.
    """
    images = bundle.example(batch_size)

    def run(call: Call) -> Run:
        return lambda: call(images)

    with threads(thread_count), tempfile.TemporaryDirectory(prefix="mixerzoo-") as folder:
        if form.runtime == EAGER:
            subjects = {
                REFERENCE: prepare_eager(teacher, images),
                EXPORTED: run(form.open(bundle, path, thread_count)),
            }
        else:
            beside = Path(folder) / form.file
            form.write(replace(bundle, model=teacher), beside)
            subjects = {
                REFERENCE: run(form.open(bundle, beside, thread_count)),
                EXPORTED: run(form.open(bundle, path, thread_count)),
                EAGER: prepare_eager(bundle.model, images),
            }
        timings = measure(subjects, rounds=rounds, on_round=on_round)
    runtime = form.runtime if form.runtime == "onnxruntime" else EAGER
    conditions = Conditions(batch_size=batch_size, threads=thread_count, runtime=runtime)
    return FileLatency(
        runtime=form.runtime, timings=timings, environment=environment(conditions) | {"runtime": form.runtime}
    )
