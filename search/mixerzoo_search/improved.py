"""A student made better: its figures before and after, its model card, and its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from mixerzoo.errors import MixerzooError
from mixerzoo.files import read_json, write_json, write_text
from mixerzoo.hosts import Teacher
from mixerzoo.plan import Plan
from mixerzoo.score import Evaluation
from mixerzoo.significance import CHANGE, change_text
from mixerzoo.student import Student, save_student
from mixerzoo_search.context import Context

RESULT_FILE = "result.json"
SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Improved:
    """What came of an attempt to make a student better.

    Attributes:
        path: folder of the student that is kept, for `mixerzoo.load`.
        plan: its plan.
        better: whether the new student was kept; else the one that was given.
        validation: figures before and after, on the images that decided.
        test: likewise, on images that nothing was chosen on.
    """

    path: Path
    plan: Plan
    better: bool
    validation: tuple[Evaluation, Evaluation]
    test: tuple[Evaluation, Evaluation]

    def figures(self) -> dict[str, Any]:
        """Return JSON-ready figures."""
        parts = (("validation", self.validation), ("test", self.test))
        return {
            "schema": SCHEMA,
            "kept": "after" if self.better else "before",
            **{part: {"before": old.to_json(), "after": new.to_json()} for part, (old, new) in parts},
        }


def closing_lines(figures: Mapping[str, Any], path: Path) -> list[str]:
    """Return what the command line prints: the figures on test images before and after, and where the student is."""
    lines = [
        f"{'test images':<12}{'loss':>10}{'agreement':>12}{'accuracy':>11}{CHANGE:>24}{'validation loss':>18}"
    ]
    for name in ("before", "after"):
        test, validation = figures["test"][name], figures["validation"][name]
        cells = (
            _text(test["loss"], ".4g", "nan"),
            _text(test["agreement"], ".2%"),
            _text(test["accuracy"], ".2%"),
            change_text(test.get("change_low"), test.get("change_high")),
            _text(validation["loss"], ".4g", "nan"),
        )
        lines.append(f"{name:<12}{cells[0]:>10}{cells[1]:>12}{cells[2]:>11}{cells[3]:>24}{cells[4]:>18}")
    if figures["kept"] == "before":
        lines.append("no lower loss on validation images: the student was kept as it was")
    return [*lines, "", f"student     {path}   (mixerzoo.load)"]


def judged(context: Context, student: nn.Module) -> tuple[Evaluation, Evaluation]:
    """Return the figures on validation images (others than a best state was chosen on, if any) and on test images."""
    return context.choice_judge.evaluate(student), context.test_judge.evaluate(student)


def model_card(teacher: Teacher, found: Improved, *, title: str, done: str, in_vain: str) -> str:
    """Return the README.md of the folder.

    Args:
        teacher: the teacher.
        found: the figures.
        title: what was done, in a word.
        done: what was done to the student that is kept.
        in_vain: what was tried, where the student is as it was.
    """
    before, after = found.test
    now = after if found.better else before
    rows = [("loss against the teacher", f"{before.loss:.4g}", f"{now.loss:.4g}")]
    rows += [("agreement with the teacher", f"{before.agreement:.2%}", f"{now.agreement:.2%}")]
    if before.accuracy is not None and now.accuracy is not None:
        rows.append(("accuracy", f"{before.accuracy:.2%}", f"{now.accuracy:.2%}"))
        old, new = (change_text(one.change_low, one.change_high) for one in (before, now))
        rows.append((CHANGE, old, new))
    what = done if found.better else f"as it was: {in_vain} did not lower its validation loss"
    return "\n".join(
        [
            f"# {teacher.name}, {title}",
            "",
            f"A student of `{teacher.name}` made by mixerzoo, {what}.",
            "",
            "| | before | this student |",
            "|---|---|---|",
            *(f"| {name} | {old} | {new} |" for name, old, new in rows),
            "",
            "On images that nothing was chosen or trained on. Latency is that of the plan, as before.",
            "",
            "```python",
            "import mixerzoo",
            "",
            f"student = mixerzoo.load({json.dumps(found.path.name)})  # this folder; images (B, C, H, W)",
            "```",
            "",
            "| site | candidate |",
            "|---|---|",
            *(f"| `{site}` | `{candidate}` |" for site, candidate in found.plan.to_json().items()),
            "",
        ]
    )


def has_result(folder: Path, key: str) -> bool:
    """Whether a folder holds a student with a `result.json` that has this key."""
    try:
        return key in read_json(folder / RESULT_FILE)
    except (MixerzooError, TypeError):
        return False


def fill_folder(
    folder: Path, teacher: Teacher, student: Student, card: str, result: Mapping[str, Any]
) -> None:
    """Write the student, its card and, last, `result.json`."""
    save_student(folder, student, teacher)
    write_text(folder / "README.md", card)
    write_json(folder / RESULT_FILE, dict(result))


def _text(value: float | None, form: str, nothing: str = "") -> str:
    return nothing if value is None else format(value, form)
