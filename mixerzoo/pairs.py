"""What a mixer is fitted to: inputs and wanted outputs over n images, the last of them held out.

The error is NMSE = sum |f(x) - y|^2 / sum |y - mean(y)|^2 over held-out images: 0 is perfect, 1 is a constant. The
mean is over images and tokens, one a channel.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import nn

from mixerzoo.errors import MixerzooError
from mixerzoo.objectives import Objective

BATCH = 32  # images at a time, in every pass over the pairs
HELD_OUT = 0.2  # of the images
RELEASE = 16  # batches after which the memory of those gone through is given back


class Pairs(Protocol):
    """Inputs x and wanted outputs y of a mixer, (n, N, D) each, over n images; `SiteCapture` is one."""

    @property
    def x(self) -> torch.Tensor:
        """What the mixer is given."""

    @property
    def y(self) -> torch.Tensor:
        """What it should make of it."""

    def release(self) -> None:
        """Give the memory of both back, where they can be read again."""


def held_out_rows(images: int) -> tuple[slice, slice]:
    """Return the training and the held-out rows of the captured images."""
    first = images - max(1, round(images * HELD_OUT))
    return slice(0, first), slice(first, images)


def batches(captured: Pairs, rows: slice) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield x and y (B, N, D) of the rows in float32, batch by batch."""
    for part in _parts(captured, rows):
        yield captured.x[part].float(), captured.y[part].float()


def inputs(captured: Pairs, rows: slice) -> Iterator[torch.Tensor]:
    """Yield x (B, N, D) of the rows in float32, batch by batch."""
    for part in _parts(captured, rows):
        yield captured.x[part].float()


def targets(captured: Pairs, rows: slice) -> Iterator[torch.Tensor]:
    """Yield y (B, N, D) of the rows in float32, batch by batch."""
    for part in _parts(captured, rows):
        yield captured.y[part].float()


def _parts(captured: Pairs, rows: slice) -> Iterator[slice]:
    """Yield the rows a batch at a time; the memory of those gone through is given back now and then."""
    for number, first in enumerate(range(rows.start, rows.stop, BATCH)):
        yield slice(first, min(first + BATCH, rows.stop))
        if number % RELEASE == RELEASE - 1:
            captured.release()
    captured.release()


def spread(captured: Pairs, rows: slice) -> float:
    """Return sum |y - mean(y)|^2 over the rows, the mean a channel's."""
    total, squares, count = torch.zeros(captured.y.shape[2], dtype=torch.float64), 0.0, 0
    for y in targets(captured, rows):
        total += y.sum((0, 1))
        squares += float(torch.linalg.vector_norm(y, dim=(0, 1)).double().square().sum())
        count += y.shape[0] * y.shape[1]
    return max(squares - float(total.square().sum()) / max(count, 1), 1e-30)


def forward(mixer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return what a mixer makes of x (B, N, D).

    Raises:
        MixerzooError: if that has another shape.
    """
    out: torch.Tensor = mixer(x)
    if out.shape != x.shape:  # some wrong shapes would broadcast
        raise MixerzooError(f"it maps {tuple(x.shape)} to {tuple(out.shape)}, not (B, N, D) to (B, N, D)")
    return out


@torch.inference_mode()
def evaluate(mixer: nn.Module, captured: Pairs) -> float:
    """Return the held-out NMSE."""
    _, held_out = held_out_rows(len(captured.x))
    error = 0.0
    for x, y in batches(captured, held_out):
        error += float((forward(mixer, x) - y).double().square().sum())
    return error / spread(captured, held_out)


@torch.inference_mode()
def held_out_objective(mixer: nn.Module, captured: Pairs, objective: Objective) -> float:
    """Return the mean of an objective over batches of held-out images."""
    _, held_out = held_out_rows(len(captured.x))
    size = spread(captured, held_out) / captured.y[held_out].numel()
    losses = [float(objective(forward(mixer, x), y, size)) * len(x) for x, y in batches(captured, held_out)]
    return sum(losses) / len(captured.x[held_out])
