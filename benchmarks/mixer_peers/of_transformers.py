"""transformers: Mamba and Mamba-2 as they run where the CUDA kernels are not installed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mixer_peers.of_mambapy import SHORT, BothWays
from mixer_peers.peer import Around, Missing, Peer
from mixerzoo.compat import guard_torchvision


def make_mamba(mixer: nn.Module) -> nn.Module:
    """Make MambaMixer's with the mixer's weights."""
    guard_torchvision()
    try:
        from transformers import MambaConfig, logging
        from transformers.models.mamba.modeling_mamba import MambaMixer
    except ImportError:
        raise Missing("transformers is not installed: pip install transformers") from None
    logging.set_verbosity_error()

    def block(ours: Any, dim: int) -> nn.Module:
        inner, states = ours.A_log.shape
        config = MambaConfig(hidden_size=dim, state_size=states, num_hidden_layers=1)
        config.intermediate_size = inner
        theirs: nn.Module = MambaMixer(config, layer_idx=0)
        theirs.load_state_dict(ours.state_dict())
        return theirs

    return BothWays(mixer, block)


def make_fnet(mixer: Any) -> nn.Module:
    """Make FNetBasicFourierTransform; it has no scale."""
    guard_torchvision()
    try:
        from transformers import FNetConfig
        from transformers.models.fnet.modeling_fnet import FNetBasicFourierTransform
    except ImportError:
        raise Missing("transformers is not installed: pip install transformers") from None
    transform = FNetBasicFourierTransform(FNetConfig())

    def way(mixer: Any, x: Tensor) -> Tensor:
        value = mixer.value(x)
        scale = (value.shape[1] * value.shape[2]) ** -0.5
        y: Tensor = mixer.readout(torch.cat((transform(value)[0] * scale, x), dim=-1))
        return y

    return Around(mixer, way)


PEERS = [
    Peer(mixer="fnet", label="transformers' FNet transform", make=make_fnet),
    Peer(mixer="mamba", label="transformers' MambaMixer", make=make_mamba, trains_up_to=SHORT),
]
