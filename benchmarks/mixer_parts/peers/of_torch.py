"""PyTorch itself: a loop of nn.LSTM, and scaled_dot_product_attention with masks."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixer_parts.peers.peer import Around, Peer

REACH = 32  # of `window`


def lstm_loop(mixer: Any, x: Tensor) -> Tensor:
    """Run the heads' LSTMs one after the other."""
    parts = mixer.pre_proj(x).chunk(len(mixer.lstm), dim=-1)
    mixed = [proj(lstm(part)[0]) for lstm, proj, part in zip(mixer.lstm, mixer.head_proj, parts, strict=True)]
    y: Tensor = mixer.post_proj(torch.cat(mixed, dim=-1))
    return y


def make_lstm(mixer: nn.Module) -> nn.Module:
    """Make a loop of nn.LSTM."""
    return Around(mixer, lstm_loop)


def heads_of(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split (B, N, 3 * H * R) into q, k and v, (B, H, N, R) each."""
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return q, k, v


@cache
def band(tokens: int, prefix: int, reach: int, causal: bool) -> Tensor:
    """Return who sees whom, (N, N): those at most `reach` away; the prefix sees all and is seen by all."""
    place = torch.arange(tokens)
    away = place[:, None] - place
    first = place < prefix
    seen = (away.abs() <= reach) | first | first[:, None]
    return seen & (away >= 0) if causal else seen


def band_attention(mixer: Any, x: Tensor) -> Tensor:
    """Attend to the band, as a mask."""
    q, k, v = heads_of(mixer.qkv(x), mixer.heads)
    mask = band(x.shape[1], mixer.prefix, REACH, mixer.causal)
    mixed = F.scaled_dot_product_attention(q, k, v, mask, scale=mixer.scale)
    y: Tensor = mixer.readout(torch.cat((mixed.transpose(1, 2).flatten(2), x), dim=-1))
    return y


def make_band(mixer: nn.Module) -> nn.Module:
    """Make attention with a band as its mask."""
    return Around(mixer, band_attention)


PEERS = [
    Peer(mixer="window", label="SDPA, band as a mask", make=make_band),
    Peer(mixer="window", label="SDPA, band as a mask", make=make_band, causal=True),
    Peer(mixer="multihead_lstm", label="nn.LSTM, one a head", make=make_lstm),
    Peer(mixer="multihead_lstm", label="nn.LSTM, one a head", make=make_lstm, causal=True),
]
