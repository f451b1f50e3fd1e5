"""What timm's MLPs and attention are made of: plain and gated MLPs, and the units that can be pruned.

A gated MLP is fc2(act(gate) * value). timm has it with one layer for both (GluMlp, SwiGLUPacked) or with two (SwiGLU).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mixerzoo.spec import Kind
from mixerzoo.units import Share, Units, places

MULTIPLE = 8  # hidden units of a pruned MLP are a multiple of it


def is_mlp(module: nn.Module) -> bool:
    """Whether a module has an MLP's linear layers; squeeze-and-excitation has convolutions of these names."""
    return _linear(module, "fc2") and (_linear(module, "fc1") or _two_layers(module))


def is_gated(module: nn.Module) -> bool:
    """Whether an MLP has twice as many inputs to its activations as hidden units."""
    m: Any = module
    return _two_layers(module) or bool(m.fc1.out_features == 2 * m.fc2.in_features)


def hidden_size(module: nn.Module) -> int:
    """Return the number of hidden units of an MLP."""
    m: Any = module
    return int(m.fc2.in_features)


def hidden_units(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return act(fc1(x)), or act(gate) * value of a gated MLP: (B, N, hidden)."""
    m: Any = module
    hidden: torch.Tensor
    if _two_layers(module):
        hidden = m.act(m.fc1_g(x)) * m.fc1_x(x)
    elif is_gated(module):
        one, other = m.fc1(x).chunk(2, dim=-1)
        gate, value = (other, one) if _gate_last(module) else (one, other)
        hidden = m.act(gate) * value
    else:
        hidden = m.act(m.fc1(x))
    return hidden


def formula(module: nn.Module) -> str:
    """Return what the output of an MLP is taken to be."""
    return "fc2(act(gate) * value)" if is_gated(module) else "fc2(act(fc1(x)))"


def mlp_weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return copies of an MLP's weights, by field of MlpView."""
    m: Any = module
    into: dict[str, tuple[torch.Tensor, torch.Tensor]] = {"out": parts(m.fc2)}
    if _two_layers(module):
        into |= {"gate": parts(m.fc1_g), "in": parts(m.fc1_x)}
    elif is_gated(module):
        (w1, w2), (b1, b2) = (t.chunk(2) for t in parts(m.fc1))
        one, other = (w1.clone(), b1.clone()), (w2.clone(), b2.clone())
        into |= {"gate": other, "in": one} if _gate_last(module) else {"gate": one, "in": other}
    else:
        into |= {"in": parts(m.fc1)}
    return {
        f"{name}_{what}": tensor
        for name, pair in into.items()
        for what, tensor in zip(("weight", "bias"), pair, strict=True)
    }


def parts(linear: nn.Linear) -> tuple[torch.Tensor, torch.Tensor]:
    """Return copies of the weight and the bias, zeros where there is none."""
    weight = linear.weight.detach().clone()
    bias = torch.zeros(len(weight)) if linear.bias is None else linear.bias.detach().clone()
    return weight, bias


def units(module: nn.Module, kind: Kind) -> dict[str, Units]:
    """Return the hidden units of an MLP, or the heads of an attention without norms inside."""
    m: Any = module
    if kind == "mlp":
        hidden = hidden_size(module)
        names = ("fc1_g", "fc1_x") if _two_layers(module) else ("fc1",)
        layout = (2, hidden) if names == ("fc1",) and is_gated(module) else (1, hidden)
        rows = [share for name in names for share in _rows(m, name, places(*layout, units=1)[0])]
        out = Share(parameter="fc2.weight", dim=1, places=places(hidden, units=0)[0])
        return {"hidden": Units(rows=((*rows, out),), multiple=MULTIPLE)}
    if any(
        not isinstance(getattr(m, norm, nn.Identity()), nn.Identity) for norm in ("q_norm", "k_norm", "norm")
    ):
        return {}
    heads, width = int(m.num_heads), m.proj.in_features // int(m.num_heads)
    rows = _rows(m, "qkv", places(3, heads, width, units=1)[0])
    out = Share(parameter="proj.weight", dim=1, places=places(heads, width, units=0)[0])
    return {"heads": Units(rows=((*rows, out),))}


def _rows(module: Any, name: str, at: torch.Tensor) -> list[Share]:
    """Return the rows of a linear layer, and its bias where it has one."""
    found = [Share(parameter=f"{name}.weight", dim=0, places=at)]
    if getattr(module, name).bias is not None:
        found.append(Share(parameter=f"{name}.bias", dim=0, places=at, counts=False))
    return found


def _linear(module: nn.Module, name: str) -> bool:
    return isinstance(getattr(module, name, None), nn.Linear)


def _two_layers(module: nn.Module) -> bool:
    return _linear(module, "fc1_g") and _linear(module, "fc1_x")


def _gate_last(module: nn.Module) -> bool:
    return bool(getattr(module, "gate_last", True))
