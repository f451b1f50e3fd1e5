"""mixerzoo: what `mixerzoo search --budget X%` gives, the fine-tuning of its best few plans included."""

from __future__ import annotations

import shutil

from torch import nn

from mixerzoo.errors import BudgetOutOfReachError
from mixerzoo.hosts import assemble
from mixerzoo.plan import Plan
from mixerzoo.student import load_student
from mixerzoo_search import search
from mixerzoo_search.pipeline import SearchResult
from peer_students.problem import Cannot, Made, Problem


def make(problem: Problem) -> Made:
    """Search; a search that was stopped goes on. Its library is shared by the searches of a teacher."""
    ground = problem.ground
    out = ground.folder / f"search-{100 * problem.budget:g}-{problem.seed}"
    if problem.again:
        shutil.rmtree(out, ignore_errors=True)
    try:
        result = search(
            ground.model,
            ground.source,
            checkpoint=ground.checkpoint,
            budget=f"{100 * problem.budget:g}%",
            out=out,
            library=ground.library,
            tracking_uri=f"sqlite:///{ground.folder.resolve()}/mlflow.db",
            images=len(ground.indices),
            finetune_minutes=problem.minutes,
            threads=ground.meter.stopwatch.conditions.threads,
            seed=problem.seed,
            **ground.search,
        )
    except BudgetOutOfReachError as reason:
        raise Cannot(str(reason)) from None
    summary = result.summary
    if not summary["met"]:
        raise Cannot("no plan met the budget when it was measured again")
    plan = Plan.from_json(summary["best"]["plan"])
    about = {
        "plan": plan.to_json(),
        "evaluations": summary["evaluations"],
        "latency_model": summary["latency_model"],
        "score_model": summary["score_model"],
        "finetuning": summary["finetuning"],
        "wall_s": summary["wall_s"],
    }
    tuned = _loaded(problem, result, "best")
    refitted = f"finalists/{plan.key}-refit"
    before = (
        _loaded(problem, result, refitted) if (result.path / refitted / "result.json").exists() else tuned
    )
    return Made(student=before, tuned=tuned, about=about)


def _loaded(problem: Problem, result: SearchResult, folder: str) -> nn.Module:
    model = assemble(problem.ground.teacher.model, {})
    return load_student(result.path / folder, model=model).model.requires_grad_(False)
