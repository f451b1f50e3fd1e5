"""Shared by the tests of the built-in mixers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import mixerzoo_mixers
from mixerzoo import AttentionView, MixerSpec, MlpView, Site

_SPECS: list[MixerSpec] = []
mixerzoo_mixers.register_mixers(_SPECS.append)
SPECS = {spec.name: spec for spec in _SPECS}


def site(spec: MixerSpec, **changes: Any) -> Site:
    """A small site that `spec` can stand at; its grid is the least oblong one that its tokens make."""
    fields: dict[str, Any] = {
        "name": "blocks.0",
        "kind": sorted(spec.kinds)[0],
        "index": 0,
        "stage": 0,
        "dim": 12,
        "heads": 3,
        "tokens": 5,
        "hidden": 40,
        "activation": "gelu",
    }
    fields |= changes
    fields["prefix"] = min(fields.get("prefix", 0), fields["tokens"] - 1)
    cells = fields["tokens"] - fields["prefix"]
    rows = max(r for r in range(1, math.isqrt(cells) + 1) if cells % r == 0)
    return Site(**{"grid": (rows, cells // rows), **fields})


def draw_mask(batch: int, tokens: int) -> Tensor:
    """Real tokens anywhere, at least one a sample."""
    mask = torch.rand(batch, tokens) < 0.6
    mask[torch.arange(batch), torch.randint(tokens, (batch,))] = True
    return mask


def attention_view(dim: int, heads: int, tokens: int, *, causal: bool = False) -> AttentionView:
    """A random teacher's attention, in float64."""

    def weight(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.double) / shape[-1] ** 0.5

    scores = torch.randn(heads, tokens, tokens, dtype=torch.double)
    if causal:
        ahead = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
        scores = scores.masked_fill(ahead, -torch.inf)
    return AttentionView(
        q_weight=weight(dim, dim),
        q_bias=weight(dim),
        k_weight=weight(dim, dim),
        k_bias=weight(dim),
        v_weight=weight(dim, dim),
        v_bias=weight(dim),
        out_weight=weight(dim, dim),
        out_bias=weight(dim),
        mean_attention=scores.softmax(dim=-1),
    )


def mlp_view(dim: int, hidden: int) -> MlpView:
    """A random teacher's MLP, in float64."""
    return MlpView(
        in_weight=torch.randn(hidden, dim, dtype=torch.double) / dim**0.5,
        in_bias=torch.randn(hidden, dtype=torch.double),
        out_weight=torch.randn(dim, hidden, dtype=torch.double) / hidden**0.5,
        out_bias=torch.randn(dim, dtype=torch.double),
        importance=torch.rand(hidden, dtype=torch.double),
    )
