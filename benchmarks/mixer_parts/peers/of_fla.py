"""flash-linear-attention's references in plain PyTorch, which its kernels are tested against.

They are read from their files: to import the package itself takes Triton.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixer_parts.peers.of_mambapy import SHORT
from mixer_parts.peers.peer import Around, Missing, Peer

CHUNK = 64


def naive(folder: Path | None, name: str) -> ModuleType:
    """Return ops/`name`/naive.py of the package in `folder`, or of the installed one.

    Raises:
        Missing: if there is none.
    """
    if folder is None:
        found = importlib.util.find_spec("fla")  # looks for the package, and does not import it
        places = list(found.submodule_search_locations or ()) if found else []
    else:
        places = [str(folder / "fla"), str(folder)]
    for place in places:
        path = Path(place) / "ops" / name / "naive.py"
        spec = importlib.util.spec_from_file_location(f"fla_{name}", path)
        if path.exists() and spec is not None and spec.loader is not None:
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module
    raise Missing("flash-linear-attention is not there: pip install --no-deps fla-core, or --fla")


def linear_attention(core: Callable[..., Any], mixer: Any, x: Tensor) -> Tensor:
    """Compute causal linear attention by fla's function; it takes (B, N, H, R)."""
    q, k, v = mixer.qkv(x).unflatten(-1, (3, mixer.heads, -1)).unbind(2)
    tokens = x.shape[1]
    q, k, v = (F.pad(t, (0, 0, 0, 0, 0, -tokens % CHUNK)) for t in (F.elu(q) + 1, F.elu(k) + 1, v))
    mixed = core(q, k, v, scale=1.0, normalize=True)
    mixed = (mixed[0] if isinstance(mixed, tuple) else mixed)[:, :tokens]
    y: Tensor = mixer.readout(torch.cat((mixed.flatten(2), x), dim=-1))
    return y


def retention(core: Callable[..., Any], mixer: Any, x: Tensor) -> Tensor:
    """Compute causal retention by fla's function; it takes (B, H, N, R), scales by R^-0.5 and knows no denominator.

    Its decays are those of the paper: the mixer must have them, too.
    """
    q, k, v = mixer.qkv(x).unflatten(-1, (3, mixer.heads, -1)).permute(2, 0, 3, 1, 4)
    long, far = (t.square().sum(dim=-1, keepdim=True).add(1e-6).sqrt() for t in (q, k))
    one = torch.ones_like(long)
    undone = (q.shape[-1] + 1) ** 0.5
    y = core(undone * torch.cat((mixer.scale * q, one), dim=-1), torch.cat((k, one), dim=-1), v)
    mass, reach = core(one, one, torch.cat((one, far), dim=-1)).chunk(2, dim=-1)
    mixed = (y / (mass + mixer.scale * long * reach)).transpose(1, 2).flatten(2)
    out: Tensor = mixer.readout(torch.cat((mixed, x), dim=-1))
    return out


def with_the_papers_decays(mixer: Any) -> Any:
    """Give a retention mixer the decays that fla's function has, in place."""
    gaps = 2.0 ** (-5 - torch.arange(mixer.heads, dtype=torch.double))
    with torch.no_grad():
        mixer.log_rate.copy_((-torch.log1p(-gaps)).log())
    return mixer


def gated_delta(core: Callable[..., Any], mixer: Any, x: Tensor) -> Tensor:
    """Compute the causal gated delta rule by fla's function; it takes (B, N, H, R)."""
    q, k, v = mixer.qkv(x).unflatten(-1, (3, mixer.heads, -1)).unbind(2)
    q, k = (t * torch.rsqrt(t.square().sum(dim=-1, keepdim=True) + 1e-6) for t in (q, k))
    write, forget = mixer.gates(x).chunk(2, dim=-1)
    mixed = core(q, k, v, beta=write.sigmoid(), g=-F.softplus(forget), scale=1.0)[0]
    y: Tensor = mixer.readout(torch.cat((mixed.flatten(2), x), dim=-1))
    return y


def peers(folder: Path | None = None) -> list[Peer]:
    """Return the peers, read from `folder` or from the installed package."""

    def make(
        mixer: nn.Module,
        *,
        name: str,
        function: str,
        way: Callable[..., Tensor],
        change: Callable[[Any], Any] = lambda mixer: mixer,
    ) -> nn.Module:
        return Around(change(mixer), partial(way, getattr(naive(folder, name), function)))

    def peer(mixer: str, label: str, trains_up_to: int | None = None, **how: Any) -> Peer:
        making = partial(make, **how)
        return Peer(mixer=mixer, label=f"fla's {label}", make=making, causal=True, trains_up_to=trains_up_to)

    linear = partial(peer, "linear_attention", name="linear_attn", way=linear_attention)
    delta = partial(peer, "gated_delta", name="gated_delta_rule", way=gated_delta)
    return [
        linear("naive loop", function="naive_recurrent_linear_attn"),
        linear("naive chunks", function="naive_chunk_linear_attn"),
        peer(
            "retention",
            "naive retention",
            name="retention",
            function="naive_retention",
            way=retention,
            change=with_the_papers_decays,
        ),
        delta("naive loop", function="naive_recurrent_gated_delta_rule", trains_up_to=SHORT),
        delta("naive chunks", function="naive_chunk_gated_delta_rule"),
    ]
