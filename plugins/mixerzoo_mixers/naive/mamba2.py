"""The reference of Mamba-2: the formulae, token by token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mixerzoo_mixers.naive._parts import affine, each, in_turn, reference, silu, softplus


def ssd(q: Tensor, k: Tensor, v: Tensor, step: Tensor, decay: Tensor) -> Tensor:
    """h_n = exp(decay_n) h_(n-1) + step_n k_n v_n^T, y_n = h_n^T q_n; q, k (N, S), v (N, P), step, decay (N,)."""
    state = torch.zeros(k.shape[1], v.shape[1], dtype=v.dtype)
    ys = []
    for n in range(len(q)):
        state = torch.exp(decay[n]) * state + step[n] * torch.outer(k[n], v[n])
        ys.append(state.T @ q[n])
    return torch.stack(ys)


@reference
def mamba2(mixer: Any, x: Tensor, real: Tensor) -> Tensor:
    """Over the real tokens; the formulae are in the docstring of mamba2.Mamba2."""
    heads, ways = mixer.heads, mixer.ways
    places = [n for n in range(len(x)) if bool(real[n])]
    rows = torch.stack([affine(mixer.in_proj, x[n]) for n in places])
    inner = mixer.norm.weight.shape[0] // ways
    z, u, step = rows.tensor_split([inner, rows.shape[1] - heads * ways], dim=1)
    kernel = mixer.conv1d.weight[:, 0]  # its column 3 meets the token itself
    convolved = []
    for n in range(len(u)):
        total = mixer.conv1d.bias
        for tap in range(kernel.shape[1]):
            if 0 <= n + tap - 3 < len(u):
                total = total + kernel[:, tap] * u[n + tap - 3]
        convolved.append(silu(total))
    states = (u.shape[1] - inner) // 2
    v, k, q = torch.stack(convolved).tensor_split([inner, inner + states], dim=1)
    features: list[list[Tensor]] = [[] for _ in places]
    for h in range(heads):
        gate, vh, kh, qh = (t.chunk(heads, dim=1)[h] for t in (z, v, k, q))
        for way, order in enumerate(in_turn(mixer, len(places))):
            i = h * ways + way
            dt = softplus(step[:, i] + mixer.dt_bias[i])
            y = ssd(qh[order], kh[order], vh[order], dt[order], -torch.exp(mixer.A_log[i]) * dt[order])
            weight = mixer.norm.weight.chunk(heads * ways)[i]
            for place, n in enumerate(order):
                gated = (y[place] + mixer.D[i] * vh[n]) * silu(gate[n])
                features[n].append(weight * gated / torch.sqrt((gated**2).mean() + 1e-5))
    mixed = dict(zip(places, features, strict=True))
    return each(x, real, lambda n: affine(mixer.readout, torch.cat((*mixed[n], x[n]))))
