"""A pruning in MLflow: one run, a child of the search's where the store has that; one child a pruned student."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mixerzoo.plan import Plan
from mixerzoo.student import read_plan
from mixerzoo.tracking import PARENT_TAG, Tracker
from mixerzoo_search.context import Context
from mixerzoo_search.journal import RUN_ID
from mixerzoo_search.prune.family import RECORD_FILE, Family

FIGURES = ("latency_ms", "latency_share", "params", "flops")


class PruneJournal:
    """The MLflow side of a family; a resumed pruning goes on in the same run."""

    def __init__(self, tracker: Tracker, context: Context, family: Family, plan: Plan) -> None:
        self.tracker, self.context, self.family = tracker, context, family
        known: str | None = family.record().get(RUN_ID)
        if known is None or not tracker.resume_parent(known):
            parent = context.run.record().get(RUN_ID)
            tags = {"mixerzoo.source": "prune", "mixerzoo.folder": str(family.path.resolve())}
            if parent is not None and tracker.children(parent):
                tags[PARENT_TAG] = parent
            known = tracker.start_parent(
                f"{self._short(plan)} {plan.key[:6]} {family.path.name}",
                params={"plan": self._short(plan), **family.identity},
                tags=tags,
            )
            family.note(**{RUN_ID: known})
        self.run_id = known
        self.children = tracker.children(known)
        self._last = tracker.last_step(known, "train_loss")

    def row(self, row: dict[str, Any]) -> None:
        """Log a row of the curve of the training with the penalty, unless it is there."""
        if row["step"] > self._last:
            metrics = {"train_loss": row["loss"], "held_out_loss": row["held_out"], "lr": row["lr"]}
            self.tracker.log_step(self.run_id, row["step"], metrics)

    def students(self) -> None:
        """Log the pruned students that are not there yet."""
        for result in self.family.record().get("students", {}).values():
            path = self.family.student_path(result["target"])
            if path.name not in self.children and self.family.done(result["target"]):
                self._student(path.name, Plan.from_json(read_plan(path)["plan"]), result)

    def _student(self, name: str, plan: Plan, result: Mapping[str, Any]) -> None:
        metrics = {key: result.get(key) for key in FIGURES} | dict(result["validation"]["after"])
        metrics |= {f"test_{key}": value for key, value in result["test"]["after"].items()}
        for phase, figures in result["phases"].items():
            metrics |= {f"{phase}.{key}": value for key, value in figures["test"].items()}
        self.children[name] = self.tracker.log_child(
            self.run_id,
            name,
            plan=plan,
            short_name=self._short(plan),
            metrics=metrics,
            tags={"mixerzoo.source": "pruned", "mixerzoo.target": f"{result['target']:g}"},
        )

    def end(self, status: str) -> None:
        """End the run as FINISHED, FAILED or KILLED."""
        if status == "FINISHED":
            self.tracker.log_artifacts(self.run_id, [self.family.path / RECORD_FILE])
        self.tracker.finish(self.run_id, status)

    def _short(self, plan: Plan) -> str:
        return plan.short_name(self.context.teacher.sites, self.context.letters)
