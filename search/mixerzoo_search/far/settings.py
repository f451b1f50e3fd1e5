"""What the user asks of FAR's recipe: the arguments, checked."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mixerzoo.errors import MixerzooError
from mixerzoo.plan import Candidate

LEAST_IMAGES = 20  # as for a search
AUGMENTS = ("none", "mix", "deit")
MIXER = Candidate("multihead_lstm")


@dataclass(frozen=True, kw_only=True)
class FarSettings:
    """The arguments.

    Attributes:
        model: name of the teacher.
        data: what `--data` says.
        checkpoint: the teacher's weights, or None for its own.
        mixer: what stands at all attention sites.
        minutes: of training, both stages together; or None for `epochs`.
        epochs: of training, both stages together; or None for `minutes`.
        images: most images to train on; None for all.
        batch_size: images in a step.
        lr: highest learning rate of stage 1.
        augment: `none`, `mix` or `deit`.
        seed: of everything random.
    """

    model: str
    data: str
    checkpoint: Path | None = None
    mixer: Candidate = MIXER
    minutes: float | None = None
    epochs: int | None = None
    images: int | None = None
    batch_size: int = 32
    lr: float = 2e-3  # published: 5e-4 x 256 images x 8 devices / 512
    augment: str = "mix"
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.minutes is None) == (self.epochs is None):
            raise MixerzooError("give one of --minutes 10 and --epochs 30")
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise MixerzooError(f"--minutes {self.minutes:g}: give a positive number")
        for name, least in (("epochs", 2), ("images", LEAST_IMAGES), ("batch_size", 2), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise MixerzooError(f"--{name.replace('_', '-')} {value}: give at least {least}")
        if not 0 < self.lr < math.inf:
            raise MixerzooError(f"--lr {self.lr:g}: give a positive number")
        if self.augment not in AUGMENTS:
            raise MixerzooError(f"--augment {self.augment}: known: {', '.join(AUGMENTS)}")

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        checkpoint = None if self.checkpoint is None else str(self.checkpoint)
        return asdict(self) | {"checkpoint": checkpoint, "mixer": str(self.mixer)}
