"""The selective scan as one kernel, with its gradient. See ssm.selective_scan for what it computes.

Shapes: B batch, N tokens, E inner width, S states of an inner unit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mixerzoo_mixers.kernels import call

BLOCK = 32  # inner units of one task, as in scan.c


class _Scan(torch.autograd.Function):
    """What `scan` does, and its gradient."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        """Keep the inputs only: the states are computed again for the gradient."""
        inputs = [t.contiguous() for t in (u, delta, a.mT, b, c)]
        ctx.save_for_backward(*inputs)
        y = torch.empty_like(inputs[0])
        call("scan", "scan_forward", *inputs, y, *u.shape, a.shape[1])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients of all inputs."""
        u, _, a, b, _ = ctx.saved_tensors
        batch, _, inner = u.shape
        blocks = -(-inner // BLOCK)
        du, ddelta = torch.empty_like(u), torch.empty_like(u)
        da = a.new_empty(batch, *a.shape)
        db, dc = (b.new_empty(blocks, *b.shape) for _ in range(2))
        outputs = (du, ddelta, da, db, dc)
        call("scan", "scan_backward", *ctx.saved_tensors, dy.contiguous(), *outputs, *u.shape, len(a))
        return du, ddelta, da.sum(dim=0).mT, db.sum(dim=0), dc.sum(dim=0)


def scan(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Return y (B, N, E) of u, delta (B, N, E), a (E, S), b, c (B, N, S), all float32 on a CPU."""
    y: Tensor = _Scan.apply(u, delta, a, b, c)  # type: ignore[no-untyped-call]
    return y
