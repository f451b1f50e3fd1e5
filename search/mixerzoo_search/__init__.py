"""Search over measured latency: the exact additive frontier, Optuna on the true loss, the winner measured again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from mixerzoo_search.pipeline import SearchResult

__all__ = ["search"]


def search(
    model: str | nn.Module = "digits_vit",
    data: str | Path = "digits",
    *,
    budget_ms: float | None = None,
    budget: str | None = None,
    out: str | Path | None = None,
    library: str | Path | None = None,
    storage: str | None = None,
    tracking_uri: str | None = None,
    quiet: bool = False,
    **settings: Any,
) -> SearchResult:
    """Search the most faithful student of `model` within a latency budget.

    Args:
        model: a `--model` name, or a model object of a family that a host knows.
        data: a `--data` value: `digits`, a folder of images, or an .npz file.
        budget_ms: latency budget in ms; give this or `budget`.
        budget: as people say it, such as `60%` or `5ms`.
        out: run directory; `runs/<model>-<budget>` unless given. If it holds this search, it goes on.
        library: folder of distilled candidates, which searches share; `library` beside the run directory unless given.
        storage: URL of the Optuna storage; SQLite in the run directory unless given.
        tracking_uri: of MLflow; `mlflow.db` in the working directory unless given.
        quiet: no progress on the terminal.
        settings: the other fields of `mixerzoo_search.settings.Settings`.

    Returns:
        The run directory and its summary.

    Raises:
        MixerzooError: for anything the user can mend.
        BudgetOutOfReachError: if even the fastest plan is over the budget.
    """
    from mixerzoo.errors import MixerzooError
    from mixerzoo.opening import adopt_teacher, open_data, open_teacher
    from mixerzoo.progress import Reporter
    from mixerzoo_search.pipeline import run_search
    from mixerzoo_search.run_directory import RunDirectory
    from mixerzoo_search.settings import Budget, Settings

    if (budget_ms is None) == (budget is None):
        raise MixerzooError("give one of budget_ms (--budget-ms 5) and budget (--budget 60%)")
    limit = Budget.parse(f"{budget_ms}ms" if budget is None else budget)
    name = model if isinstance(model, str) else type(model).__name__
    asked = Settings(model=name, data=str(data), budget=limit, **settings)
    teacher = open_teacher(model, asked.checkpoint) if isinstance(model, str) else adopt_teacher(model)
    path = Path(out) if out is not None else Path("runs") / f"{name.replace('/', '-')}-{limit.label}"
    return run_search(
        asked,
        teacher,
        open_data(asked.data),
        RunDirectory(path),
        reporter=Reporter(quiet=quiet),
        library=None if library is None else Path(library),
        storage=storage,
        tracking_uri=tracking_uri,
    )
