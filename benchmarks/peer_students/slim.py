"""Smaller modules of the teacher's own kind: attention of any number of heads and head width, MLPs of any width."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from mixerzoo.hosts import Teacher
from mixerzoo.plan import Candidate
from mixerzoo.registry import get_registry
from mixerzoo.spec import Site, View
from mixerzoo.student import make_replacement

MULTIPLE = 8  # hidden units of an MLP are a multiple of it


class SlimAttention(nn.Module):
    """Softmax attention whose heads need not fill the model width. (B, N, D) -> (B, N, D)."""

    def __init__(self, dim: int, heads: int, width: int, scale: float) -> None:
        super().__init__()
        self.num_heads, self.scale = heads, scale
        self.qkv = nn.Linear(dim, 3 * heads * width)
        self.proj = nn.Linear(heads * width, dim)

    def forward(
        self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False
    ) -> torch.Tensor:
        """Mix x (B, N, D); the head width is read off the weights, which may have been pruned."""
        B, N, _ = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask, is_causal=is_causal, scale=self.scale)
        out: torch.Tensor = self.proj(y.transpose(1, 2).reshape(B, N, -1))
        return out


@torch.no_grad()
def as_slim(teacher: Teacher, site: Site) -> SlimAttention:
    """Return the teacher's attention at a site, whole; there must be no norms inside."""
    weights = teacher.host.weights(teacher.model.get_submodule(site.name), site)
    K = len(weights["q_weight"]) // site.heads
    slim = SlimAttention(site.dim, site.heads, K, K**-0.5)
    slim.qkv.weight.copy_(torch.cat([weights[f"{letter}_weight"] for letter in "qkv"]))
    slim.qkv.bias.copy_(torch.cat([weights[f"{letter}_bias"] for letter in "qkv"]))
    slim.proj.weight.copy_(weights["out_weight"])
    slim.proj.bias.copy_(weights["out_bias"])
    return slim.eval().requires_grad_(False)


@torch.no_grad()
def fewer_heads(site: Site, view: View, heads: int) -> SlimAttention:
    """Return attention with some of the teacher's heads, as the mixer `fewer_heads` inherits them.

    That mixer also has the token itself as a feature, which it does not use as inherited: here it is left out.
    """
    spec = get_registry().mixers.get("fewer_heads")
    mixer = spec.make(site, 1.0, {"heads": heads})
    assert spec.inherit is not None
    spec.inherit(mixer, view)
    qkv, readout = mixer.get_submodule("qkv"), mixer.get_submodule("readout")
    assert isinstance(qkv, nn.Linear)
    assert isinstance(readout, nn.Linear)
    K = qkv.out_features // (3 * heads)
    slim = SlimAttention(site.dim, heads, K, K**-0.5)
    slim.qkv.load_state_dict(qkv.state_dict())
    slim.proj.weight.copy_(readout.weight[:, : heads * K])
    slim.proj.bias.copy_(readout.bias)
    return slim.eval().requires_grad_(False)


def mlp_levels(sites: tuple[Site, ...]) -> int:
    """Return how many widths MLPs can have: the whole one, and each that is a multiple of some units smaller."""
    return max((site.hidden // MULTIPLE for site in sites if site.hidden), default=1)


def narrow_mlp(site: Site, share: float) -> Candidate | None:
    """Return the candidate with a share of the hidden units of an mlp site, or None where that is all of them."""
    assert site.hidden is not None
    kept = max(MULTIPLE, round(site.hidden * share / MULTIPLE) * MULTIPLE)
    return None if kept >= site.hidden else Candidate("mlp_slice", kept / site.hidden)


@torch.no_grad()
def inherited(candidate: Candidate, site: Site, view: View) -> nn.Module:
    """Return a candidate as it inherits, and no more."""
    replacement = make_replacement(candidate, site)
    spec = get_registry().mixers.get(candidate.mixer)
    assert spec.inherit is not None
    spec.inherit(replacement.mixer, view)
    return replacement
