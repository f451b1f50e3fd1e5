"""Search over measured latency: the exact additive frontier, Optuna on the true loss, the winner measured again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from mixerzoo_search.joining import Joined
    from mixerzoo_search.pipeline import SearchResult
    from mixerzoo_search.settings import Budget

__all__ = ["join", "search"]


def search(
    model: str | nn.Module | None = None,
    data: str | Path | None = None,
    *,
    budget_ms: float | None = None,
    budget: str | None = None,
    from_run: str | Path | None = None,
    out: str | Path | None = None,
    library: str | Path | None = None,
    storage: str | None = None,
    tracking_uri: str | None = None,
    quiet: bool = False,
    **settings: Any,
) -> SearchResult:
    """Search the most faithful student of `model` within a latency budget.

    Args:
        model: a `--model` name, or a model object of a family that a host knows; the embedded teacher unless given.
        data: a `--data` value: `digits`, a folder of images, or an .npz file; the embedded digits unless given.
        budget_ms: latency budget in ms; give this or `budget`.
        budget: as people say it, such as `60%` or `5ms`.
        from_run: run directory of an earlier search, whose latencies, scores, statistics, library and evaluated plans
            are taken over; arguments that are not given are its own.
        out: run directory; `runs/<model>-<budget>`, or `<from_run>-<budget>`, unless given. If it holds this search,
            it goes on.
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
    from mixerzoo_search.joining import run_search
    from mixerzoo_search.starting import ask

    return run_search(
        ask(
            model,
            data,
            budget=_budget(budget_ms, budget, needed=from_run is None),
            out=_path(out),
            source=_path(from_run),
            options=settings,
            quiet=quiet,
            storage=storage,
            library=_path(library),
            tracking_uri=tracking_uri,
        )
    )


def join(
    run: str | Path | None = None,
    model: str | nn.Module | None = None,
    data: str | Path | None = None,
    *,
    budget_ms: float | None = None,
    budget: str | None = None,
    out: str | Path | None = None,
    library: str | Path | None = None,
    storage: str | None = None,
    tracking_uri: str | None = None,
    quiet: bool = False,
    **settings: Any,
) -> SearchResult | Joined:
    """Take part in a search that another process leads; lead it if none does, or that process ends.

    Args:
        run: its run directory; that of the other arguments unless given, where a search begins if there is none.
        model: as for `search`, like all others; what is given must be what the search has.
        data: likewise.
        budget_ms: likewise.
        budget: likewise.
        out: likewise.
        library: likewise.
        storage: likewise.
        tracking_uri: likewise.
        quiet: likewise.
        settings: likewise.

    Returns:
        What this process has evaluated; the result of the search if it came to lead it.

    Raises:
        MixerzooError: for anything the user can mend.
        BudgetOutOfReachError: if this process leads, and even the fastest plan is over the budget.
    """
    from mixerzoo_search.joining import join_search
    from mixerzoo_search.run_directory import RunDirectory
    from mixerzoo_search.starting import MODEL, ask, default_out, name_of

    limit = _budget(budget_ms, budget, needed=run is None and out is None)
    path = _path(run) or _path(out)
    if path is None:
        assert limit is not None
        path = default_out(name_of(MODEL if model is None else model), limit)
    there = run is not None or RunDirectory(path).begun
    return join_search(
        ask(
            model,
            data,
            budget=limit,
            out=path,
            join=path if there else None,
            options=settings,
            quiet=quiet,
            storage=storage,
            library=_path(library),
            tracking_uri=tracking_uri,
        )
    )


def _budget(budget_ms: float | None, budget: str | None, *, needed: bool) -> Budget | None:
    from mixerzoo.errors import MixerzooError
    from mixerzoo_search.settings import Budget

    if (budget_ms is not None) + (budget is not None) != 1 and (needed or budget is not None):
        raise MixerzooError("give one of budget_ms (--budget-ms 5) and budget (--budget 60%)")
    if budget is None and budget_ms is None:
        return None
    return Budget.parse(f"{budget_ms}ms" if budget is None else budget)


def _path(path: str | Path | None) -> Path | None:
    return None if path is None else Path(path)
