"""Mixers whose state is a matrix that forgets: retention and the gated delta rule, in both directions.

Shapes: B batch, N tokens, D model width, H heads, K head width of the teacher, R head width of the mixer, W
directions (2, or 1 if causal), G chunks of C tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixerzoo import AttentionView, Caps, MixerSpec
from mixerzoo_mixers._chunked import (
    carry,
    chunk_size,
    cut,
    join,
    kept,
    mean_rates,
    softplus_inverse,
    spread_steps,
    triangle,
)
from mixerzoo_mixers._parts import (
    at_least_float,
    head_width,
    inherit_qkv,
    qkv_heads,
    split_heads,
    zero_padding,
)

EPS = 1e-6
SHY = -4.0  # logit of the strength that the gated delta rule writes with when it starts from a teacher


# -- retention --


def retain(q: Tensor, k: Tensor, v: Tensor, rate: Tensor, causal: bool) -> Tensor:
    """Return sum_m exp(-rate |n - m|) (q_n . k_m) v_m, over m <= n if causal.

    q, k (B, H, N, F), v (B, H, N, R), rate (H,); returns (B, H, G, C, R), the chunks of (B, H, N, R).
    """
    size = chunk_size(q.shape[2])
    q, k, v = (cut(t, size) for t in (q, k, v))
    place = torch.arange(size, dtype=rate.dtype, device=rate.device)
    rate = rate.view(-1, 1, 1, 1)
    near = (-rate * (place.unsqueeze(-1) - place).abs()).exp()
    y = q @ k.mT * (near.tril() if causal else near) @ v
    if q.shape[2] == 1:
        return y
    # From the last token before a chunk to each of it, and from each to the last of it.
    enter, leave = ((-rate * d.unsqueeze(-1)).exp() for d in (place + 1, size - 1 - place))
    total = (-size * rate[..., 0, 0]).expand(-1, q.shape[2])
    for back in (False,) if causal else (False, True):
        if back:
            enter, leave = enter.flip(2), leave.flip(2)
        ends = (leave * k).mT @ v
        y = y + (enter * q) @ carry(ends.flatten(-2), total, back).view_as(ends)
    return y


class Retention(nn.Module):
    """Retention with a decay of |n - m| a head. (B, N, D) -> (B, N, D).

    a_n = sum_m w_nm (1 + s_nm) v_m / sum_m w_nm (1 + |q_n| |k_m| / sqrt(K)), with w_nm = exp(-r |n - m|) and
    s_nm = q_n.k_m / sqrt(K); y_n = W [a_hn for all h; x_n] + b. If causal, m <= n. r, positive, is learnt a head,
    by its logarithm; it starts from the paper's gamma = exp(-r) = 1 - 2^(-5 - h).

    What differs from the paper: the denominator in place of the group norm, which keeps |a_n| below the largest
    |v_m|; the 1, which makes 1 + s of softmax's exp(s); no rotation of q and k, as the teacher's tokens know their
    places; no gate. On the embedded teacher, each of the first two left a lower error in nearly every layer.
    """

    def __init__(self, dim: int, heads: int, width: float, causal: bool) -> None:
        super().__init__()
        rank = head_width(dim, heads, width)
        self.heads, self.causal = heads, causal
        self.scale = (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * heads * rank)
        gaps = 2.0 ** (-5 - torch.arange(heads, dtype=torch.double))
        self.log_rate = nn.Parameter((-torch.log1p(-gaps)).log().to(torch.get_default_dtype()))
        self.readout = nn.Linear(heads * rank + dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mix x (B, N, D); where mask (B, N) is False, a token is not attended to, but keeps its place."""
        x = zero_padding(x, mask)
        q, k, v = qkv_heads(self.qkv(x), self.heads)
        rate = at_least_float(self.log_rate).exp()
        one = torch.ones_like(q[..., :1])
        seen = one if mask is None else one * mask[:, None, :, None]
        long, far = (t.square().sum(dim=-1, keepdim=True).add(EPS).sqrt() for t in (q, k))
        k = torch.cat((k, one), dim=-1) * seen
        y = retain(torch.cat((self.scale * q, one), dim=-1), k, v, rate, self.causal)
        mass, reach = retain(one, seen, torch.cat((one, far), dim=-1), rate, self.causal).chunk(2, dim=-1)
        bound = mass + self.scale * cut(long, y.shape[3]) * reach
        # Only what was filled up, or sees no token, has no mass.
        mixed = join(y / bound.clamp(min=EPS), x.shape[1]).to(x.dtype)
        out: Tensor = self.readout(torch.cat((mixed, x), dim=-1))
        return out


def inherit_retention(mixer: Retention, view: AttentionView) -> None:
    """Start with the teacher's projections, and as far-sighted as its mean maps are."""
    inherit_qkv(view, mixer.qkv, mixer.readout, mixer.heads)
    mixer.log_rate.copy_(mean_rates(view.mean_attention, mixer.causal).log())


RETENTION = MixerSpec(
    name="retention",
    build=Retention,
    summary="retention with a learnt decay a head, and the token itself",
    widths=(0.5, 1.0),
    caps=Caps(any_length=True, causal=True, masks=True, exportable=True),
    inherit=inherit_retention,
    readout="readout",
    cost="N D^2 + N D K",
    paper="RetNet, arXiv 2307.08621, in both directions",
    letter="Rt",
)


# -- the gated delta rule --


def delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor) -> Tensor:
    """Return o_n = S_n^T q_n, with T_n = e^decay_n S_(n-1) and S_n = T_n + k_n (beta_n (v_n - T_n^T k_n))^T.

    q, k, v are (B, H, N, R), beta and decay, never above 0, (B, H, W, N); the second direction goes from the last
    token to the first. Returns (B, H, W, G, C, R), the chunks of (B, H, W, N, R). Within a chunk, what the tokens
    write follows from all that came before them, by one triangular system (the WY form of the paper).
    """
    size, width = chunk_size(q.shape[2]), v.shape[3]
    q, k, v = (cut(t, size) for t in (q, k, v))
    betas, decays = (cut(t.mT, size).unbind(dim=4) for t in (beta, decay))
    asked, known = q @ k.mT, k @ k.mT
    eye = torch.eye(width, dtype=k.dtype, device=k.device)

    def one_way(beta: Tensor, decay: Tensor, back: bool) -> Tensor:
        left = kept(decay, back)
        seen = (left.unsqueeze(-1) - left.unsqueeze(-2) + triangle(size, left, back)).exp()
        beta, left = beta.unsqueeze(-1), left.unsqueeze(-1)
        grown = left.exp()
        # What is written, were there nothing before the chunk, and what each state before it takes from that.
        wanted = beta * torch.cat((v, grown * k), dim=-1)
        coupled = beta * known * seen
        written: Tensor = torch.linalg.solve_triangular(coupled, wanted, upper=back, unitriangular=True)
        mixed = (asked * seen) @ written
        if q.shape[2] == 1:
            return mixed[..., :width]
        total = left[..., :1, :] if back else left[..., -1:, :]
        made = ((total - left).exp() * k).mT @ written
        before = affine_scan(total.exp() * eye - made[..., width:], made[..., :width], back)
        return mixed[..., :width] + (grown * q - mixed[..., width:]) @ before

    ways = zip(betas, decays, (False, True), strict=False)
    return torch.stack([one_way(b, d, back) for b, d, back in ways], dim=2)


def affine_scan(maps: Tensor, added: Tensor, back: bool) -> Tensor:
    """Return S_g = maps_(g-1) S_(g-1) + added_(g-1) for every g, S_0 = 0; from the last on if `back`.

    All are (B, H, G, R, R).
    """
    steps = list(zip(*(t.flatten(0, 1).unbind(dim=1) for t in (maps, added)), strict=True))
    states = [torch.zeros_like(steps[0][1])]
    for a, b in steps[:0:-1] if back else steps[:-1]:
        states.append(torch.baddbmm(b, a, states[-1]))
    return torch.stack(states[::-1] if back else states, dim=1).view_as(added)


class GatedDelta(nn.Module):
    """The gated delta rule in both directions. (B, N, D) -> (B, N, D).

    A head's state S (R, R) forgets and then corrects what it answers to k_n: S = e^g_n S,
    S = S + k_n (beta_n (v_n - S^T k_n))^T, o_n = S^T q_n. One state goes forward and, unless causal, another one
    back: y_n = W [o_n of head 0 forward, head 0 back, head 1 forward, ...; x_n] + b. q and k have length 1; the
    directions share q, k and v; beta = sigmoid(.) and g = -softplus(.) of linear maps of x are their own.

    What differs from the paper: no short convolutions, output norm and output gate, which a teacher's q, k and v
    have no use for; o needs no norm, as corrected states stay small; g has its bias inside and no factor.
    """

    def __init__(self, dim: int, heads: int, width: float, causal: bool) -> None:
        super().__init__()
        rank = head_width(dim, heads, width)
        self.heads, self.ways = heads, 1 if causal else 2
        self.qkv = nn.Linear(dim, 3 * heads * rank)
        self.gates = nn.Linear(dim, 2 * heads * self.ways)
        self.readout = nn.Linear(heads * self.ways * rank + dim, dim)
        with torch.no_grad():
            write, forget = self.gates.bias.chunk(2)
            write.zero_()
            forget.copy_(softplus_inverse(spread_steps(len(forget))))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mix x (B, N, D); tokens where mask (B, N) is False are passed over."""
        x = zero_padding(x, mask)
        q, k, v = qkv_heads(self.qkv(x), self.heads)
        q, k = (t * torch.rsqrt(t.square().sum(dim=-1, keepdim=True) + EPS) for t in (q, k))
        write, forget = at_least_float(self.gates(x)).chunk(2, dim=-1)
        beta, decay = (
            zero_padding(t, mask).mT.unflatten(1, (self.heads, self.ways))
            for t in (write.sigmoid(), -F.softplus(forget))
        )
        y = delta_rule(q, k, v, beta, decay)
        mixed = join(y.flatten(1, 2), x.shape[1]).to(x.dtype)
        out: Tensor = self.readout(torch.cat((mixed, x), dim=-1))
        return out


def inherit_gated_delta(mixer: GatedDelta, view: AttentionView) -> None:
    """Start with the teacher's projections, the directions averaged, and as far-sighted as its mean maps are.

    Little is written at first: before its overlaps are learnt, a rule that corrects is worse than one that adds.
    """
    readout = mixer.readout
    dim, heads, ways = readout.out_features, mixer.heads, mixer.ways
    own = mixer.qkv.out_features // 3
    plain = nn.Linear(own + dim, dim, device=readout.weight.device, dtype=readout.weight.dtype)
    inherit_qkv(view, mixer.qkv, plain, heads)
    readout.weight.zero_()
    both = readout.weight[:, : ways * own].view(dim, heads, ways, -1)
    both.copy_(split_heads(plain.weight[:, :own], heads).unsqueeze(2) / ways)
    readout.bias.copy_(plain.bias)
    mixer.gates.weight.zero_()
    write, forget = mixer.gates.bias.chunk(2)
    write.fill_(SHY)
    rates = mean_rates(view.mean_attention, ways == 1)
    forget.copy_(softplus_inverse(rates).repeat_interleave(ways))


GATED_DELTA = MixerSpec(
    name="gated_delta",
    build=GatedDelta,
    summary="the gated delta rule in both directions, and the token itself",
    widths=(0.5, 1.0),
    caps=Caps(any_length=True, causal=True, masks=True),
    inherit=inherit_gated_delta,
    readout="readout",
    cost="N D^2 + N D K, 64 tokens after the other",
    paper="Gated DeltaNet, arXiv 2412.06464, in both directions",
    letter="Gd",
)
