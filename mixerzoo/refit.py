"""Sequential refit of stitched students: student-forced, in order, in closed form, then by steps.

Block-local candidates were solved on the teacher's activations; stitched together, their errors add up. Here
the sites are solved once more, first to last. Each sees what the student really feeds it, and its target is the
teacher's residual stream behind the site, so that it also corrects the drift of all before it. What is solved is
a mixer's readout, the output layer of each MLP of the teacher's own that is kept behind a replaced site and, last,
the classifier.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from mixerzoo.distill import Recipe, take_steps
from mixerzoo.errors import MixerzooError
from mixerzoo.hosts import Replacement, Teacher, assemble
from mixerzoo.pairs import evaluate
from mixerzoo.readout import lower, solve_classifier, solve_readout
from mixerzoo.registry import get_registry
from mixerzoo.sides import SitePairs, StudentSide, TeacherSide
from mixerzoo.spec import Site
from mixerzoo.targets import Targets

READOUT_TOKENS = 57_344  # that a readout is solved on, drawn from all images
LEAST_GAIN = 1e-3  # of a layer scale, relative to its root mean square: below it a channel is left as it was
TOGETHER = 2  # sites of one stage that the teacher's pass shows at once: a block's attention and its MLP


@dataclass(frozen=True, kw_only=True)
class Stitched:
    """A student to be refitted.

    Attributes:
        student: changed in place. Its other weights may differ from the teacher's.
        mixers: site -> mixer name, of all its replaced sites, to look up their readouts.
        first: stages of it before this one are the teacher's.
    """

    student: nn.Module
    mixers: Mapping[str, str]
    first: int = 0


def stitch(teacher: Teacher, modules: Mapping[str, Replacement], mixers: Mapping[str, str]) -> Stitched:
    """Put `modules`, site -> replacement, into a copy of the teacher, to be refitted; they will change with it."""
    return Stitched(
        student=assemble(teacher.model, modules),
        mixers={site: mixers[site] for site in modules},
        first=min((teacher.site(name).stage for name in modules), default=0),
    )


def refit(
    teacher: Teacher,
    modules: Mapping[str, Replacement],
    mixers: Mapping[str, str],
    batches: Iterable[torch.Tensor],
    *,
    kept: bool = True,
    steps: int = 0,
    seed: int = 0,
    on_site: Callable[[int], None] = lambda done: None,
) -> nn.Module:
    """Put `modules`, site -> replacement, into a copy of the teacher, refit it, and return it; see `refit_students`."""
    stitched = stitch(teacher, modules, mixers)
    refit_students(teacher, [stitched], batches, kept=kept, steps=steps, seed=seed, on_site=on_site)
    return stitched.student


@torch.no_grad()
def refit_students(
    teacher: Teacher,
    students: Sequence[Stitched],
    batches: Iterable[torch.Tensor],
    *,
    kept: bool = True,
    steps: int = 0,
    seed: int = 0,
    on_site: Callable[[int], None] = lambda done: None,
) -> None:
    """Refit students in place, in site order, all beside one pass of the teacher.

    Args:
        teacher: the teacher; no weight of it changes, also where students share them.
        students: students of it, with replaced sites of their own.
        batches: calibration images, prepared; the last fifth of them is held out.
        kept: whether the output layers of the teacher's own MLPs behind the first replaced site and the classifier
            are solved again too; a student then has its own copies of them.
        steps: gradient steps at each replaced site after the closed form, on what lies before the readout.
        seed: of the order of the images in those steps.
        on_site: called with the number of sites passed.
    """
    true = TeacherSide(teacher, batches)
    recipe = Recipe(steps=steps, seed=seed)
    sides = [StudentSide(true, one.student, first=one.first) for one in students]
    todo = [
        {job.site.name: job for job in _jobs(teacher, one.student, one.mixers, kept=kept, steps=steps)}
        for one in students
    ]
    last = max((job.site.stage for jobs in todo for job in jobs.values()), default=-1)
    passed = 0
    for number in range(len(true.stages)):
        here = [site for site in teacher.sites if site.stage == number]
        left = [site for site in here if any(site.name in jobs for jobs in todo)]
        goals: dict[str, list[torch.Tensor]] = {}
        for site in here:
            if site in left:
                if site.name not in goals:
                    at = left.index(site)
                    goals = true.look(
                        left[at : at + TOGETHER], whole=number < last and at + TOGETHER >= len(left)
                    )
                _refit_at(site, sides, todo, goals.pop(site.name), recipe)
            passed += 1
            on_site(passed)
        if number < last:
            _advance(true, sides)
    path = teacher.host.classifier_layer(teacher.model) if teacher.classifier else None
    if kept and last >= 0 and path is not None:
        while true.number < len(true.stages) - 1:
            _advance(true, sides)
        logits = true.outputs()
        for side, jobs in zip(sides, todo, strict=True):
            if jobs:
                _refit_classifier(side, side.student.get_submodule(path), logits)


def _advance(true: TeacherSide, sides: Sequence[StudentSide]) -> None:
    true.advance()
    for side in sides:
        side.advance(true)


def _refit_at(
    site: Site,
    sides: Sequence[StudentSide],
    todo: Sequence[Mapping[str, _Job]],
    goal: list[torch.Tensor],
    recipe: Recipe,
) -> None:
    """Refit a site of all students that have something to refit there; `goal` is used up."""
    jobs = [(side, jobs[site.name]) for side, jobs in zip(sides, todo, strict=True) if site.name in jobs]
    for number, (side, job) in enumerate(jobs, 1):
        # The last one lets go of the teacher's states as its own pairs grow.
        wanted = goal if number < len(jobs) else (goal.pop(0) for _ in range(len(goal)))
        _refit_site(job, side.pairs(site, wanted), recipe)


def _refit_classifier(side: StudentSide, layer: nn.Module, logits: torch.Tensor) -> None:
    assert isinstance(layer, nn.Linear)
    if side.images < 2:  # none could be held out
        return
    _own(layer)
    try:
        solve_classifier(layer, side.features(layer), logits)
    except MixerzooError:
        return  # it is more than that layer, and stays as it is


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What is refitted at a site.

    Attributes:
        site: the site.
        module: the mixer, or the student's module where the teacher's was kept.
        readout: path of its last linear layer, or None where a mixer has none.
        kept: whether it is kept; then no more is changed than that layer, the teacher may share the rest.
    """

    site: Site
    module: nn.Module
    readout: str | None
    kept: bool


def _jobs(
    teacher: Teacher, student: nn.Module, mixers: Mapping[str, str], *, kept: bool, steps: int
) -> Iterator[_Job]:
    """Yield what there is to refit, in site order; layers of kept modules get weights of their own."""
    drifts = False
    for site in teacher.sites:
        module = student.get_submodule(site.name)
        drifts = drifts or site.name in mixers
        if site.norm is None:
            continue
        if site.name in mixers:
            mixer = module.get_submodule("mixer")
            readout = get_registry().mixers.get(mixers[site.name]).readout
            if readout is not None or (steps and next(mixer.parameters(), None) is not None):
                yield _Job(site=site, module=mixer, readout=readout, kept=False)
        elif kept and drifts and site.kind == "mlp":  # kept attention was no better for it
            layer = teacher.host.output_layer(module, site)
            if layer is not None:
                _own(module.get_submodule(layer))
                yield _Job(site=site, module=module, readout=layer, kept=True)


def _own(layer: nn.Module) -> None:
    """Give a layer copies of its parameters: the teacher may have the same ones."""
    for name, parameter in list(layer.named_parameters(recurse=False)):
        setattr(layer, name, nn.Parameter(parameter.detach().clone(), requires_grad=False))


def _refit_site(job: _Job, pairs: SitePairs, recipe: Recipe) -> None:
    """Solve the last layer, then take steps; all stays as it was where its held-out error would not fall.

    The penalty is on the change of the layer: what the block-local solution holds is only given up for what this
    student's activations say clearly. The errors are those in the residual stream: the layer scale is part of
    the layer meanwhile, or of the output of a mixer that has none.
    """
    if len(pairs.x) < 2:  # none could be held out
        return
    module, readout, targets = job.module, job.readout, Targets(pairs)
    layer = module if readout is None else module.get_submodule(readout)
    # Without steps, and in what is kept, nothing but the layer changes.
    changes = module if recipe.steps and not job.kept else layer
    before = {name: tensor.clone() for name, tensor in changes.state_dict().items()}
    try:
        if readout is None:
            scaled = _Scaled(module, pairs.gain)
            _take_steps(scaled, targets, recipe, evaluate(scaled, pairs), None)
        elif isinstance(layer, nn.Linear):
            with _folded(layer, pairs.gain):
                was, solved = solve_readout(
                    module, readout, targets, anchored=True, seen=None, most=READOUT_TOKENS
                )
                if recipe.steps and not job.kept:
                    _take_steps(module, targets, recipe, lower(was, solved), readout)
    except MixerzooError:  # not finite on what this student feeds it
        changes.load_state_dict(before)


def _take_steps(mixer: nn.Module, targets: Targets, recipe: Recipe, nmse: float, readout: str | None) -> None:
    try:
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            take_steps(mixer, targets, recipe, nmse, readout=readout, anchored=True)
    finally:
        mixer.eval().requires_grad_(False).zero_grad()


@contextmanager
def _folded(layer: nn.Linear, gain: torch.Tensor | None) -> Iterator[None]:
    """Make a layer scale part of a readout during a `with` block.

    To divide the targets by it instead would blow up those of channels with a gain near 0, and with them the
    error that the penalty and the steps go by. Such channels come out as they went in.
    """
    if gain is None:
        yield
        return
    rows = gain.repeat(layer.out_features // len(gain))  # a readout may write several tokens at once
    used = rows.abs() > LEAST_GAIN * rows.square().mean().sqrt()
    folded = [(layer.weight, rows[:, None])] + ([] if layer.bias is None else [(layer.bias, rows)])
    before = [parameter.clone() for parameter, _ in folded]
    for parameter, by in folded:
        parameter.mul_(by)
    try:
        yield
    finally:
        for (parameter, by), old in zip(folded, before, strict=True):
            parameter.div_(by)
            parameter[~used] = old[~used]


class _Scaled(nn.Module):
    """A mixer and the layer scale behind it."""

    def __init__(self, mixer: nn.Module, gain: torch.Tensor | None) -> None:
        super().__init__()
        self.mixer = mixer
        self.gain = torch.ones(()) if gain is None else gain  # no parameter: it stays as it is

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, N, D) to what is added to the residual stream."""
        out: torch.Tensor = self.mixer(x) * self.gain
        return out
