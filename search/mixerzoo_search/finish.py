"""From the best plans to the winner: measured for long, refitted, distilled as a whole in rounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mixerzoo.checkpoint import remove_checkpoint
from mixerzoo.data import image_batches
from mixerzoo.files import json_hash, read_json, write_json
from mixerzoo.finetune import finetune
from mixerzoo.hosts import assemble
from mixerzoo.plan import Plan
from mixerzoo.refit import refit_students, stitch
from mixerzoo.significance import has_helped
from mixerzoo.student import PLAN_FILE, Student, load_student, save_student
from mixerzoo_search.additive import AdditiveModel
from mixerzoo_search.context import Context
from mixerzoo_search.evaluate import PlanResult
from mixerzoo_search.finetuning import halving
from mixerzoo_search.finetuning.held_out import held_out
from mixerzoo_search.recalibrate import solved_again

REFITTED = 4  # plans that are refitted, and distilled as a whole in rounds
MEASURED = 12  # plans at most that are measured again to find those
SURELY = 1.03  # a plan meets a limit that it does not exceed, and certainly not by so many times
TURN = 2000  # latencies of the teacher, at least, for a plan's turn: about 60 gradient steps on a CPU
STRICTER = 0.97  # times the limit, where every plan misses it when measured again
ATTEMPTS = 8


@dataclass(frozen=True, kw_only=True)
class Finalist:
    """A plan on its way to be the winner.

    Attributes:
        result: its figures, comparable with those of all other plans.
        student: with the best weights so far.
        losses: one an image (n,), on images that its plan was not chosen on. Refits, and which state of a training is
            the best, are decided by these.
        further: likewise (m,), on images that no weights were chosen on; empty where there are none.
    """

    result: PlanResult
    student: nn.Module
    losses: torch.Tensor
    further: torch.Tensor

    @property
    def loss(self) -> float:
        """The mean over all these images; infinite where it is not finite."""
        return _mean(torch.cat([self.losses, self.further]))


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The winner, or None if no plan met the budget when measured again, and all results on the way.

    Attributes:
        best: the winner.
        results: of plans that were refitted, and of plans that were distilled as a whole.
        finetuning: the rounds of the latter, for `summary.json`.
    """

    best: Finalist | None
    results: list[PlanResult]
    finetuning: dict[str, Any] = field(default_factory=lambda: halving.summary([]))


def finish(context: Context, results: Sequence[PlanResult], model: AdditiveModel) -> Outcome:
    """Refit and distil the best plans, and choose the winner by its loss after that.

    What was measured corrects the model, and exact plans are solved for again: those of the study may have left room
    below the budget. Only plans that meet it when measured again, for long, have their turn: latency does not depend on
    weights, so that nothing is refitted or distilled in vain. If all miss it, the model is corrected once more, and
    further plans that are a little faster are measured.
    """
    further: list[PlanResult] = []
    missed: list[PlanResult] = []
    chosen: list[PlanResult] = []
    limit = context.budget_ms
    for _ in range(ATTEMPTS):
        model, more = solved_again(context, model, [*results, *further, *missed], limit)
        further += more
        over = {result.plan for result in missed}
        chosen, missed_again = _finalists(
            context, [r for r in (*results, *further) if r.plan not in over], limit
        )
        missed += missed_again
        if chosen or not (missed_again or more):
            break
        limit *= STRICTER
    ready = _refitted(context, chosen)
    tuning = halving.summary([])
    made = {f.result: None for f in ready}
    if context.settings.finetune_minutes:
        ready, tuning = _in_rounds(context, ready)
        made |= {f.result: None for f in ready}
    return Outcome(
        best=min(ready, key=lambda f: f.loss, default=None),
        results=[*further, *(result for result in made if result.source in ("refit", "finetuned"))],
        finetuning=tuning,
    )


def _finalists(
    context: Context, results: Sequence[PlanResult], limit_ms: float
) -> tuple[list[PlanResult], list[PlanResult]]:
    """Return the plans of lowest loss that meet the limit in a second, longer measurement, and those that miss it.

    As many as are still wanted are measured at once, each once for the same results and limit, so that a resumed
    search takes the same.
    """
    stored: dict[str, dict[str, list[dict[str, Any]]]] = context.run.load("finalists") or {}
    asked = json_hash([[limit_ms], *([r.plan.key, r.latency_ms, r.loss] for r in results)])[:16]
    found = stored.setdefault(asked, {"meet": [], "miss": []})
    ranked = sorted((r for r in results if r.latency_ms <= limit_ms), key=lambda r: r.loss)
    evaluator = context.evaluator
    with context.reporter.phase("the best plans, measured again", REFITTED) as report:
        while wanted := REFITTED - len(found["meet"]):
            done = len(found["meet"]) + len(found["miss"])
            several = {r.plan.key: r for r in ranked[done : min(done + wanted, MEASURED)]}
            if not several:
                break
            latencies = evaluator.final_latency(
                {
                    key: assemble(context.teacher.model, evaluator.modules(result.plan))
                    for key, result in several.items()
                }
            )
            for key, (ms, most) in latencies.items():
                name = "meet" if _meets(limit_ms, ms, most) else "miss"
                found[name].append(replace(several[key], latency_ms=ms).to_json())
            context.run.store("finalists", stored)
            report(len(found["meet"]))
    meet, miss = ([PlanResult.from_json(row) for row in found[name]] for name in ("meet", "miss"))
    return meet, miss


def _meets(limit_ms: float, ms: float, most: float) -> bool:
    """Say whether a latency meets a limit: on a busy machine a plan would otherwise have to be far below it."""
    return ms <= limit_ms and most <= SURELY * limit_ms


def _refitted(context: Context, results: Sequence[PlanResult]) -> list[Finalist]:
    """Refit the plans' students on their own activations; return each as stitched or refitted, whichever is better."""
    folders = {r.plan: context.run.path / "finalists" / f"{r.plan.key}-refit" for r in results}
    found = {plan: _load(context, folder) for plan, folder in folders.items()}
    todo = {r.plan: r for r in results if found[r.plan] is None}
    if todo:
        students = _refits(context, {plan: folders[plan] for plan in todo})
        with context.reporter.phase("the best students, judged", len(todo)) as report:
            for number, (plan, result) in enumerate(todo.items(), 1):
                finalist = _better(context, result, students[plan])
                _save(context, folders[plan], finalist)
                found[plan] = finalist
                report(number)
    # Their latency is that of the last measurement, also where they were refitted before it.
    return [_timed(f, r.latency_ms) for r in results if (f := found[r.plan]) is not None]


def _refits(context: Context, folders: Mapping[Plan, Path]) -> dict[Plan, nn.Module]:
    """Return plans' students, stitched afresh and refitted; each is written to its folder before any is judged.

    Should a process be killed while they are judged, none is refitted again: a student without a `result.json` is to
    be judged. If `_save` had just put the stitched student there, that one is found no better than itself.
    """
    teacher, evaluator = context.teacher, context.evaluator
    students = {
        plan: _student(context, folder) for plan, folder in folders.items() if (folder / PLAN_FILE).exists()
    }
    stitched = {
        plan: stitch(
            teacher,
            evaluator.modules(plan, fresh=True),
            {site: candidate.mixer for site, candidate in plan.choices},
        )
        for plan in folders
        if plan not in students
    }
    if stitched:
        batches = image_batches(context.data, context.refit_images, teacher.image)
        with context.reporter.phase("sequential refit", len(teacher.sites)) as report:
            refit_students(teacher, list(stitched.values()), batches, on_site=report)
    for plan, one in stitched.items():
        save_student(folders[plan], Student(plan=plan, model=one.student), teacher)
        students[plan] = one.student
    return students


def _better(context: Context, result: PlanResult, refitted: nn.Module) -> Finalist:
    """Return a plan's student, as stitched or refitted, whichever is better."""
    student = assemble(context.teacher.model, context.evaluator.modules(result.plan))
    losses, after = (context.final_judge.losses(one) for one in (student, refitted))
    if _mean(after) < _mean(losses):
        result = _judged_again(context, result, refitted, source="refit")
        student, losses = refitted, after
    return Finalist(result=result, student=student, losses=losses, further=_further(context, student))


def _in_rounds(context: Context, ready: Sequence[Finalist]) -> tuple[list[Finalist], dict[str, Any]]:
    """Distil students as a whole in rounds (see `halving`); return each as its last round left it, and the rounds.

    Those that are as good as their teacher have nothing to learn.
    """
    harmless = context.final_judge.harmless_loss()
    entries = {f.result.plan.key: f for f in ready if f.result.plan.replaced() and not f.loss <= harmless}
    evaluate = held_out(context, context.settings.device) if entries else None
    rounds = halving.rounds(
        len(entries), 60 * context.settings.finetune_minutes, shortest=TURN * context.teacher_ms / 1000
    )
    with context.reporter.phase("distillation as a whole", sum(one.plans for one in rounds)) as report:

        def tune(finalist: Finalist, this: halving.Round, turn: int) -> Finalist:
            assert evaluate is not None
            return _finetuned(context, finalist, this, evaluate, lambda share: report(turn + share))

        last, played = halving.halve(
            entries,
            rounds,
            loss=lambda finalist: finalist.loss,
            tune=tune,
            on_round=lambda played: context.run.store("finetuning", halving.summary(played)),
        )
    return [last.get(f.result.plan.key, f) for f in ready], halving.summary(played)


def _finetuned(
    context: Context,
    finalist: Finalist,
    this: halving.Round,
    evaluate: Callable[[nn.Module], float],
    on_progress: Callable[[float], None],
) -> Finalist:
    """Give a student a round; return it as it was if that did not help. What was stopped goes on."""
    # A round is as long as the number of plans says, which may change where a search is made longer.
    name = f"{finalist.result.plan.key}-round{this.number}-of-{this.of}"
    folder = context.run.path / "finalists" / name
    finished = _load(context, folder)
    if finished is not None:
        remove_checkpoint(folder)  # a kill may have come before that
        return _timed(finished, finalist.result.latency_ms)
    tuned, _ = finetune(
        context.teacher,
        finalist.student,
        context.training_images,
        seconds=this.seconds,
        evaluate=evaluate,
        seed=context.settings.seed,
        device=context.settings.device,
        checkpoint=folder,
        on_progress=on_progress,
    )
    if tuned is not finalist.student:
        losses, further = context.final_judge.losses(tuned), _further(context, tuned)
        if has_helped(finalist.losses - losses, finalist.further - further):
            result = _judged_again(context, finalist.result, tuned, source="finetuned")
            finalist = Finalist(result=result, student=tuned, losses=losses, further=further)
    _save(context, folder, finalist)
    remove_checkpoint(folder)
    return finalist


def _timed(finalist: Finalist, latency_ms: float) -> Finalist:
    return replace(finalist, result=replace(finalist.result, latency_ms=latency_ms))


def _further(context: Context, student: nn.Module) -> torch.Tensor:
    """Return a student's losses (m,) on the further validation images; empty where there are none."""
    return context.choice_judge.losses(student) if context.image_parts.choice else torch.empty(0)


def _judged_again(context: Context, result: PlanResult, student: nn.Module, *, source: str) -> PlanResult:
    """Return a plan's figures with other weights, comparable with those of all other plans."""
    judged = context.study_judge.evaluate(student)
    # Latency does not depend on weights: it is that of the plan.
    return replace(
        result, loss=judged.loss, agreement=judged.agreement, accuracy=judged.accuracy, source=source
    )


def _save(context: Context, folder: Path, finalist: Finalist) -> None:
    """Write a finalist; `result.json` comes last, so that it only stands for a whole one."""
    save_student(folder, Student(plan=finalist.result.plan, model=finalist.student), context.teacher)
    losses = {"final_losses": _finite(finalist.losses), "further_losses": _finite(finalist.further)}
    write_json(folder / "result.json", finalist.result.to_json() | losses)


def _load(context: Context, folder: Path) -> Finalist | None:
    if not (folder / "result.json").exists():
        return None
    found = read_json(folder / "result.json")
    losses, further = (
        torch.tensor([math.nan if loss is None else loss for loss in found.pop(name)])
        for name in ("final_losses", "further_losses")
    )
    return Finalist(
        result=PlanResult.from_json(found),
        student=_student(context, folder),
        losses=losses,
        further=further,
    )


def _student(context: Context, folder: Path) -> nn.Module:
    return load_student(folder, model=assemble(context.teacher.model, {})).model.requires_grad_(False)


def _mean(losses: torch.Tensor) -> float:
    """Return the mean of losses, infinite where it is not finite."""
    mean = float(losses.mean())
    return mean if math.isfinite(mean) else math.inf


def _finite(losses: torch.Tensor) -> list[float | None]:
    return [loss if math.isfinite(loss) else None for loss in losses.tolist()]
