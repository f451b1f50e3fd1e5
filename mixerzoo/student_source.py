"""What a command is pointed at: a run directory, a student's folder, or a student in one file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixerzoo.errors import MixerzooError
from mixerzoo.files import read_json
from mixerzoo.student import PLAN_FILE, read_plan

RUN_FILE = "run.json"
SUMMARY_FILE = "summary.json"
BEST = "best"


@dataclass(frozen=True, kw_only=True)
class Source:
    """A student on disk, and the run that it comes from.

    Attributes:
        given: the path as the user said it.
        path: folder of the student, or its single file; `load_student` takes it.
        content: what `plan.json` says.
        run: the run directory that it is in, or None.
        record: content of `run.json`; empty without one.
        summary: content of `summary.json`; empty without one.
    """

    given: Path
    path: Path
    content: Mapping[str, Any]
    run: Path | None
    record: Mapping[str, Any]
    summary: Mapping[str, Any]

    @property
    def teacher(self) -> str:
        """Name of its teacher."""
        return str(self.content.get("teacher", ""))

    @property
    def plan(self) -> dict[str, str]:
        """Site -> candidate."""
        plan = self.content.get("plan")
        if not isinstance(plan, dict):
            raise MixerzooError(f"'{self.path}': its plan is none of mixerzoo's")
        return {str(site): str(candidate) for site, candidate in plan.items()}

    @property
    def data(self) -> str | None:
        """What `--data` was in its run, or None."""
        value = self.identity.get("data")
        return value if isinstance(value, str) else None

    @property
    def identity(self) -> Mapping[str, Any]:
        """The arguments of its run; empty without one."""
        value = self.record.get("identity")
        return value if isinstance(value, dict) else {}

    @property
    def environment(self) -> Mapping[str, Any]:
        """What its run's latencies were measured under; empty without any."""
        timed = self.record if "teacher_ms" in self.record else {}  # others say what they trained under
        value = self.summary.get("environment") or timed.get("environment")
        return value if isinstance(value, dict) else {}

    @property
    def is_best(self) -> bool:
        """Whether it is the winner of its run."""
        return self.run is not None and self.path.resolve() == (self.run / BEST).resolve()


def find_student(path: Path) -> Source:
    """Return the student that a path names; its weights are not read.

    Raises:
        MixerzooError: if there is none, with what is there instead.
    """
    if path.is_file():
        if path.suffix != ".safetensors":
            raise MixerzooError(
                f"'{path}': not a student; give a run directory, a student's folder or its .safetensors file"
            )
        return _source(path, path)
    if (path / PLAN_FILE).exists():
        return _source(path, path)
    if (path / BEST / PLAN_FILE).exists():
        return _source(path, path / BEST)
    if not path.exists():
        raise MixerzooError(f"'{path}': no such run or student")
    if not (path / RUN_FILE).exists():
        raise MixerzooError(
            f"'{path}' is neither a run directory nor a student: it has no {RUN_FILE} and no {PLAN_FILE}"
        )
    if _optional(path / SUMMARY_FILE).get("met") is False:
        raise MixerzooError(
            f"run '{path}' has no best student: no plan met its budget; give the folder of a student"
        )
    raise MixerzooError(f"run '{path}' is not finished: start the same search again, and it goes on")


def _source(given: Path, path: Path) -> Source:
    content = read_plan(path)
    run = None if path.is_file() else next((p for p in _above(path) if (p / RUN_FILE).is_file()), None)
    return Source(
        given=given,
        path=path,
        content=content,
        run=run,
        record={} if run is None else _optional(run / RUN_FILE),
        summary={} if run is None else _optional(run / SUMMARY_FILE),
    )


def _above(path: Path) -> list[Path]:
    """Return where the run of a student may be: best/ and refit/ are in it, finalists/ are one further down."""
    parents = path.parents if path.name not in ("", "..") else path.resolve().parents
    if len(parents) < 2:
        parents = path.absolute().parents
    return list(parents[:2])


def _optional(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    content = read_json(path)
    if not isinstance(content, dict):
        raise MixerzooError(f"'{path}': not a run of mixerzoo")
    return content
