"""Narrower MLPs, for mlp sites."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixerzoo import Caps, MixerSpec, MlpView
from mixerzoo.units import Units, places, sized
from mixerzoo_mixers._parts import columns, zipped

MULTIPLE = 8  # hidden sizes are multiples of it: kernels like them, and fewer sizes are to be timed


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _quick_gelu(x: Tensor) -> Tensor:
    return x * (1.702 * x).sigmoid()


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": F.relu,
    "silu": F.silu,
    "quick_gelu": _quick_gelu,
    "sigmoid": torch.sigmoid,
}


class MlpSlice(nn.Module):
    """A teacher's MLP with fewer hidden units. (B, N, D) -> (B, N, D).

    y_n = W_2 act(W_1 x_n + b_1) + b_2 or, if gated, y_n = W_2 (act(G x_n + e) * (W_1 x_n + b_1)) + b_2; gates come
    first in `fc1`.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        activation: str,
        width: float,
        gated: bool = False,
        sizes: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation '{activation}'; known: {', '.join(ACTIVATIONS)}")
        natural = min(hidden, max(MULTIPLE, round(hidden * width / MULTIPLE) * MULTIPLE))
        kept = sized(sizes, "hidden", natural if width < 1 else hidden)
        self.activation, self.gated = activation, gated
        self.fc1 = nn.Linear(dim, 2 * kept if gated else kept)
        self.fc2 = nn.Linear(kept, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map x (B, N, D); the mask changes nothing, tokens do not meet."""
        act, hidden = ACTIVATIONS[self.activation], self.fc1(x)
        if self.gated:
            gate, value = hidden.chunk(2, dim=-1)
            y: Tensor = self.fc2(act(gate) * value)
        else:
            y = self.fc2(act(hidden))
        return y


def inherit_mlp(mixer: MlpSlice, view: MlpView) -> None:
    """Keep the most important of the teacher's hidden units, in their order."""
    kept = view.importance.topk(mixer.fc2.in_features).indices.sort().values
    weight, bias = view.in_weight[kept], view.in_bias[kept]
    if mixer.gated:
        assert view.gate_weight is not None
        assert view.gate_bias is not None
        weight, bias = torch.cat((view.gate_weight[kept], weight)), torch.cat((view.gate_bias[kept], bias))
    mixer.fc1.weight.copy_(weight)
    mixer.fc1.bias.copy_(bias)
    mixer.fc2.weight.copy_(view.out_weight[:, kept])
    mixer.fc2.bias.copy_(view.out_bias)


def hidden_units(mixer: MlpSlice) -> dict[str, Units]:
    """Return the hidden units: what goes in, and what comes out."""
    hidden = mixer.fc2.in_features
    into = places(2 if mixer.gated else 1, hidden, units=1)
    return {
        "hidden": zipped(
            columns("fc1.weight", into, dim=0),
            columns("fc1.bias", into, dim=0, counts=False),
            columns("fc2.weight", places(hidden, units=0)),
            multiple=MULTIPLE,
        )
    }


MLP_SLICE = MixerSpec(
    name="mlp_slice",
    build=MlpSlice,
    summary="the most important hidden units of the MLP, gated or not",
    widths=(0.125, 0.25, 0.5, 0.75),
    kinds={"mlp"},
    caps=Caps(any_length=True, causal=True, masks=True, exportable=True, per_token=True),
    inherit=inherit_mlp,
    readout="fc2",
    units=hidden_units,
    cost="N D hidden",
    paper="after Puzzle, arXiv 2411.19146; units chosen as in OBC, arXiv 2208.11580",
    letter="W",
)
