"""What checks are made on: sites, what `inherit` is given, mixers and inputs. B batch, N tokens, D model width."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import nn

from mixerzoo.spec import AttentionView, MixerSpec, MlpView, Site, View
from mixerzoo.testing.demands import Mismatch

LENGTHS = (1, 5, 17, 33)

ATTENTION_SITE = Site(
    name="blocks.0.attn",
    kind="attention",
    index=0,
    stage=0,
    dim=12,
    heads=3,
    tokens=17,
    prefix=1,
    grid=(4, 4),
)
MLP_SITE = Site(
    name="blocks.0.mlp",
    kind="mlp",
    index=1,
    stage=0,
    dim=12,
    heads=1,
    tokens=17,
    prefix=1,
    grid=(4, 4),
    hidden=24,
    activation="gelu",
)
GATED_SITE = replace(MLP_SITE, activation="silu", gated=True)


def default_sites(spec: MixerSpec) -> tuple[Site, ...]:
    """Return the small sites that a mixer is checked on: one for each of its kinds, and a gated MLP if it asks."""
    sites = tuple(site for site in (ATTENTION_SITE, MLP_SITE) if site.kind in spec.kinds)
    return (*sites, GATED_SITE) if MLP_SITE in sites and "gated" in spec.asks else sites


def random_view(site: Site, seed: int = 0) -> View:
    """Return what `inherit` may be given at `site`, with random weights and random attention maps.

    The statistics are left empty: a mixer may use them, but has to do without.
    """
    generator = torch.Generator().manual_seed(seed)

    def weight(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) / math.sqrt(columns)

    def bias(size: int) -> torch.Tensor:
        return 0.1 * torch.randn(size, generator=generator)

    dim = site.dim
    if site.kind == "mlp":
        hidden = 4 * dim if site.hidden is None else site.hidden
        return MlpView(
            in_weight=weight(hidden, dim),
            in_bias=bias(hidden),
            out_weight=weight(dim, hidden),
            out_bias=bias(dim),
            importance=torch.rand(hidden, generator=generator),
            gate_weight=weight(hidden, dim) if site.gated else None,
            gate_bias=bias(hidden) if site.gated else None,
        )
    logits = 2 * torch.randn(site.heads, site.tokens, site.tokens, generator=generator)
    if site.causal:
        future = torch.ones(site.tokens, site.tokens, dtype=torch.bool).triu(1)
        logits = logits.masked_fill(future, float("-inf"))
    return AttentionView(
        q_weight=weight(dim, dim),
        q_bias=bias(dim),
        k_weight=weight(dim, dim),
        k_bias=bias(dim),
        v_weight=weight(dim, dim),
        v_bias=bias(dim),
        out_weight=weight(dim, dim),
        out_bias=bias(dim),
        mean_attention=logits.softmax(-1),
    )


def made(spec: MixerSpec, site: Site, width: float, seed: int = 0) -> nn.Module:
    """Return the mixer exactly as it is built, in eval mode."""
    torch.manual_seed(seed)
    mixer: object = spec.make(site, width)
    if not isinstance(mixer, nn.Module):
        raise Mismatch(f"expected build to return an nn.Module, found {type(mixer).__name__}")
    return mixer.eval()


def shaken(spec: MixerSpec, site: Site, width: float, *, causal: bool = False) -> nn.Module:
    """Return the mixer in float64 and eval mode, with noise added to its weights.

    A mixer may well start from zeros (a gate that is shut, a readout that is silent). That must not hide what
    it does later, nor count against it.
    """
    mixer = made(spec, replace(site, causal=causal), width).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, dtype=parameter.dtype, generator=generator))
    return mixer


def random_input(
    site: Site,
    *,
    batch: int = 2,
    tokens: int | None = None,
    dtype: torch.dtype = torch.float64,
    seed: int = 2,
) -> torch.Tensor:
    """Return an input (B, N, D) for `site`, with `tokens` instead of its own N if given."""
    generator = torch.Generator().manual_seed(seed)
    length = site.tokens if tokens is None else tokens
    return torch.randn(batch, length, site.dim, dtype=torch.float64, generator=generator).to(dtype)


def influence(mixer: nn.Module, site: Site) -> torch.Tensor:
    """Return (N, N): how much output token `column` changes, relatively, when input token `row` does."""
    n = site.tokens
    x = random_input(site, batch=1).repeat(n + 1, 1, 1)
    x[torch.arange(n), torch.arange(n)] += random_input(site, batch=1, seed=3)[0]
    with torch.no_grad():
        out: torch.Tensor = mixer(x)
    return (out[:n] - out[n:]).abs().amax(-1) / out.abs().max().clamp(min=1e-30)


def gradients_of(mixer: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor | None]:
    """Return the gradient of every trainable parameter; None where the loss does not depend on it."""
    named = {name: p for name, p in mixer.named_parameters() if p.requires_grad}
    if not named:
        return {}
    if not loss.requires_grad:
        return dict.fromkeys(named)
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True, retain_graph=True)
    return dict(zip(named, found, strict=True))
