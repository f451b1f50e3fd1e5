"""References of mixers whose state is a matrix: the formulae, token by token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mixerzoo_mixers.naive._parts import affine, each, in_turn, reference, sigmoid, softplus, sources


def length(u: Tensor) -> Tensor:
    """|u|, with 1e-6 under the root."""
    return torch.sqrt((u**2).sum() + 1e-6)


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
