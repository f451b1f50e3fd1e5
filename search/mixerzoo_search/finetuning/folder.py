"""The folder of a fine-tuned student: while it is trained, what it goes on from; in the end the student alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixerzoo.checkpoint import remove_checkpoint
from mixerzoo.errors import MixerzooError
from mixerzoo.files import read_json, write_json
from mixerzoo.hosts import Teacher
from mixerzoo.student import Student
from mixerzoo.temporary import is_free
from mixerzoo_search.improved import RESULT_FILE, fill_folder

RECORD_FILE = "finetune.json"  # while it is trained; `result.json` has it in the end


class TuningFolder:
    """A folder and what is trained in it.

    Args:
        path: the folder.
        identity: what must be the same for a training to go on.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path, self.identity = path, dict(identity)

    def result(self) -> dict[str, Any] | None:
        """Return what a training of this identity wrote here in the end, or None if it has not ended.

        Raises:
            MixerzooError: if the folder holds another training, or something else.
        """
        for name in (RESULT_FILE, RECORD_FILE):
            if not (self.path / name).exists():
                continue
            found = read_json(self.path / name)
            there = found.get("identity") if isinstance(found, dict) else None
            if not isinstance(there, dict):
                break
            for key in [*self.identity, *there]:
                if there.get(key) != self.identity.get(key):
                    raise MixerzooError(
                        f"'{self.path}' holds another fine-tuning ({key} is {there.get(key)} there, "
                        f"{self.identity.get(key)} here); give another --out"
                    )
            return found if name == RESULT_FILE else None
        if not is_free(self.path):
            raise MixerzooError(f"'{self.path}' exists and holds no fine-tuned student; give another --out")
        return None

    def note(self, **record: Any) -> None:
        """Add to the record of the training; the first note makes the folder."""
        write_json(self.path / RECORD_FILE, self.record() | {"identity": self.identity} | record)

    def record(self) -> dict[str, Any]:
        """Return the record; empty before the first note."""
        path = self.path / RECORD_FILE
        content: dict[str, Any] = read_json(path) if path.exists() else {}
        return content

    def finish(self, teacher: Teacher, student: Student, card: str, result: Mapping[str, Any]) -> None:
        """Write the student, and last its result."""
        fill_folder(self.path, teacher, student, card, {**result, "identity": self.identity})

    def tidy(self) -> None:
        """Remove what a training needs to go on; its record comes last."""
        remove_checkpoint(self.path)
        (self.path / RECORD_FILE).unlink(missing_ok=True)
