"""What a search writes to MLflow: one parent run, one child a true evaluation, the results as artifacts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mixerzoo.hosts import Teacher
from mixerzoo.registry import get_registry
from mixerzoo.tracking import Tracker
from mixerzoo_search.evaluate import PlanResult
from mixerzoo_search.run_directory import RunDirectory
from mixerzoo_search.settings import Settings

RUN_ID = "mlflow_run_id"  # in run.json
ARTIFACTS = ("summary.json", "report.html", "report.png", "run.json")


class Journal:
    """The MLflow side of one run directory; a resumed search goes on in the same parent run."""

    def __init__(self, tracker: Tracker, run: RunDirectory, settings: Settings, teacher: Teacher) -> None:
        self.tracker = tracker
        self.run = run
        self.teacher = teacher
        self.letters = {spec.name: spec.letter for spec in get_registry().mixers}
        known = run.record().get(RUN_ID)
        if known is None or not tracker.resume_parent(known):
            known = tracker.start_parent(
                run.path.name,
                params=settings.identity() | {"teacher": teacher.name},
                tags={"mixerzoo.run": str(run.path.resolve())},
            )
            run.note(**{RUN_ID: known})
        self.parent: str = known
        self.children = tracker.children(known)

    def name(self, result: PlanResult) -> str:
        """Return the name of a result's child run; it tells students of one plan apart by how they were made."""
        short = result.plan.short_name(self.teacher.sites, self.letters)
        made = "" if result.source in ("exact", "sampler") else f" {result.source}"
        return f"{short} {result.plan.key[:6]}{made}"

    def log(self, result: PlanResult) -> None:
        """Log a result as a child run, unless it is there already."""
        name = self.name(result)
        if name in self.children:
            return
        self.children[name] = self.tracker.log_child(
            self.parent,
            name,
            plan=result.plan,
            short_name=result.plan.short_name(self.teacher.sites, self.letters),
            metrics={
                "loss": result.loss,
                "agreement": result.agreement,
                "accuracy": result.accuracy,
                "latency_ms": result.latency_ms,
                "predicted_ms": result.predicted_ms,
                "predicted_loss": result.predicted_loss,
                "params": float(result.params),
            },
            tags={"mixerzoo.source": result.source},
        )

    def conclude(self, summary: Mapping[str, Any], frontier: Sequence[PlanResult]) -> None:
        """Mark the frontier, log the winner's figures and the artifacts."""
        on_frontier = {self.name(result) for result in frontier}
        for name, child in self.children.items():
            self.tracker.update_child_metric(child, "on_frontier", float(name in on_frontier))
        best = summary["best"] or {}
        metrics = {
            "teacher_latency_ms": summary["teacher"]["latency_ms"],
            "teacher_accuracy": summary["teacher"]["accuracy"],
            "budget_ms": summary["budget_ms"],
            "met": float(summary["met"]),
            "hypervolume": summary["hypervolume"],
            "latency_ms": best.get("latency_ms"),
            "loss": best.get("loss"),
            "agreement": best.get("agreement"),
            "accuracy": best.get("accuracy"),
            "params": best.get("params"),
        }
        paths = [self.run.path / name for name in ARTIFACTS]
        self.tracker.log_artifacts(self.parent, [*paths, self.run.path / "best" / "plan.json"])
        self._metrics = metrics

    def finish(self, status: str) -> None:
        """End the parent run as FINISHED, FAILED or KILLED."""
        self.tracker.finish(self.parent, status, getattr(self, "_metrics", None))
        self.tracker.close()
