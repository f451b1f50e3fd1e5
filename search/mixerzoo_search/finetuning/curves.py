"""The curves of a fine-tuning in MLflow: one run, a child of the search's where the store has that."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixerzoo.plan import Plan
from mixerzoo.tracking import PARENT_TAG, Tracker
from mixerzoo_search.context import Context
from mixerzoo_search.finetuning.folder import TuningFolder
from mixerzoo_search.improved import RESULT_FILE
from mixerzoo_search.journal import RUN_ID


class Curves:
    """Training loss, held-out loss and learning rate by step; a resumed training goes on in the same run."""

    def __init__(self, tracker: Tracker, context: Context, folder: TuningFolder, plan: Plan) -> None:
        self.tracker = tracker
        known: str | None = folder.record().get(RUN_ID)
        if known is None or not tracker.resume_parent(known):
            parent = context.run.record().get(RUN_ID)
            tags = {"mixerzoo.source": "finetune", "mixerzoo.folder": str(folder.path.resolve())}
            if parent is not None and tracker.children(parent):
                tags[PARENT_TAG] = parent
            short = plan.short_name(context.teacher.sites, context.letters)
            mixers = Counter(candidate.mixer for _, candidate in plan.choices)
            counts = {f"count.{mixer}": count for mixer, count in sorted(mixers.items())}
            known = tracker.start_parent(
                f"{short} {plan.key[:6]} {folder.path.name}",
                params={"plan": short, **folder.identity, **counts, **plan.to_json()},
                tags=tags,
            )
            folder.note(**{RUN_ID: known})
        self.run_id = known
        # Steps between the checkpoint and the kill are taken again.
        self._last = tracker.last_step(known, "train_loss")

    def row(self, row: dict[str, Any]) -> None:
        """Log a row of the curve, unless it is there."""
        if row["step"] > self._last:
            metrics = {"train_loss": row["loss"], "held_out_loss": row["held_out"], "lr": row["lr"]}
            self.tracker.log_step(self.run_id, row["step"], metrics)

    def conclude(self, result: Mapping[str, Any], path: Path) -> None:
        """Log the figures of the student that was kept, and its files but the weights."""
        kept = result["kept"]
        metrics = result["validation"][kept] | {"params": float(result["params"])}
        metrics |= {f"test_{name}": value for name, value in result["test"][kept].items()}
        self.tracker.log_artifacts(self.run_id, [path / "plan.json", path / RESULT_FILE])
        self.tracker.finish(self.run_id, "FINISHED", metrics)

    def end(self, status: str) -> None:
        """Mark the run as one that was stopped."""
        self.tracker.finish(self.run_id, status)
