"""Shallow feed-forward networks over the whole sequence, in place of attention.

Their weights grow with the square of the sequence's length, and so does what reading them costs.
Shapes: B batch, N tokens, D model width, H heads, K head width, S hidden units.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixerzoo import AttentionView, Caps, MixerSpec, MixerzooError
from mixerzoo.units import Share, Units, places, sized
from mixerzoo_mixers._parts import (
    UnitNorm,
    check_tokens,
    columns,
    head_width,
    split_heads,
    zero_padding,
    zipped,
)

LIMIT_GIB = 2  # of float32 weights in one mixer
LEAK = 0.01  # slope of LeakyReLU below zero
FEWEST = 8  # hidden units
# LeakyReLU of a standard normal variable: its standard deviation, which the norm behind it divides by.
SPREAD = math.sqrt((1 + LEAK**2) / 2 - (1 - LEAK) ** 2 / (2 * math.pi))


def demand_affordable(name: str, width: float, tokens: int, dim: int, parameters: int) -> None:
    """Refuse weights that no one would want to load.

    Raises:
        MixerzooError: if `parameters` numbers in float32 are more than LIMIT_GIB.
    """
    size = parameters * 4 / 2**30
    if size > LIMIT_GIB:
        raise MixerzooError(
            f"mixer '{name}' at width {width:g} would have {size:,.1f} GiB of weights for {tokens} tokens of width "
            f"{dim}, more than {LIMIT_GIB} GiB: they grow with the square of both; take a width below "
            f"{width * LIMIT_GIB / size:.1g}, fewer tokens, or a mixer of any length"
        )


def top_components(
    apply: Callable[[Tensor], Tensor], adjoint: Callable[[Tensor], Tensor], like: Tensor, rank: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Leading singular vectors (size, rank), values (rank,) and vectors (size, rank) of a large square map.

    The map and its adjoint work on (size, columns); `like` is any (size, columns). By subspace iteration from a
    fixed random start (Halko, Martinsson, Tropp, arXiv 0909.4061).
    """
    size = len(like)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(size, min(size, rank + 8), generator=generator, dtype=torch.float64).to(like)
    basis = torch.linalg.qr(start).Q
    for _ in range(3):
        basis = torch.linalg.qr(apply(basis)).Q
        basis = torch.linalg.qr(adjoint(basis)).Q
    left, values, right = torch.linalg.svd(apply(basis), full_matrices=False)
    return left[:, :rank], values[:rank], (basis @ right.mT)[:, :rank]


class ShallowFfn(nn.Module):
    """A network over the whole sequence: y_n = W [f(x)_n; x_n] + b. (B, N, D) -> (B, N, D).

    f: vec(x) -> LayerNorm -> Linear -> LeakyReLU -> LayerNorm -> Linear, with S = N*D / 256 * width hidden units, at
    least 8. Width 1 is the paper's XS, 2 its S. Its M and L would be 32 and 128, which is more than a width may be;
    for 257 tokens of width 384 they are 9 and 36 GiB. The readout is not in the paper, where y = f(x) (W = [1, 0],
    b = 0).
    """

    def __init__(self, dim: int, tokens: int, width: float, sizes: Mapping[str, int] | None = None) -> None:
        super().__init__()
        flat = tokens * dim
        natural = max(FEWEST, round(flat / 256 * width))
        hidden = sized(sizes, "hidden", natural)
        demand_affordable("shallow_ffn", width, tokens, dim, 2 * flat * hidden)
        self.tokens = tokens
        self.norm1, self.norm2 = nn.LayerNorm(flat), UnitNorm(hidden, natural)
        self.up, self.down = nn.Linear(flat, hidden), nn.Linear(hidden, flat)
        self.readout = nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mix x (B, N, D); tokens where mask (B, N) is False count as zeros, and zeros is what they get."""
        check_tokens(x, self.tokens)
        x = zero_padding(x, mask)
        hidden = F.leaky_relu(self.up(self.norm1(x.flatten(1))), LEAK)
        mixed = self.down(self.norm2(hidden)).view(x.shape)
        return zero_padding(self.readout(torch.cat((mixed, x), dim=-1)), mask)


def inherit_shallow_ffn(mixer: ShallowFfn, view: AttentionView) -> None:
    """Start near the teacher's attention with its mean maps: its S / 2 leading components over vec(x).

    LeakyReLU(a) - LeakyReLU(-a) = 1.01 a: two hidden units make a linear one. What remains is the size of the input
    and of the hidden units of each sample, which the norms take out.
    """
    up, down = mixer.up.weight, mixer.down.weight
    heads, dim, half = len(view.mean_attention), len(view.out_weight), len(up) // 2
    maps = view.mean_attention.to(up)
    value, out = split_heads(view.v_weight, heads, 0), split_heads(view.out_weight, heads).transpose(0, 1)
    product = (out @ value).to(up)  # (H, D, D)

    def run(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """Sum of left_h X right_h' over the heads, for each column of x (N*D, columns) as X (N, D)."""
        columns = x.mT.reshape(-1, mixer.tokens, dim)
        total = torch.zeros_like(columns)
        for one, other in zip(left, right, strict=True):
            total += one @ columns @ other.mT
        return total.flatten(1).mT

    left, values, right = top_components(
        lambda x: run(x, maps, product), lambda x: run(x, maps.mT, product.mT), up.mT, half
    )
    kept, back = len(values), left * values / (1 + LEAK)
    up[:kept], up[half : half + kept] = right.mT, -right.mT
    down.zero_()
    down[:, :kept], down[:, half : half + kept] = back, -back
    mixer.up.bias.zero_()
    mixer.down.bias.zero_()
    mixer.norm2.weight.fill_(SPREAD)
    mixer.readout.weight.copy_(torch.eye(dim, 2 * dim))
    mixer.readout.bias.copy_(view.out_bias + view.out_weight @ view.v_bias)


def shallow_ffn_units(mixer: ShallowFfn) -> dict[str, Units]:
    """Return the hidden units."""
    own = places(mixer.up.out_features, units=0)
    return {
        "hidden": zipped(
            columns("up.weight", own, dim=0),
            columns("up.bias", own, dim=0, counts=False),
            columns("norm2.weight", own, dim=0, counts=False),
            columns("norm2.bias", own, dim=0, counts=False),
            columns("down.weight", own),
            multiple=FEWEST,
        )
    }


class ShallowFfnHeads(nn.Module):
    """One network a head over its values: y_n = W [f_h(V_h x)_n for all h; x_n] + b. (B, N, D) -> (B, N, D).

    f_h: vec(V_h x) -> LayerNorm -> Linear -> LeakyReLU -> LayerNorm -> Linear, with S = N*K / 64 * width hidden units,
    at least 8; V_h is (K, D). The paper's ALSR (Attention Layer Separate heads Replacement) reads all of x in every
    head, H times as much, with N*D / 32 hidden units for its XS; here it is the head's values, as they are the
    teacher's. The readout is the output projection that ALSR keeps, and sees the token too.
    """

    def __init__(
        self, dim: int, heads: int, tokens: int, width: float, sizes: Mapping[str, int] | None = None
    ) -> None:
        super().__init__()
        flat = tokens * head_width(dim, heads, 1.0)
        natural = max(FEWEST, round(flat / 64 * width))
        hidden = sized(sizes, "hidden", natural)
        demand_affordable("shallow_ffn_heads", width, tokens, dim, 2 * heads * flat * hidden)
        self.tokens = tokens
        self.value = nn.Linear(dim, dim, bias=False)
        self.norm1, self.norm2 = HeadNorm(heads, flat, flat), HeadNorm(heads, hidden, natural)
        self.up, self.down = HeadLinear(heads, flat, hidden), HeadLinear(heads, hidden, flat)
        self.readout = nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mix x (B, N, D); tokens where mask (B, N) is False count as zeros, and zeros is what they get."""
        check_tokens(x, self.tokens)
        x = zero_padding(x, mask)
        heads = split_heads(self.value(x), len(self.up.weight)).permute(2, 0, 1, 3)  # (H, B, N, K)
        hidden = F.leaky_relu(self.up(self.norm1(heads.flatten(2))), LEAK)
        mixed = self.down(self.norm2(hidden)).view(heads.shape).permute(1, 2, 0, 3)
        return zero_padding(self.readout(torch.cat((mixed.flatten(2), x), dim=-1)), mask)


class HeadNorm(nn.Module):
    """A LayerNorm a head: (H, B, size) -> (H, B, size); what is missing to the natural size counts as zeros."""

    def __init__(self, heads: int, size: int, natural: int) -> None:
        super().__init__()
        self.missing = natural - size
        self.weight, self.bias = (
            nn.Parameter(torch.ones(heads, 1, size)),
            nn.Parameter(torch.zeros(heads, 1, size)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (H, B, size) over its last dimension."""
        if self.missing:
            whole = F.pad(x, (0, self.missing))
            return F.layer_norm(whole, whole.shape[-1:])[..., : -self.missing] * self.weight + self.bias
        return F.layer_norm(x, x.shape[-1:]) * self.weight + self.bias


class HeadLinear(nn.Module):
    """A linear map a head, all in one batched product: (H, B, inputs) -> (H, B, outputs)."""

    def __init__(self, heads: int, inputs: int, outputs: int) -> None:
        super().__init__()
        bound = inputs**-0.5
        self.weight = nn.Parameter(torch.empty(heads, outputs, inputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(heads, 1, outputs).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        """Map x (H, B, inputs)."""
        return torch.baddbmm(self.bias, x, self.weight.mT)


def inherit_shallow_ffn_heads(mixer: ShallowFfnHeads, view: AttentionView) -> None:
    """Start near the teacher's attention with its mean maps: the S / 2 leading components of each head.

    A component is one of the map's times one of the values', in the basis in which the values of white noise are
    white noise too; for its two hidden units see `inherit_shallow_ffn`.
    """
    heads, tokens, _ = view.mean_attention.shape
    half = mixer.up.weight.shape[1] // 2
    u, s, vh = torch.linalg.svd(split_heads(view.v_weight, heads, 0).double(), full_matrices=False)
    out = split_heads(view.out_weight, heads).transpose(0, 1).double() @ (u * s.unsqueeze(1))  # (H, D, K)
    left, values, right = torch.linalg.svd(view.mean_attention.double())
    size = values.unsqueeze(2) * out.norm(dim=1).unsqueeze(1)  # (H, N, K)
    chosen = size.flatten(1).topk(min(half, size[0].numel()), dim=1).indices
    kept, rank = chosen.shape[1], out.shape[2]
    token, channel = chosen // rank, F.one_hot(chosen % rank, rank)  # (H, kept) and (H, kept, K)

    def pick(vectors: Tensor) -> Tensor:
        rows = vectors.gather(1, token.unsqueeze(2).expand(-1, -1, tokens))  # of (H, N, N), one a component
        both = rows.unsqueeze(3) * channel.unsqueeze(2)
        return both.flatten(2).to(mixer.up.weight)  # (H, kept, N*K)

    into, back = pick(right), pick((left * values.unsqueeze(1)).mT).mT / (1 + LEAK)
    mixer.up.bias.zero_()
    mixer.down.weight.zero_()
    mixer.down.bias.zero_()
    mixer.up.weight[:, :kept], mixer.up.weight[:, half : half + kept] = into, -into
    mixer.down.weight[..., :kept], mixer.down.weight[..., half : half + kept] = back, -back
    mixer.norm2.weight.fill_(SPREAD)
    mixer.value.weight.copy_(vh.flatten(0, 1))
    mixer.readout.weight.zero_()
    mixer.readout.weight[:, : heads * rank] = out.transpose(0, 1).flatten(1)
    mixer.readout.bias.copy_(view.out_bias + view.out_weight @ view.v_bias)


def shallow_ffn_heads_units(mixer: ShallowFfnHeads) -> dict[str, Units]:
    """Return the hidden units of each head."""
    heads, hidden, _ = mixer.up.weight.shape
    (own,) = places(hidden, units=0)
    parts = (
        ("up.weight", 1, True),
        ("up.bias", 2, False),
        ("norm2.weight", 2, False),
        ("norm2.bias", 2, False),
        ("down.weight", 2, True),
    )
    rows = tuple(
        tuple(
            Share(parameter=name, dim=dim, places=own, only=(0, head), counts=counts)
            for name, dim, counts in parts
        )
        for head in range(heads)
    )
    return {"hidden": Units(rows=rows, multiple=FEWEST)}


SHALLOW_FFN = MixerSpec(
    name="shallow_ffn",
    build=ShallowFfn,
    summary="a two-layer network over the flattened sequence, and the token itself",
    widths=(0.25, 1.0, 2.0),
    caps=Caps(masks=True, exportable=True),
    inherit=inherit_shallow_ffn,
    readout="readout",
    units=shallow_ffn_units,
    cost="N^2 D^2 / 128 + N D^2",
    paper="Rethinking Attention (ALR), arXiv 2311.10642",
    letter="F",
)

SHALLOW_FFN_HEADS = MixerSpec(
    name="shallow_ffn_heads",
    build=ShallowFfnHeads,
    summary="a two-layer network over each head's flattened values, and the token itself",
    widths=(0.25, 1.0, 2.0),
    caps=Caps(masks=True, exportable=True),
    inherit=inherit_shallow_ffn_heads,
    readout="readout",
    units=shallow_ffn_heads_units,
    cost="N^2 D K / 32 + N D^2",
    paper="Rethinking Attention (ALSR), arXiv 2311.10642",
    letter="Fh",
)
