"""What all benchmarks share: options, the environment, and the JSON they write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from mixerzoo.latency import Conditions, default_threads, environment

json_option = click.option(
    "--json", "json_path", type=click.Path(path_type=Path), help="Write the figures here."
)
quick_option = click.option(
    "--quick", is_flag=True, help="Smaller and faster; not the figures of the README."
)


def write(
    path: Path | None, figures: dict[str, Any], *, threads: int | None = None, echo: bool = True
) -> None:
    """Print the figures as JSON with the environment in them (unless not to `echo`); write them to `path` if given."""
    conditions = Conditions(threads=threads or default_threads())
    text = json.dumps({"environment": environment(conditions)} | figures, indent=2)
    if echo:
        click.echo(text)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")


def headline(summary: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of a search summary that a reader looks for first."""
    best, teacher = summary["best"], summary["teacher"]
    return {
        "met": summary["met"],
        "budget_ms": summary["budget_ms"],
        "teacher_ms": teacher["latency_ms"],
        "student_ms": best and best["latency_ms"],
        "share_of_teacher": best and best["latency_ms"] / teacher["latency_ms"],
        "teacher_accuracy": teacher["accuracy"],
        "student_accuracy": best and best["accuracy"],
        "agreement": best and best["agreement"],
        "loss": best and best["loss"],
        "teacher_params": teacher["params"],
        "student_params": best and best["params"],
        "evaluations": summary["evaluations"],
        "plans_on_frontier": len(summary["pareto"]),
        "latency_model": summary["latency_model"],
        "score_model": summary["score_model"],
        "wall_s": summary["wall_s"],
    }
