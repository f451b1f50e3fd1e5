"""The folder of a family of pruned students: its record, and one folder a student, each there whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixerzoo.errors import MixerzooError
from mixerzoo.files import read_json, replace_folder, write_json
from mixerzoo.hosts import Teacher, assemble
from mixerzoo.student import Student, load_student, save_student
from mixerzoo.temporary import is_free, remove_leftovers
from mixerzoo_search.improved import RESULT_FILE, fill_folder
from mixerzoo_search.prune.settings import label

RECORD_FILE = "prune.json"
PHASES_FILE = "phases.json"
PENALISED, PENALISING = "penalised", ".penalising"
SCHEMA = 1


class Family:
    """A folder, and what is pruned in it.

    Args:
        path: the folder.
        identity: what must be the same for the pruning to go on.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path, self.identity = path, dict(identity)

    def check(self) -> None:
        """Refuse a folder that holds anything but an earlier start of this pruning.

        Raises:
            MixerzooError: with the difference.
        """
        if not (self.path / RECORD_FILE).exists():
            if not is_free(self.path):
                raise MixerzooError(f"'{self.path}' exists and holds no pruned students; give another --out")
            return
        found = read_json(self.path / RECORD_FILE)
        there = found.get("identity") if isinstance(found, dict) else None
        if not isinstance(there, dict):
            raise MixerzooError(f"'{self.path / RECORD_FILE}': not of mixerzoo; give another --out")
        for name in [*self.identity, *there]:
            if there.get(name) != self.identity.get(name):
                raise MixerzooError(
                    f"'{self.path}' holds another pruning ({name} is {there.get(name)} there, "
                    f"{self.identity.get(name)} here); give another --out"
                )

    def record(self) -> dict[str, Any]:
        """Return the record; empty before the first note."""
        path = self.path / RECORD_FILE
        content: dict[str, Any] = read_json(path) if path.exists() else {}
        return content

    def note(self, **record: Any) -> None:
        """Add to the record; the first note makes the folder."""
        about = {"schema": SCHEMA, "identity": self.identity}
        write_json(self.path / RECORD_FILE, self.record() | about | record)

    def note_of(self, part: str, target: float, content: Mapping[str, Any]) -> None:
        """Add what is known of one target to a part of the record."""
        self.note(**{part: {**self.record().get(part, {}), label(target): dict(content)}})

    def known(self, part: str, target: float) -> dict[str, Any] | None:
        """Return what is known of one target."""
        content: dict[str, Any] | None = self.record().get(part, {}).get(label(target))
        return content

    def mend(self) -> None:
        """Add to the record what a killed process had written and not noted, and remove what it left behind."""
        if not (self.path / RECORD_FILE).exists():
            return
        remove_leftovers(self.path)
        if (self.path / PENALISED / RESULT_FILE).exists():
            self.note_penalised()
        for target in self.targets():
            if (self.student_path(target) / RESULT_FILE).exists():
                self.note_student(target)

    def targets(self) -> list[float]:
        """Return the targets whose thresholds are known, and whose students may be there."""
        return [float(text) / 100 for text in self.record().get("reached", {})]

    def note_penalised(self) -> None:
        """Note what the folder of the student trained with the penalty says, and remove what it needed to go on."""
        result = without_curves(read_json(self.path / PENALISED / RESULT_FILE))
        if self.record().get(PENALISED) != result:
            self.note(**{PENALISED: result})
        self.tidy(self.path / PENALISING)

    def note_student(self, target: float) -> None:
        """Note what the folder of a target's student says, and remove what it needed to go on."""
        result = without_curves(read_json(self.student_path(target) / RESULT_FILE))
        if self.known("students", target) != result:
            self.note_of("students", target, result)
        self.tidy(self.working_path(target))

    def done(self, target: float) -> bool:
        """Whether a target's student is there."""
        path = self.student_path(target)
        return (path / RESULT_FILE).exists() and self.known("students", target) is not None

    def student_path(self, target: float) -> Path:
        """Return the folder of a target's student."""
        return self.path / f"pruned-{label(target)}"

    def working_path(self, target: float) -> Path:
        """Return the folder of what a target's student goes on from when it was stopped."""
        return self.path / f".pruning-{label(target)}"

    def write(
        self, path: Path, teacher: Teacher, student: Student, card: str, result: Mapping[str, Any]
    ) -> None:
        """Write a student's folder, whole or not at all."""
        replace_folder(path, lambda folder: fill_folder(folder, teacher, student, card, result))

    def write_working(
        self, target: float, teacher: Teacher, student: Student, phases: Mapping[str, Any]
    ) -> None:
        """Write what is distilled as a whole; the figures come last."""
        path = self.working_path(target)
        save_student(path, student, teacher)
        write_json(path / PHASES_FILE, dict(phases))

    def working(self, target: float, teacher: Teacher) -> tuple[Student, dict[str, Any]] | None:
        """Return what `write_working` wrote, or None."""
        path = self.working_path(target)
        if not (path / PHASES_FILE).exists():
            return None
        phases: dict[str, Any] = read_json(path / PHASES_FILE)
        return load(path, teacher), phases

    def tidy(self, path: Path) -> None:
        """Remove a folder that is no longer needed."""
        shutil.rmtree(path, ignore_errors=True)


def without_curves(content: Any) -> Any:
    """Return JSON-ready data without what has a row a step."""
    if not isinstance(content, dict):
        return content
    return {name: without_curves(value) for name, value in content.items() if name != "curve"}


def load(path: Path, teacher: Teacher) -> Student:
    """Return a student of the family."""
    student = load_student(path, model=assemble(teacher.model, {}))
    return Student(plan=student.plan, model=student.model.requires_grad_(False))
