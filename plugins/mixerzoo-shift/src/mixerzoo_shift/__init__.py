"""Token shift: a third of the channels comes from the token before, a third from the one after.

Shapes: B batch, N tokens, D model width, C inner channels, P prefix tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from mixerzoo import AttentionView, Caps, MixerSpec, hookimpl


class Shift(nn.Module):
    """Shift values among neighbours, then read them out.

    Class and register tokens come first, but are neighbours of nobody: they take the mean of the other tokens
    where those take a neighbour's value. Beyond the ends, and in place of padding, there are zeros.
    """

    def __init__(self, dim: int, width: float, prefix: int) -> None:
        super().__init__()
        inner = max(3, round(dim * width))
        self.prefix = prefix
        self.moved = inner // 3
        self.value = nn.Linear(dim, inner)
        self.readout = nn.Linear(inner, dim)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Map (B, N, D) to (B, N, D); `mask`, (B, N) bool, is True for real tokens."""
        value = self.value(x)  # B N C
        real = torch.ones_like(value[..., :1]) if mask is None else mask[..., None].to(value.dtype)
        value = value * real
        prefix, rest = value[:, : self.prefix], value[:, self.prefix :]
        moved = self.moved
        before = F.pad(rest[..., :moved], (0, 0, 1, 0))[:, :-1]
        after = F.pad(rest[..., moved : 2 * moved], (0, 0, 0, 1))[:, 1:]
        mixed = torch.cat([before, after, rest[..., 2 * moved :]], -1)
        if self.prefix:
            # With nothing but a prefix the sum is over no token at all, and the count is zero.
            count = real[:, self.prefix :].sum(1, keepdim=True).clamp(min=1)
            mean = (rest[..., : 2 * moved].sum(1, keepdim=True) / count).expand(-1, prefix.shape[1], -1)
            mixed = torch.cat([torch.cat([mean, prefix[..., 2 * moved :]], -1), mixed], 1)
        out: torch.Tensor = self.readout(mixed)
        return out


def inherit(mixer: Shift, view: AttentionView) -> None:
    """Start from the teacher's own map of a value to an output, W_O W_V, so that only the mixing is new.

    A narrower mixer keeps the channels that pass on the most.
    """
    passed_on = view.v_weight.norm(dim=1) * view.out_weight.norm(dim=0)
    kept = passed_on.topk(mixer.value.out_features).indices.sort().values
    mixer.value.weight.copy_(view.v_weight[kept])
    mixer.value.bias.copy_(view.v_bias[kept])
    mixer.readout.weight.copy_(view.out_weight[:, kept])
    mixer.readout.bias.copy_(view.out_bias)


@hookimpl
def register_mixers(register: Callable[[MixerSpec], None]) -> None:
    """Offer the shift mixer."""
    register(
        MixerSpec(
            name="shift",
            build=Shift,
            summary="values of the tokens before and after, a third of the channels each",
            widths=(0.5, 1.0),
            caps=Caps(any_length=True, masks=True, exportable=True),
            inherit=inherit,
            readout="readout",
            cost="N D^2",
            paper="token shift, as in RWKV, arXiv 2305.13048",
        )
    )
