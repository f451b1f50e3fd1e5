"""Whole residual blocks removed, each time the one without which the held-out loss is least."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from mixerzoo.hosts import Teacher, assemble
from peer_students.problem import Cannot, Ground, Made, Problem


def without(teacher: Teacher, removed: Iterable[int]) -> nn.Module:
    """Return the teacher without some of its blocks."""
    return assemble(teacher.model, {f"blocks.{block}": nn.Identity() for block in removed})


def next_block(ground: Ground, removed: tuple[int, ...], depth: int) -> int:
    """Return the block that is missed least, beside those removed before."""
    losses = {}
    for block in set(range(depth)) - set(removed):
        gone = (*removed, block)
        losses[block] = ground.few.evaluate(without(ground.teacher, gone), first=min(gone) + 1).loss
    return min(losses, key=lambda block: losses[block])


def make(problem: Problem) -> Made:
    """Remove blocks until the budget is met, as measured twice."""
    ground, teacher = problem.ground, problem.ground.teacher
    removed: tuple[int, ...] = ()
    depth = sum(site.kind == "attention" for site in teacher.sites)
    if len(teacher.host.stages(teacher.model)) != depth + 2:
        raise Cannot("its blocks cannot be told apart")
    share = 1.0
    while len(removed) < depth:
        removed = (*removed, next_block(ground, removed, depth))
        student = without(teacher, removed)
        share = ground.meter.tried(student)
        if share <= problem.budget and (share := ground.meter.confirmed(student)) <= problem.budget:
            return Made(student=student, about={"removed": list(removed), "of": depth})
    raise Cannot(f"without any block it takes {share:.0%} of the teacher's latency")
