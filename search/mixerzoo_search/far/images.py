"""FAR's training images: prepared as the teacher wants them, augmented by timm, with the targets to learn."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from mixerzoo.compat import guard_torchvision
from mixerzoo.data import Dataset, ImageConfig, load_images
from mixerzoo.images import eight_bit

SMOOTHING = 0.1
# DeiT's, which FAR trains with.
MIXUP, CUTMIX = 0.8, 1.0
DEIT: dict[str, Any] = {
    "auto_augment": "rand-m9-mstd0.5-inc1",
    "re_prob": 0.25,
    "re_mode": "pixel",
    "re_count": 1,
}


class TrainingImages:
    """Batches of augmented images, and of soft labels where there are any.

    Args:
        data: the data.
        indices: the images to train on.
        config: how the teacher wants them.
        labels: (n,) of these images, or None.
        classes: how many classes the labels are of.
        augment: `none`, `mix` or `deit`.
    """

    def __init__(
        self,
        data: Dataset,
        indices: Sequence[int],
        config: ImageConfig,
        labels: torch.Tensor | None,
        *,
        classes: int,
        augment: str,
    ) -> None:
        guard_torchvision()
        from timm.data import Mixup

        self.data, self.indices, self.config, self.labels = data, indices, config, labels
        self._mix = Mixup(
            mixup_alpha=MIXUP,
            cutmix_alpha=CUTMIX,
            prob=0.0 if augment == "none" else 1.0,
            label_smoothing=SMOOTHING,
            num_classes=classes if labels is not None else 1,
        )
        self._prepare = _deit(config) if augment == "deit" else None

    def __len__(self) -> int:
        return len(self.indices)

    def batch(self, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return images (B, C, H, W) and soft labels (B, classes) or None; B must be even."""
        chosen = [self.indices[row] for row in rows]
        if self._prepare is None:
            images = load_images(self.data, chosen, self.config)
        else:
            images = torch.stack([self._prepare(self.data.image(index)) for index in chosen])
        labels = torch.zeros(len(rows), dtype=torch.int64) if self.labels is None else self.labels[list(rows)]
        images, target = self._mix(images, labels)
        return images, None if self.labels is None else target


def _deit(config: ImageConfig) -> Callable[[Any], torch.Tensor]:
    """Return DeiT's random transform of a PIL image, as timm makes it."""
    from timm.data import create_transform

    geometry, colours, last = create_transform(
        config.size,
        is_training=True,
        interpolation=config.interpolation,
        mean=config.mean,
        std=config.std,
        separate=True,
        **DEIT,
    )
    grey = config.size[0] == 1

    def prepare(image: Any) -> torch.Tensor:
        image = colours(geometry(eight_bit(image).convert("RGB")))  # RandAugment takes colour images only
        prepared: torch.Tensor = last(image.convert("L") if grey else image)
        return prepared

    return prepare


@contextmanager
def seeded(*parts: object) -> Iterator[None]:
    """Seed PyTorch, NumPy and Python inside the block (timm's augmentation draws from all), and put them back."""
    seed = int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4])
    before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])
