"""Images to train on: prepared when they are first needed, and kept while there is room."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mixerzoo.data import Dataset, ImageConfig, load_images

KEPT_BYTES = 2 << 30


class PreparedImages:
    """Images of a data set by their place among `indices`.

    Args:
        data: the data.
        indices: which of its images.
        config: how the teacher wants them.
        kept_bytes: prepared images in memory, at most.
    """

    def __init__(
        self, data: Dataset, indices: Sequence[int], config: ImageConfig, *, kept_bytes: int = KEPT_BYTES
    ) -> None:
        self.data, self.indices, self.config = data, indices, config
        channels, height, width = config.size
        self._room = kept_bytes // (4 * channels * height * width)
        self._kept: dict[int, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self.indices)

    def batch(self, rows: Sequence[int]) -> torch.Tensor:
        """Return images (B, C, H, W)."""
        missing = [row for row in rows if row not in self._kept]
        fresh: dict[int, torch.Tensor] = {}
        if missing:
            prepared = load_images(self.data, [self.indices[row] for row in missing], self.config)
            fresh = dict(zip(missing, prepared, strict=True))
        batch = torch.stack([fresh[row] if row in fresh else self._kept[row] for row in rows])
        room = self._room - len(self._kept)
        self._kept |= {row: image.clone() for row, image in list(fresh.items())[:room]}
        return batch
