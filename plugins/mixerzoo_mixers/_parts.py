"""What several mixers share: shapes, padding, and the truncated factors of the teacher's projections.

Shapes: B batch, N tokens, D model width, H heads, K the teacher's head width, R the mixer's head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixerzoo import AttentionView
from mixerzoo.units import Share, Units


def head_width(dim: int, heads: int, width: float) -> int:
    """Return the mixer's head width R: the fraction `width` of the teacher's K = D / H, at least 1.

    Raises:
        ValueError: if D is not a multiple of H.
    """
    if dim % heads:
        raise ValueError(
            f"model width {dim} cannot be split over {heads} heads; it must be a multiple of them"
        )
    return max(1, round(dim // heads * width))


def check_tokens(x: Tensor, tokens: int) -> None:
    """Refuse an input of another length than the mixer was built for.

    Raises:
        ValueError: if x (B, N, D) does not hold `tokens` tokens.
    """
    if x.shape[1] != tokens:
        raise ValueError(f"built for {tokens} tokens, got {x.shape[1]}; this mixer has a fixed length")


def zero_padding(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return x (B, N, D) with zeros where mask (B, N) is False, so that not even a NaN gets out of the padding."""
    return x if mask is None else x.masked_fill(~mask.unsqueeze(-1), 0)


def compact(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Move each sample's real tokens to the front, in order; returns x, the mask and `expand`'s argument."""
    order = (~mask).int().argsort(dim=1, stable=True)
    moved = x.gather(1, order.unsqueeze(-1).expand_as(x))
    return moved, mask.gather(1, order), order.argsort(dim=1)


def expand(x: Tensor, places: Tensor) -> Tensor:
    """Undo `compact`: put the tokens of x (B, N, D) back in their places (B, N)."""
    return x.gather(1, places.unsqueeze(-1).expand_as(x))


def chunks(x: Tensor, size: int) -> Tensor:
    """Cut the tokens of x (B, N, K) into G chunks, the last filled up with zeros: (B, G, size, K)."""
    batch, tokens, channels = x.shape
    # Two helps for torch.export with a dynamic N. Not written as -tokens % size: the new length can be seen to be
    # a multiple. And one chunk too many: their number can be seen not to be 1, which would be broadcast.
    count = (tokens + (2 * size if torch.compiler.is_compiling() else size) - 1) // size
    return F.pad(x, (0, 0, 0, count * size - tokens)).view(batch, count, size, channels)


def unchunk(x: Tensor, tokens: int) -> Tensor:
    """Undo `chunks`: (B, G, size, K) to (B, N, K)."""
    x = x.flatten(1, 2)
    if torch.compiler.is_compiling():  # torch.export cannot prove that N is no more than G * size
        return x.index_select(1, torch.arange(tokens, device=x.device))
    return x[:, :tokens]


def split_heads(x: Tensor, heads: int, dim: int = -1) -> Tensor:
    """Split dimension `dim` of x, (heads * R), into two: (heads, R)."""
    shape = list(x.shape)
    dim %= x.dim()
    return x.view(*shape[:dim], heads, shape[dim] // heads, *shape[dim + 1 :])


def at_least_float(x: Tensor) -> Tensor:
    """Return x in float32 if it is of lower precision; float64 stays as it is, for gradcheck."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def depthwise(x: Tensor, conv: nn.Conv1d) -> Tensor:
    """Apply a depthwise convolution with padding to x (B, N, C); returns (B, N, C), of the first N places.

    As pictures of one row, with the channels last: many times as fast on a CPU as one-dimensional.
    """
    picture = x.contiguous().mT.unsqueeze(2)
    padding = (0, int(conv.padding[0]))
    y = F.conv2d(picture, conv.weight.unsqueeze(2), conv.bias, padding=padding, groups=x.shape[-1])
    return y.squeeze(2).mT[:, : x.shape[1]]


def qkv_heads(qkv: Tensor, heads: int) -> tuple[Tensor, ...]:
    """Split what the layer of q, k and v returns, (B, N, 3 * H * R), into three times (B, H, N, R), float at least."""
    return split_heads(at_least_float(qkv), 3 * heads).transpose(1, 2).chunk(3, dim=1)


class Constants(nn.Module):
    """Matrices that are not learnt, by name; `make` returns them in float64.

    They are made anew whenever the module is moved or cast, in its new precision but float32 at least, and exact
    in it. They are not saved.
    """

    def __init__(self, make: Callable[[], dict[str, Tensor]]) -> None:
        super().__init__()
        self.make = make
        for name, exact in make().items():
            self.register_buffer(name, exact.to(torch.get_default_dtype()), persistent=False)

    def __getitem__(self, name: str) -> Tensor:
        return self.get_buffer(name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, exact in self.make().items():
            now = self.get_buffer(name)
            setattr(self, name, exact.to(now.device, torch.promote_types(now.dtype, torch.float32)))
        return self


class UnitNorm(nn.LayerNorm):
    """A LayerNorm over units of which some were pruned: as if those were there, and zero. (..., U) -> (..., U)."""

    def __init__(self, units: int, natural: int) -> None:
        super().__init__(units)
        self.missing = natural - units

    def forward(self, input: Tensor) -> Tensor:
        """Normalise the last dimension."""
        if not self.missing:
            return super().forward(input)
        padding = (0, self.missing)
        x, weight, bias = (F.pad(t, padding) for t in (input, self.weight, self.bias))
        return F.layer_norm(x, x.shape[-1:], weight, bias, self.eps)[..., : -self.missing]


def columns(parameter: str, rows: list[Tensor], *, dim: int = 1, counts: bool = True) -> list[Share]:
    """Return each row's share of one parameter, such as the columns of a readout."""
    return [Share(parameter=parameter, dim=dim, places=p, counts=counts) for p in rows]


def zipped(*shares: list[Share], multiple: int = 1) -> Units:
    """Return units, from each parameter's shares of every row."""
    return Units(rows=tuple(zip(*shares, strict=True)), multiple=multiple)


def factor(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Best approximation of left @ right, (H, m, K) and (H, K, n), through a smaller K: a truncated SVD a head.

    Returns (H, m, R) and (H, R, n) with R = min(rank, K); the singular values are shared evenly. Nothing is
    changed where nothing has to be cut.
    """
    if rank >= left.shape[-1]:
        return left, right
    # QR first: the SVD is then of K by K matrices, not of D by D ones.
    ql, rl = torch.linalg.qr(left.double())
    qr, rr = torch.linalg.qr(right.double().mT)
    u, s, vh = torch.linalg.svd(rl @ rr.mT)
    root = s[..., :rank].sqrt()
    a = ql @ u[..., :rank] * root.unsqueeze(-2)
    b = root.unsqueeze(-1) * vh[..., :rank, :] @ qr.mT
    return a.to(left.dtype), b.to(right.dtype)


def inherit_values(view: AttentionView, value: Tensor, readout: nn.Linear) -> None:
    """Start the value projection (H, R, D) and a readout over [heads (H*R), rest] from the teacher, in place.

    The product of a head's value and output projection is kept as well as R allows. The value bias goes into the
    readout's: each row of an attention map sums to 1, so both are the same. The rest starts at zero.
    """
    heads, rank, _ = value.shape
    v = split_heads(view.v_weight, heads, 0)
    out = split_heads(view.out_weight, heads).transpose(0, 1)
    out, v = factor(out, v, rank)
    kept = v.shape[1]
    value[:, :kept] = v
    readout.weight.zero_()
    mixed = split_heads(readout.weight[:, : heads * rank], heads)
    mixed[:, :, :kept] = out.transpose(0, 1)
    assert readout.bias is not None
    readout.bias.copy_(view.out_bias + view.out_weight @ view.v_bias)


def inherit_qkv(view: AttentionView, qkv: nn.Linear, readout: nn.Linear, heads: int) -> None:
    """Start q, k and v (one layer, D to 3 * heads * R) and a readout over [heads (H*R), rest] from the teacher.

    Where R is less than K, the products that attention is made of are kept as well as R allows, by truncated SVD a
    head: q with k (biases included, as a further column), v with the output projection. The teacher's scores are
    q.k / sqrt(K) of its own K, whatever R is.
    """
    weights = [split_heads(w, heads, 0) for w in qkv.weight.chunk(3)]  # (H, R, D) each
    biases = [split_heads(b, heads, 0) for b in qkv.bias.chunk(3)]
    q, k = (
        split_heads(torch.cat((w, b.unsqueeze(-1)), dim=-1), heads, 0)
        for w, b in ((view.q_weight, view.q_bias), (view.k_weight, view.k_bias))
    )
    left, right = factor(q.mT, k, weights[0].shape[1])
    for weight, bias, t in zip(weights, biases, (left.mT, right), strict=False):
        kept = t.shape[1]
        weight[:, :kept], bias[:, :kept] = t[..., :-1], t[..., -1]
    biases[2].zero_()
    inherit_values(view, weights[2], readout)


def read_out(readout: nn.Linear, own: Tensor, shared: Tensor) -> Tensor:
    """Apply the readout to [own (B, N, P); shared (B, 1, S) repeated for every token]; returns (B, N, D)."""
    observed = readout._forward_hooks or readout._forward_pre_hooks
    if type(readout) is nn.Linear and not observed:
        # The same sum, but what all tokens share is mapped once and not N times.
        split = own.shape[-1]
        bias = F.linear(shared, readout.weight[:, split:], readout.bias)
        return F.linear(own, readout.weight[:, :split]) + bias
    y: Tensor = readout(torch.cat((own, shared.expand(-1, own.shape[1], -1)), dim=-1))
    return y
