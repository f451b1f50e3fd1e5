"""What the user asks of `mixerzoo prune`: the arguments, checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mixerzoo.errors import MixerzooError

LEAST_IMAGES = 20  # as for a search
TARGETS = ("80%", "60%", "40%")
BY = ("latency", "params", "flops")
MINUTES, FINETUNE_MINUTES = 5.0, 2.0


@dataclass(frozen=True, kw_only=True)
class PruneSettings:
    """The arguments.

    Attributes:
        targets: shares of the teacher's, in (0, 1), falling.
        by: of its `latency`, `params` or `flops`.
        minutes: of training with the penalty; 0 for none. Or None for `steps`.
        steps: gradient steps of it; or None for `minutes`.
        finetune_minutes: of distillation as a whole of each student; 0 for none. Or None for `finetune_steps`.
        finetune_steps: gradient steps of that; or None for `finetune_minutes`.
        penalty: weight of the share of units in use.
        lr: highest learning rate of both.
        images: most calibration images to train on; None for all.
        seed: of the order of images.
    """

    targets: tuple[float, ...]
    by: str = "latency"
    minutes: float | None = None
    steps: int | None = None
    finetune_minutes: float | None = None
    finetune_steps: int | None = None
    penalty: float = 0.1
    lr: float = 2e-4
    images: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.by not in BY:
            raise MixerzooError(f"--by {self.by}: known: {', '.join(BY)}")
        for name, default in (("minutes", MINUTES), ("finetune_minutes", FINETUNE_MINUTES)):
            steps, minutes = name.replace("minutes", "steps"), getattr(self, name)
            if minutes is None and getattr(self, steps) is None:
                object.__setattr__(self, name, default)
            elif minutes is not None and getattr(self, steps) is not None:
                raise MixerzooError(f"give one of --{_flag(name)} and --{_flag(steps)}")
            elif minutes is not None and not 0 <= minutes < math.inf:
                raise MixerzooError(f"--{_flag(name)} {minutes:g}: give 0 or more")
        for name, least in (("steps", 0), ("finetune_steps", 0), ("images", LEAST_IMAGES), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise MixerzooError(f"--{_flag(name)} {value}: give at least {least}")
        if not 0 <= self.penalty < math.inf:
            raise MixerzooError(f"--penalty {self.penalty:g}: give 0 or more")
        if not 0 < self.lr < math.inf:
            raise MixerzooError(f"--lr {self.lr:g}: give a positive number")

    def identity(self) -> dict[str, Any]:
        """Return the arguments that make the family what it is; targets may be added later."""
        return {name: value for name, value in asdict(self).items() if name != "targets"}


def parse_targets(words: Sequence[str]) -> tuple[float, ...]:
    """Read `80%,60%` and `40%`; returns shares, falling, each once.

    Raises:
        MixerzooError: for anything that is not a percentage between 0 and 100, or if there is none.
    """
    found = []
    for word in (part.strip() for text in words for part in text.split(",") if part.strip()):
        try:
            share = float(word.removesuffix("%")) / 100 if word.endswith("%") else math.nan
        except ValueError:
            share = math.nan
        if not 0 < share < 1:
            raise MixerzooError(f"--targets {word}: give shares of the teacher's such as 80%,60%,40%")
        found.append(share)
    if not found:
        raise MixerzooError("--targets: give at least one share of the teacher's, such as 80%,60%,40%")
    return tuple(sorted(set(found), reverse=True))


def label(target: float) -> str:
    """Return a target as it is in names of folders and tables, without a sign: `80`, `62.5`."""
    return f"{100 * target:.10g}"


def _flag(name: str) -> str:
    return name.replace("_", "-")
