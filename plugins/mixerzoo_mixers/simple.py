"""The cheapest mixers: `linear` and `none` do not mix at all, `pool` mixes only through means."""

from __future__ import annotations

import torch
from einops import einsum, rearrange
from torch import Tensor, nn

from mixerzoo import AttentionView, Caps, MixerSpec
from mixerzoo_mixers._parts import at_least_float, read_out, zero_padding


class TokenLinear(nn.Module):
    """One linear map for every token: y_n = W x_n + b. (B, N, D) -> (B, N, D)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.readout = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map x (B, N, D); the mask changes nothing, tokens do not meet."""
        y: Tensor = self.readout(x)
        return y


def inherit_linear(mixer: TokenLinear, view: AttentionView) -> None:
    """Start from attention in which every token sees only itself: W = W_out W_v."""
    mixer.readout.weight.copy_(view.out_weight @ view.v_weight)
    mixer.readout.bias.copy_(view.out_weight @ view.v_bias + view.out_bias)


class Nothing(nn.Module):
    """y = 0: the residual stream goes on as it is. (B, N, D) -> (B, N, D)."""

    def __init__(self) -> None:
        super().__init__()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return zeros like x (B, N, D)."""
        if x.requires_grad:
            # Zeros that stay part of the graph, so that training code needs no exception for them.
            return x.masked_fill(torch.ones((), dtype=torch.bool, device=x.device), 0)
        return torch.zeros_like(x)


class Pool(nn.Module):
    """Each token meets only the first token and the mean: y_n = W [x_n; x_first; mean_m x_m] + b.

    (B, N, D) -> (B, N, D) in O(N D^2). The first token is left out where it is nothing special (no prefix, not
    causal). If causal, the mean is the running one, over m <= n.
    """

    def __init__(self, dim: int, prefix: int, causal: bool) -> None:
        super().__init__()
        self.first = prefix > 0 or causal
        self.causal = causal
        self.readout = nn.Linear((3 if self.first else 2) * dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mix x (B, N, D); where mask (B, N) is False, a token counts for neither feature."""
        x = zero_padding(x, mask)
        if self.causal:
            running = self._running_mean(x, mask)
            return read_out(self.readout, torch.cat((x, running), dim=-1), self._first(x, mask))
        if mask is None:
            mean = x.mean(dim=1, keepdim=True)
        else:
            mean = x.sum(dim=1, keepdim=True) / mask.sum(dim=1).clamp(min=1)[:, None, None].to(x.dtype)
        shared = torch.cat((self._first(x, mask), mean), dim=-1) if self.first else mean
        return read_out(self.readout, x, shared)

    @staticmethod
    def _first(x: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None:
            return x[:, :1]
        place = mask.int().argmax(dim=1)  # the first real token
        return x.gather(1, place[:, None, None].expand(-1, 1, x.shape[2]))

    @staticmethod
    def _running_mean(x: Tensor, mask: Tensor | None) -> Tensor:
        ones = torch.ones_like(x[:, :, 0], dtype=torch.bool) if mask is None else mask
        total = at_least_float(x).cumsum(dim=1)
        return (total / ones.cumsum(dim=1).clamp(min=1).unsqueeze(-1).to(total.dtype)).to(x.dtype)


def inherit_pool(mixer: Pool, view: AttentionView) -> None:
    """Share out each head's mean attention between the token itself, the first token and all the others."""
    attention = view.mean_attention
    heads, dim = attention.shape[0], view.out_weight.shape[0]
    own = attention.diagonal(dim1=1, dim2=2).mean(dim=1)
    first = attention[:, 1:, 0].mean(dim=1) if attention.shape[1] > 1 else torch.zeros_like(own)
    first = first if mixer.first else torch.zeros_like(first)
    out = rearrange(view.out_weight, "d (h k) -> h d k", h=heads)
    value = rearrange(view.v_weight, "(h k) d -> h k d", h=heads)

    def weight(share: Tensor) -> Tensor:
        return einsum(share, out, value, "h, h d k, h k e -> d e")

    # The order is that of forward: [token, running mean, first] if causal, else [token, first, mean].
    parts = [weight(own), weight(first), weight(1 - own - first)]
    if mixer.causal:
        parts[1], parts[2] = parts[2], parts[1]
    elif not mixer.first:
        del parts[1]
    mixer.readout.weight.copy_(torch.cat(parts, dim=1).view(dim, -1))
    mixer.readout.bias.copy_(view.out_weight @ view.v_bias + view.out_bias)


LINEAR = MixerSpec(
    name="linear",
    build=TokenLinear,
    summary="one linear map for every token, no mixing",
    caps=Caps(any_length=True, causal=True, masks=True, exportable=True, per_token=True),
    inherit=inherit_linear,
    readout="readout",
    cost="N D^2",
    paper="Puzzle, arXiv 2411.19146",
    letter="L",
)

NONE = MixerSpec(
    name="none",
    build=Nothing,
    summary="nothing at all: the residual stream goes on unchanged",
    kinds={"attention", "mlp"},
    caps=Caps(any_length=True, causal=True, masks=True, exportable=True, per_token=True),
    cost="0",
    paper="MLP Can Be a Good Transformer Learner, arXiv 2404.05657; Puzzle, arXiv 2411.19146",
    letter="N",
)

POOL = MixerSpec(
    name="pool",
    build=Pool,
    summary="each token, the first token and the mean of all tokens, read out linearly",
    caps=Caps(any_length=True, causal=True, masks=True, exportable=True),
    inherit=inherit_pool,
    readout="readout",
    cost="N D^2",
    paper="in the spirit of PoolFormer, arXiv 2111.11418, with global means in place of local ones",
    letter="P",
)
