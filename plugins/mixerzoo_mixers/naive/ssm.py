"""References of state-space mixers: the formulae, token by token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mixerzoo_mixers.naive._parts import affine, each, reference, silu


def selective_scan(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """y_n = c_n . h_n, h_n = exp(delta_n a) h_(n-1) + delta_n u_n b_n; u, delta (N, E), a (E, S), b, c (N, S)."""
    state = torch.zeros_like(a)
    ys = []
    for n in range(len(u)):
        state = torch.exp(delta[n][:, None] * a) * state + (delta[n] * u[n])[:, None] * b[n]
        ys.append(state @ c[n])
    return torch.stack(ys)


def selective_ssm(block: Any, x: Tensor) -> Tensor:
    """One direction of Mamba, all of x (N, D) real; the formula is in the docstring of ssm.SelectiveSsm."""
    states = block.A_log.shape[1]
    us, zs = zip(*(affine(block.in_proj, v).chunk(2) for v in x), strict=True)
    kernel = block.conv1d.weight[:, 0]  # (E, 4); its last column meets the token itself
    convolved = []
    for n in range(len(x)):
        total = block.conv1d.bias
        for back in range(min(n + 1, kernel.shape[1])):
            total = total + kernel[:, -1 - back] * us[n - back]
        convolved.append(silu(total))
    rank = block.dt_proj.in_features
    steps, bs, cs = zip(
        *(affine(block.x_proj, u).tensor_split([rank, rank + states]) for u in convolved), strict=True
    )
    delta = torch.stack([torch.log(1 + torch.exp(affine(block.dt_proj, step))) for step in steps])
    u = torch.stack(convolved)
    y = selective_scan(u, delta, -torch.exp(block.A_log), torch.stack(bs), torch.stack(cs)) + block.D * u
    return torch.stack([affine(block.out_proj, v * silu(z)) for v, z in zip(y, zs, strict=True)])


@reference
def mamba(mixer: Any, x: Tensor, real: Tensor) -> Tensor:
    """Over the real tokens: y = W [M_1(x); flip(M_2(flip(x))); x] + b."""
    kept = [n for n in range(len(x)) if bool(real[n])]
    features = [selective_ssm(mixer.ahead, x[kept])]
    if mixer.back is not None:
        features.append(selective_ssm(mixer.back, x[kept[::-1]])[list(range(len(kept)))[::-1]])
    mixed = dict(zip(kept, torch.cat((*features, x[kept]), dim=1), strict=True))
    return each(x, real, lambda n: affine(mixer.readout, mixed[n]))
