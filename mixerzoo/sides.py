"""A teacher and its students side by side, stage by stage: what a site of a student is given, and what is wanted of it.

The teacher runs once over the images, for all students. A pass of a student that only looks at a site ends there; it
runs the stage once more when the site has been changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mixerzoo.errors import MixerzooError
from mixerzoo.hosts import Stage, Teacher
from mixerzoo.readout import FeatureTap
from mixerzoo.spec import Site

LARGE = 2**29  # bytes of a site's inputs and targets in float32, above which they are kept in bfloat16


@dataclass(frozen=True, kw_only=True)
class SitePairs:
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


class TeacherSide:
    """The teacher at a stage: the hidden states that come into it, batch by batch."""

    def __init__(self, teacher: Teacher, batches: Iterable[torch.Tensor]) -> None:
        self.teacher = teacher
        self.stages = teacher.host.stages(teacher.model)
        self.number = 0
        self.states = list(batches)
        self._ahead = False  # whether the states come out of the stage already, from a look at its sites

    def look(self, sites: Sequence[Site], *, whole: bool) -> dict[str, list[torch.Tensor]]:
        """Return the teacher's residual stream behind some sites of the stage, batch by batch.

        With `whole`, this is the pass over the stage.
        """
        goals: dict[str, list[torch.Tensor]] = {site.name: [] for site in sites}
        with ExitStack() as stack:
            seen = [
                stack.enter_context(
                    _Branch(self.teacher.model, site, ends="" if whole or site != sites[-1] else "output")
                )
                for site in sites
            ]
            for number, hidden in enumerate(self.states):
                state = _until_seen(self.stages[self.number], hidden)
                if state is not None:
                    self.states[number] = state
                for site, branch in zip(sites, seen, strict=True):
                    scale = _scale(self.teacher, site)
                    added = branch.output if scale is None else scale(branch.output)
                    goals[site.name].append(branch.residual + added)
        self._ahead = whole
        return goals

    def advance(self) -> None:
        """Go on to the next stage."""
        if not self._ahead:
            _pass(self.stages[self.number], self.states)
        self._ahead = False
        self.number += 1

    def outputs(self) -> torch.Tensor:
        """Return the teacher's outputs (n, C); it is at its last stage."""
        return torch.cat([self.stages[-1](hidden) for hidden in self.states])


class StudentSide:
    """A student at the stage that its teacher is at: its own hidden states.

    Args:
        teacher: the teacher's side, at its first stage.
        student: the student.
        first: its stages before this one are the teacher's.
    """

    def __init__(self, teacher: TeacherSide, student: nn.Module, *, first: int) -> None:
        self.teacher, self.student, self.first = teacher.teacher, student, first
        self.stages = self.teacher.host.stages(student)
        self.number = 0
        self.states = list(teacher.states)

    @property
    def images(self) -> int:
        """Number of images."""
        return sum(map(len, self.states))

    def pairs(self, site: Site, goal: Iterable[torch.Tensor]) -> SitePairs:
        """Return inputs and targets of a site, from the teacher's residual stream behind it, batch by batch."""
        images = self.images
        large = 8 * images * site.tokens * site.dim > LARGE
        x = torch.empty(images, site.tokens, site.dim, dtype=torch.bfloat16 if large else torch.float32)
        y = torch.empty_like(x)
        row = 0
        with _Branch(self.student, site, ends="input") as given:
            for hidden, wanted in zip(self.states, goal, strict=True):
                _until_seen(self.stages[self.number], hidden)
                rows = slice(row, row + len(given.input))
                x[rows], y[rows] = given.input, wanted - given.residual
                row = rows.stop
        scale = _scale(self.teacher, site)
        gain = None if scale is None else scale(torch.ones(1, 1, site.dim)).flatten()
        return SitePairs(x=x, y=y, gain=gain)

    def advance(self, teacher: TeacherSide) -> None:
        """Go on to the next stage, where the teacher is already."""
        if self.number < self.first:
            self.states = list(teacher.states)
        else:
            _pass(self.stages[self.number], self.states)
        self.number += 1

    def features(self, classifier: nn.Linear) -> torch.Tensor:
        """Return what comes into the student's classifier (n, D); it is at its last stage.

        Raises:
            MixerzooError: if its output is not that of its classifier, one row an image.
        """
        stage = self.stages[-1]
        with FeatureTap(classifier) as tap:
            out = stage(self.states[0][:1])
            if not torch.allclose(classifier(tap.features()), out, rtol=1e-3, atol=1e-4):
                raise MixerzooError("the student's output is not that of its classifier")
            return torch.cat([tap.features_of(stage, hidden) for hidden in self.states])


def _scale(teacher: Teacher, site: Site) -> nn.Module | None:
    return None if site.scale is None else teacher.model.get_submodule(site.scale)


def _pass(stage: Stage, states: list[torch.Tensor]) -> None:
    """Run a stage in place: old states go as new ones come."""
    for number, hidden in enumerate(states):
        states[number] = stage(hidden)


class _Seen(Exception):
    """Ends a pass that has shown what was asked of it."""


def _until_seen(stage: Stage, hidden: torch.Tensor) -> torch.Tensor | None:
    """Run a stage; returns None if the pass ended at a site."""
    try:
        return stage(hidden)
    except _Seen:
        return None


class _Branch:
    """Records the residual stream before a site and the site's input and output, during a `with` block.

    Args:
        model: holds the site.
        site: the site.
        ends: the passes end at the site's `input` or `output`; empty for whole ones.
    """

    def __init__(self, model: nn.Module, site: Site, *, ends: str) -> None:
        assert site.norm is not None
        self.module, self.norm = model.get_submodule(site.name), model.get_submodule(site.norm)
        self.ends = ends
        self.residual = self.input = self.output = torch.empty(0)

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
