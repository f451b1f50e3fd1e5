"""`mixerzoo refit`. Heavy imports wait until the command runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


@click.command("refit")
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--plan",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A plan of this run's candidates, or the folder of a student.  [default: RUN/best]",
)
@click.option(
    "--minutes",
    default=0.0,
    show_default=True,
    help="Time for gradient steps after it, on all weights together.",
)
@click.option("--images", type=int, help="Images to refit on.  [default: as many as in a search]")
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="DIR", help="Folder to write.  [default: RUN/refit]"
)
@click.option("--tracking-uri", help="MLflow.  [default: mlflow.db in the working directory]")
@click.option("--quiet", is_flag=True, help="No progress.")
def refit_command(run: Path, quiet: bool, **options: Any) -> None:
    """Refit the best student of the finished search in RUN, site by site, in closed form.

    Each site sees what the student really feeds it, and corrects the drift of those before it; so do the
    teacher's own MLPs that the student keeps. The better of both students by validation loss is written;
    its latency stays what it was.
    """
    from mixerzoo.progress import Reporter
    from mixerzoo_search.refitting.run import closing_lines, refit_run

    found = refit_run(run, reporter=Reporter(quiet=quiet), **options)
    click.echo("\n".join(closing_lines(found)))
