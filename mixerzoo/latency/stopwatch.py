"""Students of one teacher, timed under fixed conditions."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from mixerzoo.hosts import Teacher, assemble
from mixerzoo.latency.conditions import Conditions, threads
from mixerzoo.latency.rounds import AS_A_RULE, REFERENCE, Rounds, Timing, measure
from mixerzoo.registry import get_registry
from mixerzoo.runtimes import Run
from mixerzoo.spec import RuntimeSpec


class Stopwatch:
    """Times students of one teacher under fixed conditions."""

    def __init__(self, teacher: Teacher, conditions: Conditions) -> None:
        self.teacher = teacher
        self.conditions = conditions
        self.runtime: RuntimeSpec = get_registry().runtimes.get(conditions.runtime)
        generator = torch.Generator().manual_seed(0)
        self.example = torch.randn(conditions.batch_size, *teacher.image.size, generator=generator).to(
            conditions.device, conditions.torch_dtype
        )
        with threads(conditions.threads):  # some runtimes settle it when they prepare
            self._reference = self.prepare(teacher.model)

    def prepare(self, model: nn.Module) -> Run:
        """Return what runs `model` once on the example."""
        if self.conditions.dtype != "float32" or self.conditions.device != "cpu":
            model = assemble(model, {})
            model = _detached(model).to(self.conditions.device, self.conditions.torch_dtype)
        return self.runtime.prepare(model, self.example)

    def time(
        self,
        students: Mapping[str, nn.Module],
        *,
        rounds: Rounds = AS_A_RULE,
        on_round: Callable[[int], None] = lambda done: None,
    ) -> dict[str, Timing]:
        """Time students beside the teacher; the result has `teacher` in it."""
        with threads(self.conditions.threads):
            runs = {REFERENCE: self._reference}
            runs |= {name: self.prepare(model) for name, model in students.items()}
            return measure(runs, rounds=rounds, on_round=on_round)


def _detached(model: nn.Module) -> nn.Module:
    """Give a model that shares tensors with the teacher its own, so that `.to` leaves the teacher alone."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.clone()
    return model
