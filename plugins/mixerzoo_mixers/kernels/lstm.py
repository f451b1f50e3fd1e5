"""LSTMs side by side as one kernel, with its gradient.

Shapes: L LSTMs, B batch, N tokens, S hidden units.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mixerzoo_mixers.kernels import call


class _Recurrence(torch.autograd.Function):
    """What `recurrence` does, and its gradient."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, bias: Tensor, weight: Tensor, lengths: Tensor | None, first_reverse: int
    ) -> Tensor:
        """Keep the activated gates and the cells."""
        shape = (*inputs.shape[:3], weight.shape[2])
        blank = torch.empty if lengths is None else torch.zeros
        hidden, cell = blank(shape), blank(shape)
        if lengths is None:
            lengths = torch.full(shape[1:2], shape[2])
        turned = weight.mT.contiguous()
        arguments = (inputs, bias.contiguous(), turned, lengths, hidden, cell)
        call("lstm", "lstm_forward", *arguments, *shape, first_reverse)
        ctx.save_for_backward(inputs, weight, lengths, hidden, cell)
        ctx.first_reverse = first_reverse
        return hidden

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dhidden: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of inputs, bias and weight; the weight's is one product over all tokens."""
        gates, weight, lengths, hidden, cell = ctx.saved_tensors
        dgates = torch.zeros_like(gates)
        arguments = (gates, weight.contiguous(), lengths, cell, dhidden.contiguous(), dgates)
        call("lstm", "lstm_backward", *arguments, *hidden.shape, ctx.first_reverse)
        before = torch.zeros_like(hidden)
        ahead = ctx.first_reverse
        before[:ahead, :, 1:] = hidden[:ahead, :, :-1]
        before[ahead:, :, :-1] = hidden[ahead:, :, 1:]
        dweight = dgates.flatten(1, 2).mT @ before.flatten(1, 2)
        return dgates, dgates.sum(dim=(1, 2)), dweight, None, None


def recurrence(
    inputs: Tensor, bias: Tensor, weight: Tensor, lengths: Tensor | None, first_reverse: int
) -> Tensor:
    """Return hidden states (L, B, N, S); inputs (L, B, N, 4 S), bias (L, 4 S), weight (L, 4 S, S), lengths (B,).

    i, f, g, o = inputs_n + bias + weight h_(n-1); c_n = sigmoid(f) c_(n-1) + sigmoid(i) tanh(g);
    h_n = sigmoid(o) tanh(c_n). LSTMs from `first_reverse` on go from the last token to the first. Past a sample's
    length, h is 0; no lengths: all tokens are real. All are float32 on a CPU; `inputs` is contiguous and used up: it
    becomes the activated gates.
    """
    hidden: Tensor = _Recurrence.apply(  # type: ignore[no-untyped-call]
        inputs, bias, weight, lengths, first_reverse
    )
    return hidden
