"""Sequential refit of a stitched student: student-forced, in order, in closed form, without gradients.

Block-local candidates were solved on the teacher's activations; stitched together, their errors add up. Here
the replaced sites are solved once more, first to last. Each sees what the student really feeds it, and its
target is the teacher's residual stream behind the site, so that it also corrects the drift of all before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from mixerzoo.distill import HELD_OUT, FeatureTap, set_linear
from mixerzoo.hosts import Replacement, Stage, Teacher, assemble
from mixerzoo.registry import get_registry
from mixerzoo.ridge import Gram, solve
from mixerzoo.spec import Site


@torch.inference_mode()
def refit(
    teacher: Teacher,
    modules: Mapping[str, Replacement],
    mixers: Mapping[str, str],
    batches: Iterable[torch.Tensor],
    *,
    on_site: Callable[[int], None] = lambda done: None,
) -> None:
    """Solve the readouts of `modules` in place, in site order.

    Args:
        teacher: the teacher.
        modules: site -> replacement; changed in place.
        mixers: site -> mixer name, to look up its readout.
        batches: calibration images, prepared; the last fifth of them chooses the penalties.
        on_site: called with the number of sites passed.
    """
    student = assemble(teacher.model, modules)
    teacher_stages, student_stages = teacher.host.stages(teacher.model), teacher.host.stages(student)
    true = list(batches)
    drifted = list(true)
    specs = get_registry().mixers
    passed = 0
    for number in range(len(teacher_stages)):
        sites = [site for site in teacher.sites if site.stage == number]
        for site in sites:
            passed += 1
            on_site(passed)
            if site.name not in modules or site.norm is None:
                continue
            readout = specs.get(mixers[site.name]).readout
            if readout is None:
                continue
            layer: nn.Module = student.get_submodule(f"{site.name}.mixer.{readout}")
            if isinstance(layer, nn.Linear):
                _refit_site(teacher, student, site, layer, (teacher_stages, student_stages), true, drifted)
        true = [teacher_stages[number](hidden) for hidden in true]
        drifted = [student_stages[number](hidden) for hidden in drifted]


def _refit_site(
    teacher: Teacher,
    student: nn.Module,
    site: Site,
    layer: nn.Linear,
    stages: tuple[list[Stage], list[Stage]],
    true: list[torch.Tensor],
    drifted: list[torch.Tensor],
) -> None:
    """Solve one readout on what the student feeds it, towards the teacher's residual stream behind the site."""
    grams = [Gram(layer.in_features, layer.out_features) for _ in range(2)]
    # 0 where there is one batch: then the same rows train and choose.
    first_held_out = min(len(true) - 1, max(1, round(len(true) * (1 - HELD_OUT))))
    scale = None if site.scale is None else teacher.model.get_submodule(site.scale)
    with (
        _Branch(teacher.model, site) as wanted,
        _Branch(student, site) as given,
        FeatureTap(layer) as tap,
    ):
        for number, (t, s) in enumerate(zip(true, drifted, strict=True)):
            stages[0][site.stage](t)
            stages[1][site.stage](s)
            added = wanted.output if scale is None else scale(wanted.output)
            gap = wanted.residual + added - given.residual
            target = gap if scale is None else _unscale(gap, scale)
            part = grams[int(number >= first_held_out)] if first_held_out else None
            for gram in grams if part is None else [part]:
                gram.update(tap.features(), target.reshape(-1, layer.out_features))
    bias = torch.zeros(layer.out_features) if layer.bias is None else layer.bias
    before = torch.cat([layer.weight.T, bias[None]]).double()
    found = solve(*grams, bias=layer.bias is not None)
    if found is not None and found.nmse < grams[1].nmse(before):
        set_linear(layer, found.weight, found.bias)


def _unscale(gap: torch.Tensor, scale: nn.Module) -> torch.Tensor:
    gain = scale(torch.ones_like(gap[:1, :1]))  # a layer scale multiplies each channel
    return torch.where(gain.abs() > 1e-6, gap / gain, torch.zeros_like(gap))


class _Branch:
    """Records the residual stream before a site and the site's output, during a `with` block."""

    def __init__(self, model: nn.Module, site: Site) -> None:
        assert site.norm is not None
        self.module, self.norm = model.get_submodule(site.name), model.get_submodule(site.norm)
        self.residual = self.output = torch.empty(0)

    def __enter__(self) -> _Branch:
        self._handles = [
            self.norm.register_forward_pre_hook(self._before),
            self.module.register_forward_hook(self._after),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _before(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        self.residual = args[0]

    def _after(self, _module: nn.Module, _args: tuple[Any, ...], output: torch.Tensor) -> None:
        self.output = output
