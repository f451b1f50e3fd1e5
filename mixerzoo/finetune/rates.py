"""The learning rate of each tensor in a global distillation.

A step of Adam moves each weight by about the rate, whatever the gradient: on a pretrained model, where few directions
of large matrices matter much, a rate that suits its biases multiplies the loss at once. A tensor's step promises, to
the first order, the rate times the sum of its gradient's absolute values; no tensor's rate is so high that this is
more than its share of the loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import nn

PROBES = 4  # batches whose gradients are looked at
PROMISE = 1.0  # times the loss: what the largest steps of all tensors together promise


def parameter_groups(model: nn.Module) -> list[dict[str, list[nn.Parameter]]]:
    """Return a group a tensor, for an optimizer whose rates `set_rates` sets."""
    return [{"params": [parameter]} for parameter in model.parameters()]


def highest_rates(model: nn.Module, loss: Callable[[], torch.Tensor]) -> dict[str, float]:
    """Return the highest learning rate of each tensor that is trained.

    Args:
        model: what is trained; its gradients are gone afterwards.
        loss: that of the next batch.
    """
    whole, sums = 0.0, {name: 0.0 for name, _ in model.named_parameters()}
    for _ in range(PROBES):
        value = loss()
        model.zero_grad()
        value.backward()
        whole += float(value.detach())
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                sums[name] += float(parameter.grad.abs().sum())
    model.zero_grad()
    trained = {name: size for name, size in sums.items() if size > 0}
    found = {name: PROMISE * whole / len(trained) / size for name, size in trained.items()}
    return {name: rate for name, rate in found.items() if math.isfinite(rate)}


def set_rates(
    optimizer: torch.optim.Optimizer, model: nn.Module, most: Mapping[str, float], rate: float, *, top: float
) -> None:
    """Set the rates for a step.

    Args:
        optimizer: of the `parameter_groups` of the model.
        model: what is trained.
        most: parameter -> its highest rate, where it has one.
        rate: of the schedule now; tensors with a lower one follow it in proportion.
        top: of the schedule.
    """
    for group, (name, _) in zip(optimizer.param_groups, model.named_parameters(), strict=True):
        group["lr"] = rate * min(1.0, most.get(name, math.inf) / top)
