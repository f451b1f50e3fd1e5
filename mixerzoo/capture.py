"""One pass of the teacher over the calibration images: inputs and outputs of every site, and statistics.

Activations are kept in bfloat16, in memory up to a limit and in files above it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mixerzoo.elimination import Covariance, importance
from mixerzoo.hosts import Teacher
from mixerzoo.spec import AttentionView, MlpView, Site, View
from mixerzoo.spill import FileRows, MemoryRows, Spill
from mixerzoo.statistics import AttentionStatistics

MEMORY_LIMIT_GB = 4.0
SAMPLE_IMAGES = 256  # for statistics: maps are computed a second time, which is slow; means settle before
UNIT_TOKENS = 16_384  # of which the covariance of hidden units is taken


@dataclass(frozen=True, kw_only=True)
class SiteCapture:
    """What the teacher does at one site over n calibration images.

    Attributes:
        x: inputs (n, N, D) bfloat16.
        y: outputs (n, N, D) bfloat16.
        view: weights, mean maps or importances, and statistics: what a mixer may start from.
        spill: holds x and y, unless they are in memory.
    """

    x: torch.Tensor
    y: torch.Tensor
    view: View
    spill: Spill | None = field(default=None, repr=False)

    def release(self) -> None:
        """Give the memory of x and y back, where they can be read again."""
        if self.spill is not None:
            self.spill.release()


@dataclass(frozen=True, kw_only=True)
class Capture:
    """The captured sites by name; `spill` holds their activations, unless they are in memory."""

    sites: dict[str, SiteCapture]
    spill: Spill | None = field(default=None, repr=False)

    @property
    def statistics(self) -> dict[str, dict[str, float]]:
        """Site -> statistics."""
        return {name: dict(site.view.statistics) for name, site in self.sites.items()}


@torch.no_grad()
def capture(
    teacher: Teacher,
    batches: Iterable[torch.Tensor],
    images: int,
    *,
    memory_limit_gb: float = MEMORY_LIMIT_GB,
    spill_dir: Path | None = None,
    on_batch: Callable[[int], None] = lambda done: None,
) -> Capture:
    """Run the teacher once over `batches` of images (B, C, H, W), `images` in all.

    Args:
        teacher: the teacher.
        batches: images, prepared.
        images: how many there are in all batches together.
        memory_limit_gb: above this many GiB, activations go to files.
        spill_dir: where those files go; the system's temporary folder unless given.
        on_batch: called with the number of images done.
    """
    needed = sum(4 * images * site.tokens * site.dim for site in teacher.sites)
    spill = Spill(spill_dir) if needed > memory_limit_gb * 2**30 else None
    recorders = [_Recorder(teacher, site, images, spill) for site in teacher.sites]
    handles = [handle for recorder in recorders for handle in recorder.attach()]
    done = 0
    try:
        # No inference mode here: a mixer may train what it took from the view, which inference tensors refuse.
        for batch in batches:
            teacher.model(batch)
            done += len(batch)
            on_batch(done)
        sites = {recorder.site.name: recorder.finish() for recorder in recorders}
    except BaseException:
        if spill is not None:
            spill.remove()
        raise
    finally:
        for handle in handles:
            handle.remove()
    return Capture(sites=sites, spill=spill)


class _Recorder:
    """Hooks of one site, and what they gather."""

    def __init__(self, teacher: Teacher, site: Site, images: int, spill: Spill | None) -> None:
        self.teacher = teacher
        self.site = site
        self.module = teacher.model.get_submodule(site.name)
        self.spill = spill
        shape = images, site.tokens, site.dim
        self.x, self.y = (
            MemoryRows(shape, torch.bfloat16)
            if spill is None
            else FileRows(spill, f"{site.index}-{name}", shape, torch.bfloat16)
            for name in "xy"
        )
        self.maps = AttentionStatistics(site) if site.kind == "attention" else None
        self.units = Covariance(site.hidden or 0)
        self.added = self.residual = 0.0  # energy of what is added, and of what it is added to
        self.images = 0

    def attach(self) -> list[torch.utils.hooks.RemovableHandle]:
        """Hook the site's module, and the norm before it for the size of the residual stream."""
        handles = [self.module.register_forward_hook(self._seen)]
        if self.site.norm is not None:
            norm = self.teacher.model.get_submodule(self.site.norm)
            handles.append(norm.register_forward_hook(self._seen_residual))
        return handles

    def _seen_residual(self, _module: nn.Module, args: tuple[Any, ...], _output: Any) -> None:
        if self.images < SAMPLE_IMAGES:
            self.residual += _energy(args[0])

    def _seen(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        x = args[0]
        self.x.append(x)
        self.y.append(output)
        if self.images < SAMPLE_IMAGES:
            scale = None if self.site.scale is None else self.teacher.model.get_submodule(self.site.scale)
            self.added += _energy(output if scale is None else scale(output))
            if self.maps is not None:
                self.maps.update(self.teacher.host.attention_maps(module, x))
        if self.maps is None and self.units.rows < UNIT_TOKENS:
            hidden = self.teacher.host.hidden_units(module, x)
            self.units.update(hidden.flatten(0, 1)[: UNIT_TOKENS - self.units.rows])
        self.images += len(x)

    def finish(self) -> SiteCapture:
        """Return what was gathered."""
        weights = self.teacher.host.weights(self.module, self.site)
        contribution = math.sqrt(self.added / self.residual) if self.residual else math.nan
        statistics = {"contribution": contribution}
        view: View
        if self.maps is not None:
            view = AttentionView(
                **weights, mean_attention=self.maps.mean, statistics=self.maps.result() | statistics
            )
        else:
            order = importance(self.units.result(), weights["out_weight"])
            view = MlpView(**weights, importance=order, statistics=statistics)
        return SiteCapture(x=self.x.tensor(), y=self.y.tensor(), view=view, spill=self.spill)


def _energy(x: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(x)) ** 2
