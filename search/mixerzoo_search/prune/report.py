"""What a pruning says: model cards, and the table at its end."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixerzoo.hosts import Teacher
from mixerzoo.significance import CHANGE, change_text
from mixerzoo_search.prune.settings import label

SHOWN = {"cut": "cut", "refitted": "refitted in closed form", "finetuned": "distilled as a whole"}


def card(teacher: Teacher, name: str, result: Mapping[str, Any], plan: Mapping[str, str]) -> str:
    """Return the README.md of a pruned student."""
    test = result["test"]
    rows = [
        (what, _text(test["before"][key], form), _text(test["after"][key], form))
        for what, key, form in (
            ("loss against the teacher", "loss", ".4g"),
            ("agreement with the teacher", "agreement", ".2%"),
            ("accuracy", "accuracy", ".2%"),
        )
        if test["after"][key] is not None
    ]
    if test["after"]["accuracy"] is not None:
        rows.append((CHANGE, _change(test["before"]), _change(test["after"])))
    rows.append(("parameters", f"{result['before_params']:,}", f"{result['params']:,}"))
    share, error = result["latency_share"], result["latency_error"]
    return "\n".join(
        [
            f"# {teacher.name}, pruned to {label(result['target'])} % of its {result['by']}",
            "",
            f"A student of `{teacher.name}` with fewer units, made by mixerzoo. It takes {share:.1%} of the teacher's "
            f"latency, measured to {error:.1%}, {result['latency_ms']:.3g} ms.",
            "",
            "| | before pruning | this student |",
            "|---|---|---|",
            *(f"| {what} | {old} | {new} |" for what, old, new in rows),
            "",
            "On images that nothing was chosen or trained on.",
            "",
            "```python",
            "import mixerzoo",
            "",
            f"student = mixerzoo.load({json.dumps(name)})  # this folder; images (B, C, H, W)",
            "```",
            "",
            "| site | candidate |",
            "|---|---|",
            *(f"| `{site}` | `{candidate}` |" for site, candidate in plan.items()),
            "",
        ]
    )


def closing_lines(record: Mapping[str, Any], path: Path) -> list[str]:
    """Return the table of a family: a row a student, on test images."""
    form = "{:<10}{:>9}{:>10}{:>12}{:>10}{:>12}{:>11}{:>26}{:>15}"
    head = form.format(
        "target", "latency", "ms", "parameters", "loss", "agreement", "accuracy", CHANGE, "after the cut"
    )
    lines = [head]
    before = record["before"]
    lines.append(
        _row(
            form,
            "before",
            before["latency_share"],
            before["latency_ms"],
            before["params"],
            before["test"],
            "",
        )
    )
    for row in record["students"].values():
        cut = row["phases"]["cut"]["test"]
        key = "accuracy" if cut["accuracy"] is not None else "agreement"
        told = f"{label(row['target'])}%"
        lines.append(
            _row(
                form,
                told,
                row["latency_share"],
                row["latency_ms"],
                row["params"],
                row["test"]["after"],
                _text(cut[key], ".2%"),
            )
        )
    return [*lines, "", f"students    {path}/pruned-*   (mixerzoo.load)"]


def _row(
    form: str, name: str, share: float, ms: float, params: int, test: Mapping[str, float | None], cut: str
) -> str:
    return form.format(
        name,
        f"{share:.1%}",
        f"{ms:.3g}",
        f"{params:,}",
        _text(test["loss"], ".4g"),
        _text(test["agreement"], ".2%"),
        _text(test["accuracy"], ".2%"),
        _change(test),
        cut,
    ).rstrip()


def _change(test: Mapping[str, float | None]) -> str:
    return change_text(test.get("change_low"), test.get("change_high"))


def _text(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
