"""What was measured of a student, read from what the command that made it left; nothing is measured here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from mixerzoo.errors import MixerzooError
from mixerzoo.files import read_json
from mixerzoo.student import WEIGHTS_FILE
from mixerzoo.student_source import Source

CONFIG_FILE = "config.json"
RESULT_FILE = "result.json"
FAR_FILE, PRUNE_FILE = "far.json", "prune.json"
TEST, STUDY = "test", "study"
CONDITIONS = ("device", "device_name", "threads", "dtype", "batch_size", "runtime")


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Figures of one student; None is not measured. Latencies in ms, shares in [0, 1].

    Attributes:
        accuracy: share of right answers.
        agreement: with the teacher.
        loss: against the teacher.
        change_low: of the 95 % interval of the accuracy less the teacher's, its lower end, in [-1, 1].
        change_high: its upper end.
        latency_ms: median.
        params: parameters.
        teacher_accuracy: of the teacher, on the same images.
        teacher_ms: latency of the teacher, under the same conditions.
        teacher_params: parameters of the teacher.
        part: which images: `test`, or `study`, which students are compared on in a search.
        data: what `--data` was.
        data_fingerprint: beginning of the data's hash.
        teacher_fingerprint: beginning of the hash of the teacher's weights.
        conditions: device, device_name, threads, dtype, batch_size, runtime of the latencies.
    """

    accuracy: float | None = None
    agreement: float | None = None
    loss: float | None = None
    change_low: float | None = None
    change_high: float | None = None
    latency_ms: float | None = None
    params: int | None = None
    teacher_accuracy: float | None = None
    teacher_ms: float | None = None
    teacher_params: int | None = None
    part: str = TEST
    data: str | None = None
    data_fingerprint: str | None = None
    teacher_fingerprint: str | None = None
    conditions: Mapping[str, Any] | None = None

    @property
    def share(self) -> float | None:
        """Latency, as a share of the teacher's."""
        if self.latency_ms is None or not self.teacher_ms:
            return None
        return self.latency_ms / self.teacher_ms

    @property
    def judged(self) -> bool:
        """Whether the student was compared with its teacher."""
        return self.agreement is not None or self.loss is not None

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        return asdict(self)

    def to_share(self) -> Figures:
        """Return the figures without where the data are, which is nobody else's business; their name is kept."""
        return self if self.data is None else replace(self, data=Path(self.data).name)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Figures:
        """Rebuild figures; what is not known by name is left out."""
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in data.items() if name in known})


def read_figures(source: Source) -> Figures:
    """Return what was measured of a student.

    Raises:
        MixerzooError: if a file of its run is not what it should be.
    """
    try:
        return _read(source)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise MixerzooError(f"'{source.given}': its figures cannot be read ({error!r})") from None


def size_of(source: Source) -> int:
    """Return the bytes of the student's weights on disk."""
    path = source.path if source.path.is_file() else source.path / WEIGHTS_FILE
    try:
        return path.stat().st_size
    except OSError as error:
        raise MixerzooError(f"'{path}': not readable ({error.strerror})") from None


def _read(source: Source) -> Figures:
    known = _of_run(source)
    folder = source.path
    if folder.is_file():
        return _with(known, source.content.get("figures"))
    if (folder / CONFIG_FILE).is_file():
        return _with(known, read_json(folder / CONFIG_FILE).get("figures"))
    if source.is_best:
        return _of_best(source, known)
    if (folder / RESULT_FILE).is_file():
        return _of_result(source, known, read_json(folder / RESULT_FILE))
    return known


def _of_run(source: Source) -> Figures:
    """Return what the run says of its data, its teacher and its conditions."""
    identity, environment, teacher = source.identity, source.environment, source.summary.get("teacher", {})
    return Figures(
        teacher_accuracy=_number(teacher.get("accuracy")),
        teacher_ms=_number(teacher.get("latency_ms", source.record.get("teacher_ms"))),
        teacher_params=teacher.get("params"),
        data=source.data,
        data_fingerprint=identity.get("data_fingerprint"),
        teacher_fingerprint=identity.get("teacher_fingerprint"),
        conditions=_conditions(environment),
    )


def _of_best(source: Source, known: Figures) -> Figures:
    best = source.summary.get("best")
    if best is not None:
        low, high = source.summary.get("test", {}).get("accuracy_interval") or (None, None)
        return _with(known, _row(best) | {"change_low": _number(low), "change_high": _number(high)})
    if source.run is not None and (source.run / FAR_FILE).is_file():
        far = read_json(source.run / FAR_FILE)
        known = replace(
            known,
            teacher_accuracy=_number(far["teacher"]["accuracy"]),
            teacher_params=far["teacher"]["params"],
            conditions=None,  # it times nothing
        )
        return _with(known, _row(far["measured"]["stage 2"]) | {"params": far["student"]["params"]})
    return known


def _of_result(source: Source, known: Figures, result: Mapping[str, Any]) -> Figures:
    """Return the figures of `result.json`: of a student that was refitted, fine-tuned or pruned, or of a finalist."""
    if isinstance(result.get("test"), dict):
        test = result["test"]
        judged = test[result["kept"]] if "kept" in result else test.get("after", test)
        found = {"params": result.get("params"), "latency_ms": _latency_of_plan(source, result)}
        if (source.path.parent / PRUNE_FILE).is_file():
            pruning = read_json(source.path.parent / PRUNE_FILE)
            found |= {
                "teacher_ms": result["teacher_ms"],
                "conditions": _conditions(pruning["environment"]),
                "data_fingerprint": pruning["identity"].get("data"),
                "teacher_fingerprint": pruning["identity"].get("teacher"),
            }
        return _with(known, _row(judged) | found)
    if isinstance(result.get("plan"), dict):
        # A teacher's accuracy on these images is in no file.
        return _with(replace(known, part=STUDY, teacher_accuracy=None), _row(result))
    return known


def _latency_of_plan(source: Source, result: Mapping[str, Any]) -> float | None:
    """Return a measured latency: the result's own, or the one that the run has of this plan; weights change none."""
    own = _number(result.get("latency_ms"))
    if own is not None:
        return own
    rows = [row for row in (source.summary.get("best"), *source.summary.get("pareto", ())) if row]
    return next((_number(row["latency_ms"]) for row in rows if row["plan"] == source.plan), None)


def _conditions(environment: Mapping[str, Any]) -> dict[str, Any] | None:
    return {name: environment[name] for name in CONDITIONS if name in environment} or None


def _row(row: Mapping[str, Any]) -> dict[str, Any]:
    names = ("accuracy", "agreement", "loss", "change_low", "change_high", "latency_ms")
    return {**{name: _number(row.get(name)) for name in names}, "params": row.get("params")}


def _with(known: Figures, found: Mapping[str, Any] | None) -> Figures:
    """Return what is known, and what was found on top."""
    if found is None:
        return known
    there = {name: value for name, value in found.items() if value is not None}
    return Figures.from_json({**known.to_json(), **there})


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
