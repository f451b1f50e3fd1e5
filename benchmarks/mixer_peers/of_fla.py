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

from mixer_peers.peer import Around, Missing, Peer

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


def peers(folder: Path | None = None) -> list[Peer]:
    """Return the peers, read from `folder` or from the installed package."""

    def make(mixer: nn.Module, *, name: str, function: str, way: Callable[..., Tensor]) -> nn.Module:
        return Around(mixer, partial(way, getattr(naive(folder, name), function)))

    def peer(mixer: str, label: str, name: str, function: str, way: Callable[..., Tensor]) -> Peer:
        making = partial(make, name=name, function=function, way=way)
        return Peer(mixer=mixer, label=f"fla's {label}", make=making, causal=True)

    linear = partial(peer, "linear_attention", name="linear_attn", way=linear_attention)
    return [
        linear("naive loop", function="naive_recurrent_linear_attn"),
        linear("naive chunks", function="naive_chunk_linear_attn"),
    ]
