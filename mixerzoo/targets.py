"""What the readouts of a site's candidates are solved for: drawn, and summed up, once for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mixerzoo.pairs import Pairs, spread, targets
from mixerzoo.ridge import Sums, column_sums

BLOCK = 4096  # rows that are summed at once


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Rows of targets from some images.

    Attributes:
        images: which.
        rows: for each batch of them, which of its rows, in the order of `blocks`.
        blocks: the rows, `BLOCK` at a time but for the last ones (rows, T), and their sums.
    """

    images: slice
    rows: Sequence[torch.Tensor]
    blocks: Sequence[tuple[torch.Tensor, Sums]]


class Targets:
    """The wanted outputs of a site, for one readout after the other.

    Args:
        pairs: of the site.
    """

    def __init__(self, pairs: Pairs) -> None:
        self.pairs = pairs
        self._spreads: dict[tuple[int, int], float] = {}
        self._drawn: dict[tuple[int, int, int, int], Drawn] = {}

    def spread(self, images: slice) -> float:
        """Return sum |y - mean(y)|^2 over some images."""
        key = images.start, images.stop
        if key not in self._spreads:
            self._spreads[key] = spread(self.pairs, images)
        return self._spreads[key]

    def drawn(self, images: slice, *, width: int, most: int) -> Drawn:
        """Return the rows of targets that a readout is solved for.

        Args:
            images: from which.
            width: outputs of the readout: D, or D times as many tokens as it writes at once.
            most: rows that are drawn at random, if there are more.
        """
        key = images.start, images.stop, width, most
        if key not in self._drawn:
            self._drawn[key] = self._draw(images, width, most)
        return self._drawn[key]

    def _draw(self, images: slice, width: int, most: int) -> Drawn:
        _, tokens, dim = self.pairs.y.shape
        each = tokens * dim // width  # rows of an image
        share = min(1.0, most / max((images.stop - images.start) * each, 1))
        generator = torch.Generator().manual_seed(0)
        rows, parts = [], []
        for y in targets(self.pairs, images):
            count = len(y) * each
            chosen = torch.arange(count)
            if share < 1:
                chosen = torch.randperm(count, generator=generator)[: round(share * count)]
            rows.append(chosen)
            parts.append(y.reshape(-1, width)[chosen])
        blocks = [(block, column_sums(block)) for block in torch.cat(parts).split(BLOCK)]
        return Drawn(images=images, rows=rows, blocks=blocks)
