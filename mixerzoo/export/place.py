"""Where an export goes: decided before anything is made, made beside its place, renamed into it when it is whole."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mixerzoo.errors import MixerzooError
from mixerzoo.export.formats import Format
from mixerzoo.student import PLAN_FILE
from mixerzoo.student_source import Source
from mixerzoo.temporary import temporary_of

FOLDER = "export"


def target_of(form: Format, source: Source, out: Path | None) -> Path:
    """Return where the export goes; only an earlier file is replaced, never a folder."""
    if out is None:
        beside = source.given.parent if source.given.is_file() else source.given
        target = beside / FOLDER / form.file
    elif form.is_folder or out.suffix == Path(form.file).suffix:
        target = out if out.name not in ("", "..") else out.resolve()  # "." has no name
    elif out.suffix and not out.is_dir():
        raise MixerzooError(f"--out {out}: a file of --format {form.name} ends in {Path(form.file).suffix}")
    else:
        target = out / form.file
    if target.is_dir() and (not form.is_folder or any(target.iterdir())):
        raise MixerzooError(f"'{target}' exists; remove it, or give another --out")
    if form.is_folder and target.is_file():
        raise MixerzooError(f"'{target}' is a file; give a folder with --out")
    if target.exists() and source.path.exists() and target.resolve() in _own_files(source):
        raise MixerzooError(f"'{target}' is the student itself; give another --out")
    return target


def _own_files(source: Source) -> list[Path]:
    path = source.path.resolve()
    return [path] if path.is_file() else [path / name.name for name in path.iterdir()]


@contextmanager
def workshop_of(target: Path) -> Iterator[Path]:
    """Give a folder beside the target to work in; it is gone afterwards, with all that was not put in its place."""
    workshop = temporary_of(target)
    made = [folder for folder in (target.parent, *target.parent.parents) if not folder.exists()]
    try:
        shutil.rmtree(workshop, ignore_errors=True)  # a killed process may have had the same number
        workshop.mkdir(parents=True)
        yield workshop
    except OSError as error:
        raise MixerzooError(
            f"'{target}' cannot be written ({error.strerror or error}); give another --out"
        ) from None
    finally:
        shutil.rmtree(workshop, ignore_errors=True)
        for folder in made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def place(form: Format, workshop: Path, target: Path) -> dict[Path, int]:
    """Rename what was made into its place, the file itself last; return file -> bytes."""
    if form.is_folder:
        folder = workshop / target.name
        if target.is_dir():  # it is empty; who stands in it shall not lose it
            for path in sorted(folder.iterdir(), key=lambda path: path.name == PLAN_FILE):
                path.rename(target / path.name)
        else:
            folder.rename(target)
        return {path: path.stat().st_size for path in sorted(target.iterdir())}
    made = sorted(workshop.iterdir(), key=lambda path: path.name == target.name)
    for path in made:
        path.replace(target.with_name(path.name))
    placed = [target, *(target.with_name(path.name) for path in made if path.name != target.name)]
    return {path: path.stat().st_size for path in placed}
