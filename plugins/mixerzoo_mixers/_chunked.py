"""Sequences in chunks, for mixers whose state decays.

The tokens of a chunk meet in products, the chunks through states at their ends.

Shapes: B batch, H heads, N tokens, K channels, G chunks of C tokens, S numbers of a state.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from mixerzoo_mixers._parts import chunks, unchunk

CHUNK = 64
WHOLE = 128  # tokens that one chunk is the fastest for
SPAN = 32  # chunks whose states meet in one product
SLOWEST, FASTEST = 1e-6, 5.0  # decay a token that a mean map is fitted with


def chunk_size(tokens: int) -> int:
    """Return how many tokens a chunk has: all if they are few, else up to 64, with as little to fill up as can be."""
    if torch.compiler.is_compiling():
        return CHUNK
    return tokens if tokens <= WHOLE else -(-tokens // -(-tokens // CHUNK))


def cut(x: Tensor, size: int) -> Tensor:
    """Cut the tokens of x (B, H, N, K) into chunks, the last filled up with zeros: (B, H, G, C, K)."""
    y: Tensor = chunks(x.flatten(0, 1), size).unflatten(0, x.shape[:2])
    return y


def join(x: Tensor, tokens: int) -> Tensor:
    """Undo `cut`, with the heads beside each other: (B, H, G, C, K) to (B, N, H * K)."""
    return unchunk(x.permute(0, 2, 3, 1, 4).flatten(3), tokens)


def kept(decay: Tensor, back: bool) -> Tensor:
    """Return the logarithm of what is left at each token of what was there before its chunk: a sum up to the token.

    decay (..., C) is that of every token alone. If `back`, chunks are entered from behind.
    """
    return decay.flip(-1).cumsum(dim=-1).flip(-1) if back else decay.cumsum(dim=-1)


def triangle(size: int, like: Tensor, back: bool) -> Tensor:
    """Return (C, C): 0 where token i may see token j, -inf elsewhere."""
    hidden = torch.full((size, size), -math.inf, dtype=like.dtype, device=like.device)
    return hidden.tril(-1) if back else hidden.triu(1)


def carry(ends: Tensor, decay: Tensor, back: bool = False) -> Tensor:
    """Return the state before each chunk, given those at their ends as if each had started from zero.

    ends (..., G, S), decay (..., G): the logarithm of what a chunk leaves of the state before it. State g is the sum
    over j < g of exp(decay_(j+1) + ... + decay_(g-1)) ends_j: a product with a (G, G) matrix. Many chunks are taken
    in spans, and those in spans again, for time to grow with G. If `back`, it is the sum over j > g.
    """
    count = ends.shape[-2]
    # torch.export must not see a loop over a dynamic number of chunks.
    if count <= SPAN or torch.compiler.is_compiling():
        return (
            passed(decay.flip(-1)).flip(-2, -1)[..., 1:, :] if back else passed(decay)[..., :-1, :]
        ) @ ends
    if back:
        return carry(ends.flip(-2), decay.flip(-1)).flip(-2)
    spans = -(-count // SPAN)
    fill = spans * SPAN - count
    ends = F.pad(ends, (0, 0, 0, fill)).unflatten(-2, (spans, SPAN))
    decay = F.pad(decay, (0, fill)).unflatten(-1, (spans, SPAN))
    inner = passed(decay) @ ends
    outer = carry(inner[..., -1, :], decay.sum(dim=-1)).unsqueeze(-2)
    left = (decay.cumsum(dim=-1) - decay).exp().unsqueeze(-1)
    return torch.addcmul(inner[..., :-1, :], left, outer).flatten(-3, -2)[..., :count, :]


def passed(decay: Tensor) -> Tensor:
    """Return (..., G + 1, G): what is left before chunk i, or in the end, of the state that chunk j made."""
    count = decay.shape[-1]
    # Summed one by one: differences of sums would lose what is small beside them.
    later = decay.unsqueeze(-1).expand(*decay.shape, count).tril(-1)
    return F.pad(later.cumsum(dim=-2).exp().tril(), (0, 0, 1, 0))


def mean_rates(maps: Tensor, causal: bool) -> Tensor:
    """Return r (H,), decays exp(-r |n - m|) under which tokens are as far on the average as in maps (H, N, N)."""
    maps = maps.double()
    place = torch.arange(maps.shape[-1], dtype=torch.double, device=maps.device)
    wanted = (maps * (place.unsqueeze(-1) - place).abs()).sum(dim=-1).mean(dim=-1)
    low, high = (torch.full_like(wanted, math.log(bound)) for bound in (SLOWEST, FASTEST))
    for _ in range(40):  # the mean distance falls with r: halve the interval
        middle = (low + high) / 2
        weight = (-middle.exp().unsqueeze(-1) * place).exp()
        mass, moment = weight.cumsum(dim=-1), (weight * place).cumsum(dim=-1)  # over all tokens on one side
        if not causal:
            mass, moment = mass + mass.flip(-1) - 1, moment + moment.flip(-1)
        far = (moment / mass).mean(dim=-1) > wanted
        low, high = torch.where(far, middle, low), torch.where(far, high, middle)
    return low.exp()


def spread_steps(count: int) -> Tensor:
    """Return random numbers (count,) spread evenly, on a logarithmic scale, over 0.001 to 0.1."""
    return torch.empty(count).uniform_(math.log(1e-3), math.log(1e-1)).exp()


def softplus_inverse(x: Tensor) -> Tensor:
    """Return what softplus makes x of."""
    return x + torch.log(-torch.expm1(-x))
