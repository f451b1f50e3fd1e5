"""References of kernel attention: the formulae, token by token."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mixerzoo_mixers.naive._parts import affine, each, reference, sources


def head_parts(mixer: Any, x: Tensor, h: int) -> list[list[Tensor]]:
    """The queries, keys and values of one head, a list of vectors each."""
    rows = [[part.chunk(mixer.heads)[h] for part in affine(mixer.qkv, v).chunk(3)] for v in x]
    return [list(column) for column in zip(*rows, strict=True)]


@reference
def soft(mixer: Any, x: Tensor, real: Tensor) -> Tensor:
    """S = g(q, z) g(z, z)^-1 g(z, k), rows normalised; z the pooled keys, the inverse by Newton's iteration."""
    spread = 2 * math.sqrt(x.shape[1] // mixer.heads)

    def kernel(ones: list[Tensor], others: list[Tensor]) -> Tensor:
        return torch.stack(
            [torch.stack([torch.exp(-((a - b) ** 2).sum() / spread) for b in others]) for a in ones]
        )

    def pooled(k: list[Tensor]) -> list[Tensor]:
        rows, columns = mixer.grid
        prefix = len(k) - rows * columns
        down, across = mixer.landmarks
        means = []
        for i in range(down):
            for j in range(across):
                ys = range(i * rows // down, -(-(i + 1) * rows // down))
                xs = range(j * columns // across, -(-(j + 1) * columns // across))
                means.append(torch.stack([k[prefix + r * columns + c] for r in ys for c in xs]).mean(0))
        return k[:prefix] + means

    def head(h: int) -> Tensor:
        q, k, v = head_parts(mixer, x, h)
        mean = torch.stack(k).mean(0)
        k = [one - mean for one in k]
        z = pooled(k)
        between = kernel(z, z)
        inverse = torch.eye(len(z), dtype=x.dtype) / between.sum(0).max()
        for _ in range(10):
            inverse = inverse @ (2 * torch.eye(len(z), dtype=x.dtype) - between @ inverse)
        weights = inverse @ kernel(z, k)
        near = kernel(q, z)
        stands_for = weights.sum(1).clamp(min=0.01)
        return (near @ weights @ torch.stack(v)) / (near @ stands_for)[:, None]

    heads = [head(h) for h in range(mixer.heads)]
    return each(x, real, lambda n: affine(mixer.readout, torch.cat((*(y[n] for y in heads), x[n]))))


@reference
def toeplitz_kernel(mixer: Any, x: Tensor, real: Tensor) -> Tensor:
    """a_n = sum_m e^b[m - n] f(q_n).f(k_m) v_m / the same without v, f(u) = exp(w . u / |u|)."""
    rows, columns = mixer.grid
    prefix = len(x) - rows * columns

    def bias(n: int, m: int, h: int) -> Tensor:
        if m < prefix:
            found: Tensor = mixer.prefix_bias[h, m]
        elif n < prefix:
            found = torch.zeros((), dtype=x.dtype)
        else:
            (y1, x1), (y2, x2) = divmod(n - prefix, columns), divmod(m - prefix, columns)
            found = mixer.bias[h, y2 - y1 + rows - 1, x2 - x1 + columns - 1]
        return found

    def head(h: int) -> list[Tensor]:
        q, k, v = head_parts(mixer, x, h)
        fq, fk = ([torch.exp(mixer.directions[h] @ (u / (u @ u).sqrt())) for u in us] for us in (q, k))
        used = mixer.bias[h, :, : len(x)] if mixer.causal else mixer.bias[h]
        top = used.max()
        if prefix:
            top = torch.maximum(top, mixer.prefix_bias[h].max()).clamp(min=0)

        def token(n: int) -> Tensor:
            seen = sources(n, real, mixer.causal)
            if not seen:
                return torch.zeros_like(v[n])
            weights = torch.stack([torch.exp(bias(n, m, h) - top) * (fq[n] @ fk[m]) for m in seen])
            return weights @ torch.stack([v[m] for m in seen]) / weights.sum().clamp(min=1e-6)

        return [token(n) for n in range(len(x))]

    heads = [head(h) for h in range(mixer.heads)]
    return each(x, real, lambda n: affine(mixer.readout, torch.cat((*(y[n] for y in heads), x[n]))))
