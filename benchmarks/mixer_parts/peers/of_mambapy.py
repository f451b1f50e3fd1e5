"""mambapy: Mamba's selective scan in plain PyTorch, one token after the other or as a parallel scan."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mixer_parts.peers.peer import Missing, Peer

SHORT = 300


class BothWays(nn.Module):
    """Two blocks, the second on the reversed sequence, read out together with x. (B, N, D) -> (B, N, D)."""

    def __init__(self, mixer: Any, block: Callable[[Any, int], nn.Module]) -> None:
        super().__init__()
        dim = mixer.readout.out_features
        self.ahead = block(mixer.ahead, dim)
        self.back = None if mixer.back is None else block(mixer.back, dim)
        self.readout = copy.deepcopy(mixer.readout)

    def forward(self, x: Tensor) -> Tensor:
        """Mix x (B, N, D)."""
        features = [self.ahead(x)]
        if self.back is not None:
            features.append(self.back(x.flip(1)).flip(1))
        y: Tensor = self.readout(torch.cat((*features, x), dim=-1))
        return y


def make(mixer: nn.Module, *, pscan: bool) -> nn.Module:
    """Make mambapy's blocks with the mixer's weights."""
    try:
        from mambapy.mamba import MambaBlock, MambaConfig
    except ImportError:
        raise Missing("mambapy is not installed: pip install mambapy") from None

    def block(ours: Any, dim: int) -> nn.Module:
        config = MambaConfig(d_model=dim, n_layers=1, d_state=ours.A_log.shape[1], pscan=pscan)
        config.d_inner = ours.D.numel()
        theirs: nn.Module = MambaBlock(config)
        theirs.load_state_dict(ours.state_dict())
        return theirs

    return BothWays(mixer, block)


PEERS = [
    Peer(
        mixer="mamba",
        label="mambapy, sequential",
        make=partial(make, pscan=False),
        trains_up_to=SHORT,  # each step's backward pass fills a tensor as large as all steps'
    ),
    Peer(mixer="mamba", label="mambapy, parallel scan", make=partial(make, pscan=True)),
]
