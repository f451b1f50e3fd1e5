"""What a peer is, and whether it does the same as the mixer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mixer_parts.shapes import Shape

VALUES = 1e-4  # greatest difference, over the greatest value
GRADIENTS = 1e-3


class Missing(Exception):
    """A peer's library is not to be had; the message says how to get it."""


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A public implementation of what a mixer computes.

    Attributes:
        mixer: name of the mixer.
        label: what does it, such as `mambapy, sequential`.
        make: takes our mixer and returns a module with its weights; raises Missing.
        causal: whether it is compared with the causal mixer.
        prefix: whether it can have class tokens before the grid.
        trains_up_to: most tokens at which its backward pass is run, if that is far slower than the forward pass.
    """

    mixer: str
    label: str
    make: Callable[[Any], nn.Module]
    causal: bool = False
    prefix: bool = True
    trains_up_to: int | None = None

    def at(self, shape: Shape) -> Shape:
        """Return the nearest shape that it can take."""
        return replace(shape if self.prefix else shape.without_prefix(), causal=self.causal)


class Around(nn.Module):
    """A mixer's weights, and another way to compute with them: y = way(mixer, x)."""

    def __init__(self, mixer: nn.Module, way: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.mixer = mixer
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, N, D) to (B, N, D)."""
        return self.way(self.mixer, x)


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How far a peer is from a mixer: greatest difference over the mixer's greatest, in values and gradients.

    No gradients (None) where they were not compared.
    """

    values: float
    gradients: float | None

    def __bool__(self) -> bool:
        return self.values <= VALUES and (self.gradients is None or self.gradients <= GRADIENTS)

    def __str__(self) -> str:
        return f"{self.values:.1e}" + ("" if self.gradients is None else f", gradient {self.gradients:.1e}")


def agreement(mixer: nn.Module, peer: nn.Module, x: Tensor, *, training: bool = True) -> Agreement:
    """Compare what both make of x (B, N, D) in eval mode, and in `training` the gradients with regard to x."""
    mixer.eval(), peer.eval()
    with torch.no_grad():
        values = _distance(mixer(x), peer(x))
    if not training:
        return Agreement(values=values, gradients=None)
    mixer.train(), peer.train()
    ahead = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    gradients = []
    for module in (mixer, peer):
        given = x.clone().requires_grad_()
        gradients.append(torch.autograd.grad(module(given), given, ahead)[0])
    return Agreement(values=values, gradients=_distance(*gradients))


def _distance(ours: Tensor, theirs: Tensor) -> float:
    """Return the greatest difference over the greatest of ours; infinite where shapes differ or NaN appears."""
    if ours.shape != theirs.shape:
        return float("inf")
    distance = ((ours - theirs).abs().max() / ours.abs().max()).item()
    return distance if distance == distance else float("inf")
