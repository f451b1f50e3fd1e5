"""Narrower MLPs, for mlp sites."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn
from torch.nn import functional as F

from mixerzoo import Caps, MixerSpec, MlpView

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
}


class MlpSlice(nn.Module):
    """A teacher's MLP with fewer hidden units: y_n = W_2 act(W_1 x_n + b_1) + b_2. (B, N, D) -> (B, N, D)."""

    def __init__(self, dim: int, hidden: int, activation: str, width: float) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation '{activation}'; known: {', '.join(ACTIVATIONS)}")
        kept = min(hidden, max(MULTIPLE, round(hidden * width / MULTIPLE) * MULTIPLE))
        self.activation = activation
        self.fc1 = nn.Linear(dim, kept)
        self.fc2 = nn.Linear(kept, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map x (B, N, D); the mask changes nothing, tokens do not meet."""
        y: Tensor = self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))
        return y


def inherit_mlp(mixer: MlpSlice, view: MlpView) -> None:
    """Keep the most important of the teacher's hidden units, in their order."""
    kept = view.importance.topk(mixer.fc1.out_features).indices.sort().values
    mixer.fc1.weight.copy_(view.in_weight[kept])
    mixer.fc1.bias.copy_(view.in_bias[kept])
    mixer.fc2.weight.copy_(view.out_weight[:, kept])
    mixer.fc2.bias.copy_(view.out_bias)


MLP_SLICE = MixerSpec(
    name="mlp_slice",
    build=MlpSlice,
    summary="the most important hidden units of the MLP",
    widths=(0.125, 0.25, 0.5, 0.75),
    kinds={"mlp"},
    caps=Caps(any_length=True, causal=True, masks=True, exportable=True, per_token=True),
    inherit=inherit_mlp,
    readout="fc2",
    cost="N D hidden",
    paper="Puzzle, arXiv 2411.19146 (channel contribution)",
    letter="W",
)
