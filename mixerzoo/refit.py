"""Sequential refit of a stitched student: student-forced, in order, the readouts in closed form, then steps.

Block-local candidates were solved on the teacher's activations; stitched together, their errors add up. Here
the replaced sites are solved once more, first to last. Each sees what the student really feeds it, and its
target is the teacher's residual stream behind the site, so that it also corrects the drift of all before it.

Teacher and student advance stage by stage, side by side. A pass that only looks at a site ends there: with one
site a stage, the teacher runs once over the images and the student twice, the second time only as far as each
site.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mixerzoo.distill import Recipe, take_steps
from mixerzoo.errors import MixerzooError
from mixerzoo.hosts import Replacement, Stage, Teacher, assemble
from mixerzoo.pairs import evaluate
from mixerzoo.readout import solve_readout
from mixerzoo.registry import get_registry
from mixerzoo.spec import Site

LARGE = 2**29  # bytes of a site's inputs and targets in float32, above which they are kept in bfloat16
LEAST_GAIN = 1e-3  # of a layer scale, relative to its root mean square: below it a channel is left as it was


def refit(
    teacher: Teacher,
    modules: Mapping[str, Replacement],
    mixers: Mapping[str, str],
    batches: Iterable[torch.Tensor],
    *,
    steps: int = 0,
    seed: int = 0,
    on_site: Callable[[int], None] = lambda done: None,
) -> None:
    """Refit `modules`, put into the teacher, in place and in site order.

    Args:
        teacher: the teacher.
        modules: site -> replacement; changed in place.
        mixers: site -> mixer name, to look up its readout.
        batches: calibration images, prepared; the last fifth of them is held out.
        steps: gradient steps at each site after the closed form, on what lies before the readout.
        seed: of the order of the images in those steps.
        on_site: called with the number of sites passed.
    """
    first = min((teacher.site(name).stage for name in modules), default=0)
    names = {site: mixers[site] for site in modules}
    student = assemble(teacher.model, modules)
    refit_student(teacher, student, names, batches, steps=steps, seed=seed, first=first, on_site=on_site)


@torch.no_grad()
def refit_student(
    teacher: Teacher,
    student: nn.Module,
    mixers: Mapping[str, str],
    batches: Iterable[torch.Tensor],
    *,
    steps: int = 0,
    seed: int = 0,
    first: int = 0,
    on_site: Callable[[int], None] = lambda done: None,
) -> None:
    """Refit the replacements in a student in place; its other weights may differ from the teacher's.

    Args:
        teacher: the teacher.
        student: a student of it.
        mixers: site -> mixer name, of the sites to refit.
        batches: see `refit`.
        steps: see `refit`.
        seed: see `refit`.
        first: stages of the student before this one are the teacher's.
        on_site: called with the number of sites passed.
    """
    sides = _Sides(teacher, student, list(batches), first=first)
    wanted = [site for site in teacher.sites if site.name in mixers and site.norm is not None]
    last = max((site.stage for site in wanted), default=-1)
    recipe = Recipe(steps=steps, seed=seed)
    passed = 0
    for number in range(len(sides.stages)):
        here = [site for site in teacher.sites if site.stage == number]
        left = [site for site in here if site in wanted]
        for site in here:
            if site in left:
                left.remove(site)
                mixer = student.get_submodule(f"{site.name}.mixer")
                readout = get_registry().mixers.get(mixers[site.name]).readout
                if readout is not None or (steps and next(mixer.parameters(), None) is not None):
                    pairs = sides.pairs(site, whole=not left and number < last)
                    _refit_site(mixer, readout, pairs, recipe)
            passed += 1
            on_site(passed)
        if number < last:
            sides.advance()


def _refit_site(mixer: nn.Module, readout: str | None, pairs: _Pairs, recipe: Recipe) -> None:
    """Solve the readout, then take steps; the mixer stays as it was where its held-out error would not fall.

    The penalty is on the change of the readout: what the block-local solution holds is only given up for what
    this student's activations say clearly. The errors are those in the residual stream: the layer scale is part
    of the readout meanwhile, or of the output of a mixer that has none.
    """
    if len(pairs.x) < 2:  # none could be held out
        return
    before = {name: tensor.clone() for name, tensor in mixer.state_dict().items()}
    try:
        if readout is None:
            scaled = _Scaled(mixer, pairs.gain)
            _take_steps(scaled, pairs, recipe, evaluate(scaled, pairs), None)
            return
        layer = mixer.get_submodule(readout)
        if not isinstance(layer, nn.Linear):
            return
        with _folded(layer, pairs.gain):
            was, solved = solve_readout(mixer, readout, pairs, anchored=True)
            if recipe.steps:
                _take_steps(mixer, pairs, recipe, solved if solved <= was else was, readout)
    except MixerzooError:  # not finite on what this student feeds it
        mixer.load_state_dict(before)


def _take_steps(mixer: nn.Module, pairs: _Pairs, recipe: Recipe, nmse: float, readout: str | None) -> None:
    try:
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            take_steps(mixer, pairs, recipe, nmse, readout=readout, anchored=True)
    finally:
        mixer.eval().requires_grad_(False).zero_grad()


@dataclass(frozen=True, kw_only=True)
class _Pairs:
    """What one site is refitted on, over n images.

    Attributes:
        x: what the student feeds it (n, N, D).
        y: what is missing in the student's residual stream before it, to the teacher's behind it (n, N, D).
        gain: its layer scale (D,), or None.
    """

    x: torch.Tensor
    y: torch.Tensor
    gain: torch.Tensor | None

    def release(self) -> None:
        """Do nothing: they are in memory."""


class _Sides:
    """Teacher and student at the same stage: the hidden states that come into it, batch by batch."""

    def __init__(
        self, teacher: Teacher, student: nn.Module, batches: list[torch.Tensor], *, first: int
    ) -> None:
        self.teacher, self.student = teacher, student
        self.stages = teacher.host.stages(teacher.model)
        self.others = teacher.host.stages(student)
        self.first = first
        self.number = 0
        self.true, self.drifted = batches, list(batches)
        self._ahead = False  # whether `true` comes out of the stage already, from a look at a site

    def pairs(self, site: Site, *, whole: bool) -> _Pairs:
        """Return inputs and targets of a site; with `whole`, the teacher's look at it is the pass over the stage."""
        scale = None if site.scale is None else self.teacher.model.get_submodule(site.scale)
        images = sum(map(len, self.true))
        large = 8 * images * site.tokens * site.dim > LARGE
        x = torch.empty(images, site.tokens, site.dim, dtype=torch.bfloat16 if large else torch.float32)
        y = torch.empty_like(x)
        row = 0
        stage, other = self.stages[self.number], self.others[self.number]
        with (
            _Branch(self.teacher.model, site, stage, ends="" if whole else "output") as wanted,
            _Branch(self.student, site, other, ends="input") as given,
        ):
            for number, drifted in enumerate(self.drifted):
                state = wanted.run(self.true[number])
                if state is not None:
                    self.true[number] = state
                given.run(drifted)
                added = wanted.output if scale is None else scale(wanted.output)
                rows = slice(row, row + len(given.input))
                x[rows], y[rows] = given.input, wanted.residual + added - given.residual
                row = rows.stop
        self._ahead = whole
        gain = None if scale is None else scale(torch.ones(1, 1, site.dim)).flatten()
        return _Pairs(x=x, y=y, gain=gain)

    def advance(self) -> None:
        """Go on to the next stage."""
        stage, other = self.stages[self.number], self.others[self.number]
        if not self._ahead:
            _pass(stage, self.true)
        if self.number < self.first:
            self.drifted = list(self.true)
        else:
            _pass(other, self.drifted)
        self._ahead = False
        self.number += 1


def _pass(stage: Stage, states: list[torch.Tensor]) -> None:
    """Run a stage in place: old states go as new ones come."""
    for number, hidden in enumerate(states):
        states[number] = stage(hidden)


class _Seen(Exception):
    """Ends a pass that has shown what was asked of it."""


class _Branch:
    """Records the residual stream before a site and the site's input and output, during a `with` block.

    Args:
        model: holds the site.
        site: the site.
        stage: the stage that it is in.
        ends: the passes end at the site's `input` or `output`; empty for whole ones.
    """

    def __init__(self, model: nn.Module, site: Site, stage: Stage, *, ends: str) -> None:
        assert site.norm is not None
        self.module, self.norm = model.get_submodule(site.name), model.get_submodule(site.norm)
        self.stage, self.ends = stage, ends
        self.residual = self.input = self.output = torch.empty(0)

    def run(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """Run the stage; returns None if the pass ended at the site."""
        try:
            return self.stage(hidden)
        except _Seen:
            return None

    def __enter__(self) -> _Branch:
        self._handles = [
            self.norm.register_forward_pre_hook(self._before_norm),
            self.module.register_forward_pre_hook(self._before),
            self.module.register_forward_hook(self._after),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _before_norm(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        self.residual = args[0]

    def _before(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        self.input = args[0]
        if self.ends == "input":
            raise _Seen

    def _after(self, _module: nn.Module, _args: tuple[Any, ...], output: torch.Tensor) -> None:
        self.output = output
        if self.ends == "output":
            raise _Seen


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
