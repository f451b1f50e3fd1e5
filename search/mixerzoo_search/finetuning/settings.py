"""What the user asks of `mixerzoo finetune`: the arguments, checked."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from mixerzoo.errors import MixerzooError

LEAST_IMAGES = 20  # as for a search
MINUTES = 10.0
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings:
    """The arguments.

    Attributes:
        minutes: wall time, over all starts; or None for `steps`.
        steps: gradient steps; or None for `minutes`.
        lr: highest learning rate.
        labels: weight of the cross-entropy on labels.
        images: most images to train on; None for all that are there to distil on.
        batch_size: images in a step.
        seed: of the order of images.
        device: where it is trained.
        dtype: of autocast, or None for what the device is good at.
    """

    minutes: float | None = None
    steps: int | None = None
    lr: float = 1e-4
    labels: float = 0.0
    images: int | None = None
    batch_size: int = 16
    seed: int = 0
    device: str = "cpu"
    dtype: str | None = None

    def __post_init__(self) -> None:
        if (self.minutes is None) == (self.steps is None):
            raise MixerzooError(f"give one of --minutes {MINUTES:g} and --steps 1000")
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise MixerzooError(f"--minutes {self.minutes:g}: give a positive number")
        for name, least in (("steps", 1), ("images", LEAST_IMAGES), ("batch_size", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise MixerzooError(f"--{name.replace('_', '-')} {value}: give at least {least}")
        if not 0 < self.lr < math.inf:
            raise MixerzooError(f"--lr {self.lr:g}: give a positive number")
        if not 0 <= self.labels < math.inf:
            raise MixerzooError(f"--labels {self.labels:g}: give a weight of 0 or more")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise MixerzooError(f"--dtype {self.dtype}: known: {', '.join(DTYPES)}")

    def identity(self) -> dict[str, Any]:
        """Return the arguments that make a training what it is; it may go on on another device."""
        return {name: value for name, value in asdict(self).items() if name != "device"}
