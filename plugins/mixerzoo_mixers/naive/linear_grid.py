"""References of linear attention with convolutions on the grid: the formulae, token by token and cell by cell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mixerzoo_mixers.naive._parts import affine, reference


def convolve(layer: Any, x: list[Tensor], grid: tuple[int, int]) -> list[Tensor]:
    """Each channel alone: y_ij = b + sum_uv K_uv x_(i+u)(j+v), over the cells that there are."""
    rows, columns = grid
    half = layer.weight.shape[-1] // 2

    def cell(i: int, j: int) -> Tensor:
        y = torch.zeros_like(x[0]) if layer.bias is None else layer.bias
        for u in range(-half, half + 1):
            for v in range(-half, half + 1):
                if 0 <= i + u < rows and 0 <= j + v < columns:
                    y = y + layer.weight[:, 0, half + u, half + v] * x[(i + u) * columns + j + v]
        return y

    return [cell(i, j) for i in range(rows) for j in range(columns)]


def attention(
    q: list[Tensor], k: list[Tensor], v: list[Tensor], heads: int, divide: Callable[[Tensor, int], Tensor]
) -> list[Tensor]:
    """Sum over m of q_n.k_m v_m / d_h(sum over m of q_n.k_m), each head on its part of the channels."""

    def head(n: int, h: int) -> Tensor:
        weights = torch.stack([q[n].chunk(heads)[h] @ each.chunk(heads)[h] for each in k])
        values = torch.stack([each.chunk(heads)[h] for each in v])
        return weights @ values / divide(weights.sum(), h)

    return [torch.cat([head(n, h) for h in range(heads)]) for n in range(len(q))]


def projections(mixer: Any, x: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return q, k and v of every token."""
    all_three = [affine(mixer.qkv, token).chunk(3) for token in x]
    q, k, v = ([three[i] for three in all_three] for i in range(3))
    return q, k, v


def read_out(mixer: Any, mixed: list[Tensor], x: Tensor) -> Tensor:
    """y_n = W [m_n; x_n] + b."""
    return torch.stack([affine(mixer.readout, torch.cat((m, t))) for m, t in zip(mixed, x, strict=True)])


def relu(x: Tensor) -> Tensor:
    """Return x where it is positive, else 0."""
    return x * (x > 0)


@reference
def focused_linear(mixer: Any, x: Tensor, real: Tensor) -> Tensor:
    """y_n = W [attention with f(q), f(k) + conv(v); x_n] + b, f(u) = |u'| u'^3 / |u'^3|, u' = relu(u) + 1e-6."""

    def feature(u: Tensor) -> Tensor:
        u = relu(u) + 1e-6
        cube = u * u * u
        focused: Tensor = cube * ((u @ u) / (cube @ cube)).sqrt()
        return focused

    q, k, v = projections(mixer, x)
    prefix = len(x) - mixer.grid[0] * mixer.grid[1]
    mixed = attention([feature(t) for t in q], [feature(t) for t in k], v, mixer.heads, lambda d, h: d + 1e-6)
    local = convolve(mixer.local, v[prefix:], mixer.grid)
    mixed[prefix:] = [a + c for a, c in zip(mixed[prefix:], local, strict=True)]
    return read_out(mixer, mixed, x)


@reference
def lite_mla(mixer: Any, x: Tensor, real: Tensor) -> Tensor:
    """y_n = W [attention; attention of what was convolved and blended; x_n] + b."""
    qkv = [affine(mixer.qkv, token) for token in x]
    prefix = len(x) - mixer.grid[0] * mixer.grid[1]
    near = qkv[:prefix] + convolve(mixer.near, qkv[prefix:], mixer.grid)
    parts = 3 * mixer.heads
    blended = [torch.cat([mixer.blend[g] @ t.chunk(parts)[g] for g in range(parts)]) for t in near]
    scales = []
    for tokens in (qkv, blended):
        q, k, v = ([t.chunk(3)[i] for t in tokens] for i in range(3))
        scales.append(
            attention([relu(t) for t in q], [relu(t) for t in k], v, mixer.heads, lambda d, h: d + 1e-6)
        )
    return read_out(mixer, [torch.cat(pair) for pair in zip(*scales, strict=True)], x)


@reference
def l2_linear(mixer: Any, x: Tensor, real: Tensor) -> Tensor:
    """y_n = W [a_n + conv(gelu(conv(a + v)))_n; x_n] + b, a = t_h * attention, its sum at least 100."""
    q, k, v = projections(mixer, x)
    prefix = len(x) - mixer.grid[0] * mixer.grid[1]

    def divide(d: Tensor, h: int) -> Tensor:
        temperature: Tensor = mixer.temperature[h]
        return (d if d > 100 else 100 * torch.ones_like(d)) / temperature

    mixed = attention([relu(t) for t in q], [relu(t) for t in k], v, mixer.heads, divide)
    stream = [a + t for a, t in zip(mixed[prefix:], v[prefix:], strict=True)]
    inner = convolve(mixer.local[0], stream, mixer.grid)
    inner = [t * (1 + torch.erf(t / 2**0.5)) / 2 for t in inner]
    local = convolve(mixer.local[2], inner, mixer.grid)
    mixed[prefix:] = [a + c for a, c in zip(mixed[prefix:], local, strict=True)]
    return read_out(mixer, mixed, x)
