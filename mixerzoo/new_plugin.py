"""A plugin to begin with: a complete distribution with one mixer, written from the templates.

The templates are `templates/plugin/*.txt`; none of them is named as what it becomes, so that no tool takes one with
its placeholders for source.
"""

from __future__ import annotations

import importlib.util
import keyword
import os
import re
import shlex
import shutil
from collections.abc import Collection
from importlib.resources import files
from pathlib import Path
from string import Template, ascii_lowercase

from mixerzoo.errors import MixerzooError
from mixerzoo.plan import KEEP, KEEP_LETTER
from mixerzoo.registry import get_registry
from mixerzoo.temporary import temporary_of

# Path in the plugin -> template; the paths have placeholders too.
FILES = {
    "pyproject.toml": "pyproject.toml.txt",
    "README.md": "README.md.txt",
    "src/$package/__init__.py": "mixer.py.txt",
    "tests/test_$name.py": "test_mixer.py.txt",
}
EMPTY = "src/$package/py.typed"

# What the template of the mixer imports: a class of that name would take its place.
IMPORTED = {"AttentionView", "Callable", "Caps", "MixerSpec"}

# With more, the lines of the templates outgrow what ruff lets pass.
MOST_LETTERS = 40

_NAME = re.compile(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*")


def new_plugin(name: str, out: Path | None = None) -> tuple[str, Path]:
    """Write a plugin with one mixer, all of it or nothing; returns the mixer's name and the plugin's folder.

    Args:
        name: of the mixer, in kebab or snake case.
        out: folder of the plugin, `mixerzoo-<name>` unless given; it must not exist.

    Raises:
        MixerzooError: for a name that will not do or is taken, and for a folder that is there or cannot be written.
    """
    words = _words(name)
    out = Path(words["distribution"]) if out is None else out
    if os.path.lexists(out):
        raise MixerzooError(f"'{out}' exists already; remove it, or give another --out")
    temporary = temporary_of(out)
    try:
        for path, content in _contents(words).items():
            target = temporary / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(content, encoding="utf-8")
        temporary.rename(out)
    except OSError as error:
        raise MixerzooError(f"'{out}' cannot be written ({error.strerror}); give another --out") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return words["name"], out


def next_steps(name: str, folder: Path) -> str:
    """Return what to do with a new plugin, line by line."""
    steps = {
        f"cd {shlex.quote(str(folder))}": "",
        "pip install -e '.[test]'": "once: what is edited is what runs",
        "pytest": "every check of mixerzoo, and the values",
        f"mixerzoo check {name}": "the checks alone",
        f"mixerzoo search --budget 80% --mixers {name}": "on the embedded teacher and digits",
    }
    width = max(map(len, steps))
    lines = [f"  {step:<{width}}  {'# ' if why else ''}{why}".rstrip() for step, why in steps.items()]
    source = folder / "src" / f"mixerzoo_{name}" / "__init__.py"
    return "\n".join([f"wrote {folder}; the mixer is {source}", "", *lines])


def _words(name: str) -> dict[str, str]:
    """Return what stands for each placeholder.

    Raises:
        MixerzooError: if the name will not do.
    """
    if not _NAME.fullmatch(name) or len(name) > MOST_LETTERS:
        raise MixerzooError(
            f"name '{name}': give lower-case words joined by - or _, such as my-mixer, "
            f"{MOST_LETTERS} characters at most"
        )
    snake = name.replace("-", "_")
    class_name = "".join(word.capitalize() for word in snake.split("_"))
    package = f"mixerzoo_{snake}"
    mixers = get_registry().mixers
    if snake in mixers:
        raise MixerzooError(
            f"mixer '{snake}' is already registered by {mixers.origin(snake)}; give another name"
        )
    if snake == KEEP or {snake, class_name} & {*keyword.kwlist, *IMPORTED}:
        raise MixerzooError(f"name '{name}' means something else already; give another, such as my-{name}")
    if importlib.util.find_spec(package) is not None:
        raise MixerzooError(f"package '{package}' is already installed; give another name than '{name}'")
    return {
        "name": snake,
        "class_name": class_name,
        "package": package,
        "distribution": package.replace("_", "-"),
        "letter": _free_letter(snake, {KEEP_LETTER, *(spec.letter for spec in mixers)}),
    }


def _free_letter(name: str, taken: Collection[str]) -> str:
    """Return a letter for short plan names that no mixer has yet; the first of the name if all are taken."""
    initial = name[0].upper()
    seconds = [letter for letter in name[1:] + ascii_lowercase if letter.isalpha()]
    marks = [initial, *(initial + second for second in seconds)]
    return next((mark for mark in marks if mark not in taken), initial)


def _contents(words: dict[str, str]) -> dict[str, str]:
    """Return path -> content of the plugin's files."""
    templates = files("mixerzoo") / "templates" / "plugin"
    filled = {
        Template(path).substitute(words): Template((templates / file).read_text("utf-8")).substitute(words)
        for path, file in FILES.items()
    }
    return filled | {Template(EMPTY).substitute(words): ""}
