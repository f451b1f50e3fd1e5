"""References of softmax attention with fewer keys, narrower queries or fewer heads: the formulae, token by token."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mixerzoo_mixers.naive._parts import affine, each, reference, sources


@reference
def strip(mixer: Any, x: Tensor, real: Tensor) -> Tensor:
    """y_n = W [sum_t a_hnt v_ht for all h; x_n] + b, a = softmax(q_n.k_t / sqrt K + log c_t) over prefix and tiles."""
    rows, columns = mixer.grid
    prefix = len(x) - rows * columns
    high, wide = (max(1, round(math.sqrt(side) / 2)) for side in mixer.grid)
    sources_, counts = [x[p] for p in range(prefix)], [1] * prefix
    for top in range(0, rows, high):
        for left in range(0, columns, wide):
            cells = [
                (i, j) for i in range(high) for j in range(wide) if top + i < rows and left + j < columns
            ]
            total = torch.zeros_like(x[0])
            for i, j in cells:
                weight = mixer.reduce.weight[:, 0, i, j]
                total = total + weight * x[prefix + (top + i) * columns + left + j]
            sources_.append(total * (high * wide / len(cells)))
            counts.append(len(cells))
    narrow = mixer.query.out_features
    keys = [affine(mixer.key_value, s)[:narrow].chunk(mixer.heads) for s in sources_]
    values = [affine(mixer.key_value, s)[narrow:].chunk(mixer.heads) for s in sources_]
    scale = math.sqrt(x.shape[1] // mixer.heads)

    def token(n: int) -> Tensor:
        queries = affine(mixer.query, x[n]).chunk(mixer.heads)
        heads = []
        for h in range(mixer.heads):
            scores = [queries[h] @ k[h] / scale + math.log(c) for k, c in zip(keys, counts, strict=True)]
            heads.append(torch.softmax(torch.stack(scores), 0) @ torch.stack([v[h] for v in values]))
        return affine(mixer.readout, torch.cat((*heads, x[n])))

    return torch.stack([token(n) for n in range(len(x))])


@reference
def cascaded_group(mixer: Any, x: Tensor, real: Tensor) -> Tensor:
    """o_h = softmax(q.k / sqrt K + bias) v of P_h x + g_h o_(h-1), q by a 5 x 5 convolution; y = W [o_1 ..; x] + b."""
    rows, columns = mixer.grid
    tokens, heads = len(x), len(mixer.qkv)
    prefix: int = tokens - rows * columns
    inputs = [affine(mixer.inner, v).chunk(heads) for v in x]
    before: list[Tensor] = []
    found: list[list[Tensor]] = [[] for _ in x]

    def place(n: int) -> list[int]:
        return [(n - prefix) // columns, (n - prefix) % columns]

    for h in range(heads):
        mine = [inputs[n][h] + mixer.cascade[h - 1] * before[n] if h else inputs[n][h] for n in range(tokens)]
        q, k, v = zip(*(affine(mixer.qkv[h], f).chunk(3) for f in mine), strict=True)
        conv = mixer.conv[h]

        def query(n: int, q: Any = q, conv: Any = conv) -> Tensor:
            if n < prefix:
                own: Tensor = q[n]
                return own
            i, j = place(n)
            total: Tensor = conv.bias
            for a in range(-2, 3):
                for b in range(-2, 3):
                    if 0 <= i + a < rows and 0 <= j + b < columns:
                        near = q[prefix + (i + a) * columns + j + b]
                        total = total + conv.weight[:, 0, a + 2, b + 2] * near
            return total

        def bias(n: int, m: int, h: int = h) -> Tensor:
            if min(n, m) < prefix:
                return torch.zeros_like(mixer.bias[h, 0, 0])
            row, column = (abs(a - b) for a, b in zip(place(n), place(m), strict=True))
            found: Tensor = mixer.bias[h, row, column]
            return found

        scale = math.sqrt(x.shape[1] // heads)
        before = []
        for n in range(tokens):
            convolved = query(n)
            scores = torch.stack([convolved @ k[m] / scale + bias(n, m) for m in range(tokens)])
            before.append(torch.softmax(scores, 0) @ torch.stack(v))
            found[n].append(before[n])
    return torch.stack([affine(mixer.readout, torch.cat((*found[n], x[n]))) for n in range(tokens)])


@reference
def fewer_heads(mixer: Any, x: Tensor, real: Tensor) -> Tensor:
    """y_n = W [sum_m a_hnm v_hm for the heads there are; x_n] + b, a = softmax(q_n.k_m / sqrt K)."""

    def qkv(n: int, h: int) -> list[Tensor]:
        return [part.chunk(mixer.heads)[h] for part in affine(mixer.qkv, x[n]).chunk(3)]

    def token(n: int) -> Tensor:
        seen = sources(n, real, mixer.causal)
        heads = []
        for h in range(mixer.heads):
            q = qkv(n, h)[0]
            scores = torch.stack([q @ qkv(m, h)[1] for m in seen]) / math.sqrt(len(q))
            heads.append(torch.softmax(scores, 0) @ torch.stack([qkv(m, h)[2] for m in seen]))
        return affine(mixer.readout, torch.cat((*heads, x[n])))

    return each(x, real, token)
