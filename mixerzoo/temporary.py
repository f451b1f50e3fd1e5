"""Where a process makes what is then renamed into its place, and what a killed process may have left there."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

_NAME = re.compile(r"\..+\.\d+\.tmp")


def temporary_of(path: Path) -> Path:
    """Return where this process makes what is then renamed to `path`: beside it, so that a rename is enough."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes were making in a folder; the caller works there alone."""
    for found in folder.iterdir():
        if _NAME.fullmatch(found.name):
            if found.is_dir():
                shutil.rmtree(found, ignore_errors=True)
            else:
                found.unlink(missing_ok=True)


def is_free(path: Path) -> bool:
    """Say whether nothing is at `path`, or a folder with no more in it than what killed processes were making."""
    if not path.is_dir():
        return not path.exists()
    return all(_NAME.fullmatch(found.name) for found in path.iterdir())
