"""The embedded teacher on the embedded digits: one search a budget, from nothing, with the defaults."""

from __future__ import annotations

import tempfile
from pathlib import Path

import click
from common import headline, json_option, quick_option, write

from mixerzoo_search import search

BUDGETS = ("65%", "50%")


@click.command()
@click.option("--budgets", default=",".join(BUDGETS), show_default=True)
@click.option("--seed", default=0, show_default=True)
@json_option
@quick_option
def main(budgets: str, seed: int, json_path: Path | None, quick: bool) -> None:
    """Run the benchmark."""
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        for budget in budgets.split(","):
            result = search(
                budget=budget,
                seed=seed,
                out=Path(folder) / budget,
                library=Path(folder)
                / f"{budget}-library",  # nothing is shared: each figure is of a first search
                tracking_uri=f"sqlite:///{folder}/mlflow.db",
                trials=16 if quick else 48,
                finetune_minutes=0.2 if quick else 1.0,
            )
            figures[budget] = headline(result.summary)
    write(json_path, {"seed": seed, "searches": figures})


if __name__ == "__main__":
    main()
