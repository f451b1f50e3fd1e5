"""References of gated mixers of a fixed length: the formulae, token by token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mixerzoo_mixers.naive._parts import affine, each, gelu, layer_norm, reference, sigmoid, sources


@reference
def glu_mlp(mixer: Any, x: Tensor, real: Tensor) -> Tensor:
    """y_n = W [2 sigmoid(G x_n + e) * sum_m A_hnm (V_h x_m + c_h) for all h; x_n] + b."""
    heads = len(mixer.mixing)

    def value_gate(n: int) -> tuple[Tensor, Tensor]:
        value, gate = affine(mixer.value_gate, x[n]).chunk(2)
        return value, gate

    def token(n: int) -> Tensor:
        seen = sources(n, real, mixer.causal)
        mixed = [
            torch.stack([mixer.mixing[h, n, m] * value_gate(m)[0].chunk(heads)[h] for m in seen]).sum(0)
            for h in range(heads)
        ]
        gate = 2 * sigmoid(value_gate(n)[1])
        return affine(mixer.readout, torch.cat((gate * torch.cat(mixed), x[n])))

    return each(x, real, token)


@reference
def gmlp(mixer: Any, x: Tensor, real: Tensor) -> Tensor:
    """y_n = W [u_n * (sum_m A_nm LN(v_m) + a_n); x_n] + b, [u_n; v_n] = gelu(U x_n + c)."""

    def gate_value(n: int) -> tuple[Tensor, Tensor]:
        gate, value = gelu(affine(mixer.gate_value, x[n])).chunk(2)
        return gate, layer_norm(mixer.norm.weight, mixer.norm.bias, value)

    def token(n: int) -> Tensor:
        mixed = mixer.shift[n]
        for m in sources(n, real, mixer.causal):
            mixed = mixed + mixer.mixing[n, m] * gate_value(m)[1]
        return affine(mixer.readout, torch.cat((gate_value(n)[0] * mixed, x[n])))

    return each(x, real, token)


@reference
def activator(mixer: Any, x: Tensor, real: Tensor) -> Tensor:
    """y_n = W [LN(gelu(G x_n + e)) * sum_m A_hnm LN(V x_m + c)_h for all h; x_n] + b."""
    heads = len(mixer.mixing)

    def gate_value(n: int) -> tuple[Tensor, Tensor]:
        gate, value = affine(mixer.gate_value, x[n]).chunk(2)
        gate = layer_norm(mixer.gate_norm.weight, mixer.gate_norm.bias, gelu(gate))
        return gate, layer_norm(mixer.value_norm.weight, mixer.value_norm.bias, value)

    def token(n: int) -> Tensor:
        seen = sources(n, real, mixer.causal)
        mixed = [
            torch.stack([mixer.mixing[h, n, m] * gate_value(m)[1].chunk(heads)[h] for m in seen]).sum(0)
            for h in range(heads)
        ]
        return affine(mixer.readout, torch.cat((gate_value(n)[0] * torch.cat(mixed), x[n])))

    return each(x, real, token)
