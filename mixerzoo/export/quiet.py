"""Compilers and exporters: kept quiet, and their pages of advice cut down to one line."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

REASON_CHARS = 200


@contextmanager
def quietly() -> Iterator[None]:
    """Keep what compilers and exporters warn of and print inside the block from the user, who cannot mend it."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def reason(error: BaseException) -> str:
    """Return what lies at the bottom of an error: compilers and exporters wrap it in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).partition("Set TORCHDYNAMO_VERBOSE")[0].split())
    short = text if len(text) <= REASON_CHARS else f"{text[:REASON_CHARS]}..."
    return f"{type(error).__name__}: {short}"
