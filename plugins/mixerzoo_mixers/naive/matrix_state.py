"""References of mixers whose state is a matrix: the formulae, token by token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mixerzoo_mixers.naive._parts import affine, each, reference, sigmoid, silu, sources


def length(u: Tensor) -> Tensor:
    """|u|, with 1e-6 under the root."""
    return torch.sqrt((u**2).sum() + 1e-6)


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x))."""
    return torch.log1p(torch.exp(-torch.abs(x))) + x * (x > 0)


@reference
def retention(mixer: Any, x: Tensor, real: Tensor) -> Tensor:
    """a_n = sum_m w_nm (1 + s_nm) v_m / sum_m w_nm (1 + |q_n| |k_m| / sqrt(K)), w_nm = exp(-r |n - m|), a head."""
    scale = (x.shape[1] // mixer.heads) ** -0.5
    qs, ks, vs = (
        [p.chunk(mixer.heads) for p in part]
        for part in zip(*(affine(mixer.qkv, t).chunk(3) for t in x), strict=True)
    )

    def token(n: int) -> Tensor:
        heads = []
        for h in range(mixer.heads):
            seen = sources(n, real, mixer.causal)
            q, k, v = qs[n][h], torch.stack([ks[m][h] for m in seen]), torch.stack([vs[m][h] for m in seen])
            near = torch.exp(-torch.exp(mixer.log_rate[h]) * torch.tensor([abs(n - m) for m in seen]))
            below = near * (1 + scale * length(q) * torch.stack([length(row) for row in k]))
            heads.append((near * (1 + scale * (k @ q))) @ v / below.sum())
        return affine(mixer.readout, torch.cat((*heads, x[n])))

    return each(x, real, token)


def in_turn(mixer: Any, tokens: int) -> list[list[int]]:
    """The order in which each direction of `mixer` goes through the tokens."""
    order = list(range(tokens))
    return [order, order[::-1]][: mixer.ways]


@reference
def gated_delta(mixer: Any, x: Tensor, real: Tensor) -> Tensor:
    """S = e^g_n S; S = S + k_n (beta_n (v_n - S^T k_n))^T; o_n = S^T q_n: a head and direction."""
    heads, ways = mixer.heads, mixer.ways
    kept = [n for n in range(len(x)) if bool(real[n])]
    features: dict[int, list[Tensor]] = {n: [] for n in kept}
    for h in range(heads):
        for way, order in enumerate(in_turn(mixer, len(kept))):
            rank = mixer.qkv.out_features // (3 * heads)
            state = torch.zeros(rank, rank, dtype=x.dtype)
            for n in (kept[i] for i in order):
                q, k, v = (part.chunk(heads)[h] for part in affine(mixer.qkv, x[n]).chunk(3))
                q, k = q / length(q), k / length(k)
                write, forget = (part[h * ways + way] for part in affine(mixer.gates, x[n]).chunk(2))
                state = torch.exp(-softplus(forget)) * state
                state = state + torch.outer(k, sigmoid(write) * (v - state.T @ k))
                features[n].append(state.T @ q)
    return each(x, real, lambda n: affine(mixer.readout, torch.cat((*features[n], x[n]))))


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
    """Over the real tokens; the formulae are in the docstring of matrix_state.Mamba2."""
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
