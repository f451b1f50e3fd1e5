"""From the best plans to the winner: measured again, refitted, distilled as a whole, measured once more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from mixerzoo.files import read_json, write_json
from mixerzoo.finetune import finetune
from mixerzoo.hosts import assemble
from mixerzoo.refit import refit
from mixerzoo.student import Student, load_student, save_student
from mixerzoo_search.additive import AdditiveModel
from mixerzoo_search.evaluate import Evaluator, PlanResult

REFITTED = 3  # plans that are refitted
TUNED = 2  # of these, how many are distilled as a whole
MEASURED = 8  # plans that are measured again to find those
FINAL_ROUNDS = 25
REFIT_ROWS = 65_536  # tokens that a readout is solved on: more no longer change it


@dataclass(frozen=True, kw_only=True)
class Finalist:
    """A plan on its way to be the winner."""

    result: PlanResult
    student: nn.Module


def finalists(
    results: Sequence[PlanResult], evaluator: Evaluator, *, budget_ms: float, most: int
) -> list[PlanResult]:
    """Return up to `most` plans of lowest loss that meet the budget in a second, longer measurement."""
    ranked = sorted((r for r in results if r.latency_ms <= budget_ms), key=lambda r: r.loss)[:MEASURED]
    if not ranked:
        return []
    students = {r.plan.key: assemble(evaluator.teacher.model, evaluator.modules(r.plan)) for r in ranked}
    again = evaluator.latency(students, rounds=FINAL_ROUNDS)
    confirmed = [replace(r, latency_ms=again[r.plan.key]) for r in ranked]
    return [r for r in confirmed if r.latency_ms <= budget_ms][:most]


def refit_plan(
    result: PlanResult, evaluator: Evaluator, batches: Sequence[torch.Tensor], model: AdditiveModel
) -> Finalist:
    """Stitch the plan's student afresh and refit it on its own activations; keep whichever is better."""
    modules = evaluator.modules(result.plan, fresh=True)
    mixers = {site: candidate.mixer for site, candidate in result.plan.choices}
    refit(evaluator.teacher, modules, mixers, batches)
    student = assemble(evaluator.teacher.model, modules)
    refitted = evaluator.evaluate_student(result.plan, student, model, source="refit")
    if refitted.loss <= result.loss:
        return Finalist(result=refitted, student=student)
    return Finalist(result=result, student=assemble(evaluator.teacher.model, evaluator.modules(result.plan)))


def finetune_plan(
    finalist: Finalist,
    evaluator: Evaluator,
    batches: Sequence[torch.Tensor],
    model: AdditiveModel,
    *,
    seconds: float,
    seed: int,
    on_progress: Callable[[float], None],
) -> Finalist:
    """Distil the student as a whole for a while."""
    tuned, loss = finetune(
        evaluator.teacher,
        finalist.student,
        batches,
        seconds=seconds,
        evaluate=lambda student: evaluator.judge.evaluate(student).loss,
        seed=seed,
        on_progress=on_progress,
    )
    if loss >= finalist.result.loss:
        return finalist
    result = evaluator.evaluate_student(finalist.result.plan, tuned, model, source="finetuned")
    return Finalist(result=result, student=tuned)


def save_finalist(folder: Path, finalist: Finalist, evaluator: Evaluator) -> None:
    """Write a finalist; `result.json` comes last, so that it only stands for a whole one."""
    student = Student(plan=finalist.result.plan, model=finalist.student)
    save_student(folder, student, evaluator.teacher)
    write_json(folder / "result.json", finalist.result.to_json())


def load_finalist(folder: Path, evaluator: Evaluator) -> Finalist | None:
    """Return what `save_finalist` wrote, or None if it was not finished."""
    if not (folder / "result.json").exists():
        return None
    student = load_student(folder, model=assemble(evaluator.teacher.model, {}))
    result = PlanResult.from_json(read_json(folder / "result.json"))
    return Finalist(result=result, student=student.model.requires_grad_(False))


def choose(
    candidates: Sequence[Finalist],
    evaluator: Evaluator,
    *,
    budget_ms: float,
    on_miss: Callable[[PlanResult], None],
) -> Finalist | None:
    """Measure the best once more, beside the teacher; if it misses the budget, go on with the next best.

    Returns None if all miss it.
    """
    for finalist in sorted(candidates, key=lambda f: f.result.loss):
        student = {"student": finalist.student}
        ms = evaluator.latency(student, rounds=FINAL_ROUNDS)["student"]
        measured = replace(finalist.result, latency_ms=ms)
        if ms <= budget_ms:
            return replace(finalist, result=measured)
        on_miss(measured)
    return None
