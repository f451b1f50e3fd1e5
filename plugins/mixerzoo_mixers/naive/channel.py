"""References of narrow MLPs: the formulae, token by token."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mixerzoo_mixers.naive._parts import affine, each, reference, sigmoid, silu


@reference
def mlp_slice(mixer: Any, x: Tensor, real: Tensor) -> Tensor:
    """y_n = W_2 act(W_1 x_n + b_1) + b_2."""
    activations: dict[str, Callable[[Tensor], Tensor]] = {
        "gelu": lambda v: v * (1 + torch.erf(v / math.sqrt(2))) / 2,
        "gelu_tanh": lambda v: v * (1 + torch.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))) / 2,
        "relu": lambda v: v * (v > 0),
        "silu": silu,
        "quick_gelu": lambda v: v * sigmoid(1.702 * v),
    }
    activation = activations[mixer.activation]
    return each(x, real, lambda n: affine(mixer.fc2, activation(affine(mixer.fc1, x[n]))))
