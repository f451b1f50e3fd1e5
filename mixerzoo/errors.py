"""The errors a user may meet, and the exit code each one means."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MixerzooError(Exception):
    """A mistake that the user can mend: one line that names the thing, the value and the way out."""

    exit_code = 2


class BudgetOutOfReachError(MixerzooError):
    """No plan meets the budget; the message names the fastest one and what bounds it."""

    exit_code = 3


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return a short hint for an unknown `word`: the closest known one, or all there are."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    if close:
        return f"did you mean '{close[0]}'?"
    return f"known: {', '.join(names) or 'none'}"
