"""From the best plans to the winner: measured again, refitted, distilled as a whole in rounds, measured once more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from mixerzoo.checkpoint import remove_checkpoint
from mixerzoo.files import read_json, write_json
from mixerzoo.finetune import finetune
from mixerzoo.hosts import assemble
from mixerzoo.refit import refit
from mixerzoo.student import Student, load_student, save_student
from mixerzoo_search.additive import AdditiveModel
from mixerzoo_search.context import Context
from mixerzoo_search.evaluate import PlanResult
from mixerzoo_search.finetuning import halving
from mixerzoo_search.finetuning.held_out import held_out
from mixerzoo_search.recalibrate import solved_again

REFITTED = 4  # plans that are refitted, and distilled as a whole in rounds
MEASURED = 8  # plans that are measured again at a time to find those
SURELY = 1.03  # a plan meets a limit that it does not exceed, and certainly not by so many times
REFIT_TOKENS = 65_536  # tokens that a readout is solved on: more no longer change it
STRICTER = (
    0.97  # where every finalist misses the budget when measured again, the next ones must be this faster
)
ATTEMPTS = 8


@dataclass(frozen=True, kw_only=True)
class Finalist:
    """A plan on its way to be the winner."""

    result: PlanResult
    student: nn.Module


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
    below the budget. Only plans that meet it when measured again have their turn. The winner is measured once more,
    beside the teacher: if it misses the budget, the next best is taken. If all do, the model is corrected once more,
    and further plans that are a little faster have their turn.
    """
    made: dict[str, PlanResult] = {}
    further: list[PlanResult] = []
    missed: list[PlanResult] = []
    tuning = halving.summary([])
    limit = context.budget_ms
    for _ in range(ATTEMPTS):
        model, more = solved_again(context, model, [*results, *further, *missed], limit)
        further += more
        over = {result.plan for result in missed}
        chosen, missed_again = _finalists(
            context, [r for r in (*results, *further) if r.plan not in over], limit
        )
        missed += missed_again
        ready = [_refitted(context, result, model) for result in chosen]
        made |= {f"{f.result.plan.key} {f.result.source}": f.result for f in ready}
        if context.settings.finetune_minutes:
            ready, tuning = _in_rounds(context, ready)
            made |= {f"{f.result.plan.key} {f.result.source}": f.result for f in ready}
        best = _choose(context, ready, missed)
        if best is not None:
            break
        if not chosen and not missed_again and not more:
            break
        limit *= STRICTER
    extra = [result for result in made.values() if result.source in ("refit", "finetuned")]
    return Outcome(best=best, results=[*further, *extra], finetuning=tuning)


def _finalists(
    context: Context, results: Sequence[PlanResult], limit_ms: float
) -> tuple[list[PlanResult], list[PlanResult]]:
    """Return the plans of lowest loss that meet the limit in a second, longer measurement, and those that miss it.

    Decided once for a number of results and a limit, so that a resumed search takes the same.
    """
    stored: dict[str, dict[str, list[dict[str, object]]]] = context.run.load("finalists") or {}
    key = f"{len(results)} {limit_ms:.6g}"
    if key not in stored:
        ranked = sorted((r for r in results if r.latency_ms <= limit_ms), key=lambda r: r.loss)
        meet: list[PlanResult] = []
        miss: list[PlanResult] = []
        while len(meet) < REFITTED and (part := ranked[len(meet) + len(miss) :][:MEASURED]):
            evaluator = context.evaluator
            again = evaluator.final_latency(
                {r.plan.key: assemble(context.teacher.model, evaluator.modules(r.plan)) for r in part}
            )
            for result in part:
                ms, most = again[result.plan.key]
                (meet if _meets(limit_ms, ms, most) else miss).append(replace(result, latency_ms=ms))
        stored[key] = {
            "meet": [r.to_json() for r in meet[:REFITTED]],
            "miss": [r.to_json() for r in miss],
        }
        context.run.store("finalists", stored)
    found = {name: [PlanResult.from_json(row) for row in rows] for name, rows in stored[key].items()}
    return found["meet"], found["miss"]


def _meets(limit_ms: float, ms: float, most: float) -> bool:
    """Say whether a latency meets a limit: on a busy machine a plan would otherwise have to be far below it."""
    return ms <= limit_ms and most <= SURELY * limit_ms


def _refitted(context: Context, result: PlanResult, model: AdditiveModel) -> Finalist:
    """Stitch the plan's student afresh and refit it on its own activations; keep whichever is better."""
    folder = context.run.path / "finalists" / f"{result.plan.key}-refit"
    finished = _load(context, folder)
    if finished is not None:
        return finished
    teacher, evaluator = context.teacher, context.evaluator
    modules = evaluator.modules(result.plan, fresh=True)
    mixers = {site: candidate.mixer for site, candidate in result.plan.choices}
    batches = context.calibration_batches
    enough = max(2, -(-REFIT_TOKENS // (teacher.sites[0].tokens * len(batches[0]))))
    with context.reporter.phase("sequential refit", len(teacher.sites)) as report:
        student = refit(teacher, modules, mixers, batches[:enough], on_site=report)
    finalist = Finalist(
        result=evaluator.evaluate_student(result.plan, student, model, source="refit"), student=student
    )
    if not finalist.result.loss <= result.loss:  # also where it is NaN
        finalist = Finalist(result=result, student=assemble(teacher.model, evaluator.modules(result.plan)))
    _save(context, folder, finalist)
    return finalist


def _in_rounds(context: Context, ready: Sequence[Finalist]) -> tuple[list[Finalist], dict[str, Any]]:
    """Distil students as a whole in rounds (see `halving`); return each as its last round left it, and the rounds."""
    entries = {f.result.plan.key: f for f in ready if f.result.plan.replaced()}
    evaluate = held_out(context, context.settings.device) if entries else None
    turns = sum(one.plans for one in halving.rounds(len(entries), 1.0))
    with context.reporter.phase("distillation as a whole", turns) as report:

        def tune(finalist: Finalist, this: halving.Round, turn: int) -> Finalist:
            assert evaluate is not None
            return _finetuned(context, finalist, this, evaluate, lambda share: report(turn + share))

        last, played = halving.halve(
            entries,
            60 * context.settings.finetune_minutes,
            loss=lambda finalist: finalist.result.loss,
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
        return finished
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
    judged = context.judge.evaluate(tuned)
    if tuned is not finalist.student and not finalist.result.loss <= judged.loss:
        # Latency does not depend on weights: it is that of the plan.
        result = replace(
            finalist.result,
            loss=judged.loss,
            agreement=judged.agreement,
            accuracy=judged.accuracy,
            source="finetuned",
        )
        finalist = Finalist(result=result, student=tuned)
    _save(context, folder, finalist)
    remove_checkpoint(folder)
    return finalist


def _save(context: Context, folder: Path, finalist: Finalist) -> None:
    """Write a finalist; `result.json` comes last, so that it only stands for a whole one."""
    save_student(folder, Student(plan=finalist.result.plan, model=finalist.student), context.teacher)
    write_json(folder / "result.json", finalist.result.to_json())


def _load(context: Context, folder: Path) -> Finalist | None:
    if not (folder / "result.json").exists():
        return None
    student = load_student(folder, model=assemble(context.teacher.model, {}))
    result = PlanResult.from_json(read_json(folder / "result.json"))
    return Finalist(result=result, student=student.model.requires_grad_(False))


def _choose(context: Context, ready: Sequence[Finalist], missed: list[PlanResult]) -> Finalist | None:
    """Return the best that meets the budget when measured once more, with that latency.

    Those that do not are added to `missed`, with theirs.
    """
    for finalist in sorted(ready, key=lambda f: f.result.loss):
        ms, most = _last_latency(context, finalist)
        if _meets(context.budget_ms, ms, most):
            return replace(finalist, result=replace(finalist.result, latency_ms=ms))
        missed.append(replace(finalist.result, latency_ms=ms))
        context.reporter.note(
            f"measured again: {ms:.3g} ms, up to {most:.3g} ms, over the budget; the next best is taken"
        )
    return None


def _last_latency(context: Context, finalist: Finalist) -> tuple[float, float]:
    """Measure a plan's student alone beside the teacher, once: a search that is started again has the same winner."""
    stored: dict[str, tuple[float, float]] = context.run.load("last_latency") or {}
    key = finalist.result.plan.key  # it does not depend on weights
    if key not in stored:
        (stored[key],) = context.evaluator.final_latency({"student": finalist.student}).values()
        context.run.store("last_latency", stored)
    ms, most = stored[key]
    return ms, most
