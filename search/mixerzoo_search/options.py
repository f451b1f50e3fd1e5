"""Options that several commands share, and how they are read."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import click


def common_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that name the teacher and the data, and say under what latency is measured."""
    return teacher_options(condition_options(command))


def condition_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that say under what latency is measured."""
    for option in (
        click.option(
            "--runtime",
            default="eager",
            show_default=True,
            help="Under which latency is measured: eager, inductor, onnxruntime, or a plugin's.",
        ),
        click.option("--dtype", default="float32", show_default=True, help="In which latency is measured."),
        click.option("--device", default="cpu", show_default=True, help="On which latency is measured."),
        click.option("--threads", type=int, help="At which latency is measured.  [default: all cores]"),
        click.option("--batch-size", default=1, show_default=True, help="At which latency is measured."),
    ):
        command = option(command)
    return command


def teacher_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that name the teacher and the data."""
    data = click.option(
        "--data", default="digits", show_default=True, help="digits, a folder of images, or an .npz file."
    )
    return model_options(data(command))


def model_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that name the teacher."""
    for option in (
        click.option(
            "--checkpoint", type=click.Path(path_type=Path), help="Its weights, a safetensors file."
        ),
        click.option(
            "--model", default="digits_vit", show_default=True, help="Name of the teacher, as timm has it."
        ),
    ):
        command = option(command)
    return command


def memory_option(command: Callable[..., None]) -> Callable[..., None]:
    """Add the option that limits the memory of the teacher's activations."""
    return click.option(
        "--memory-limit",
        default=4.0,
        metavar="GIB",
        show_default=True,
        help="Activations above this are kept in files.",
    )(command)


def objective_option(command: Callable[..., None]) -> Callable[..., None]:
    """Add the option that names the objective of gradient steps."""
    return click.option(
        "--objective",
        default="nmse",
        metavar="NAME",
        show_default=True,
        help="What gradient steps make smaller: nmse, or cosine along tokens (FAR).",
    )(command)


def command_line() -> str:
    """Return the command that this process was started with, as one would type it."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def words(text: str | None) -> tuple[str, ...]:
    """Read `a,b`; nothing is no word."""
    return () if text is None else tuple(word.strip() for word in text.split(",") if word.strip())


def numbers(text: str | None) -> tuple[float, ...]:
    """Read `0.25,0.5`.

    Raises:
        MixerzooError: for anything that is not numbers.
    """
    from mixerzoo.errors import MixerzooError

    try:
        return tuple(float(word) for word in words(text))
    except ValueError:
        raise MixerzooError(f"--widths '{text}': give numbers, such as 0.25,0.5") from None
