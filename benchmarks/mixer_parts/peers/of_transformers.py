"""transformers: Mamba and Mamba-2 as they run where the CUDA kernels are not installed, and FNet's transform."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixer_parts.peers.of_mambapy import SHORT, BothWays
from mixer_parts.peers.peer import Around, Missing, Peer
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


def make_mamba2(mixer: nn.Module) -> nn.Module:
    """Do Mamba-2's scan by mamba2_chunk_scan, once a direction, and the convolution as Mamba2Mixer does."""
    guard_torchvision()
    try:
        from transformers import Mamba2Config
        from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan
    except ImportError:
        raise Missing("transformers is not installed: pip install transformers") from None
    chunk = Mamba2Config().chunk_size

    def way(mixer: Any, x: Tensor) -> Tensor:
        z, u, step = mixer.in_proj(x).split(mixer.sizes, dim=-1)
        u = F.silu(mixer.conv1d(u.mT)[..., : x.shape[1]].mT)
        inputs = [t.unflatten(-1, (mixer.heads, -1)) for t in u.split(mixer.parts, dim=-1)]
        step = step.unflatten(-1, (mixer.heads, -1))
        bias, log_a, skip = (t.view(mixer.heads, -1).mT for t in (mixer.dt_bias, mixer.A_log, mixer.D))
        ys = []
        for back in range(mixer.ways):
            v, k, q, dt = (t.flip(1) if back else t for t in (*inputs, step[..., back]))
            a = -log_a[back].exp()
            kept = {"D": skip[back], "dt_bias": bias[back], "dt_softplus": True}
            y = mamba2_chunk_scan(v, dt, a, k, q, chunk, **kept)
            ys.append(y.flip(1) if back else y)
        features = mixer.norm(torch.stack(ys, dim=3), z)
        out: Tensor = mixer.readout(torch.cat((features, x), dim=-1))
        return out

    return Around(mixer, way)


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
    Peer(mixer="mamba2", label="transformers' mamba2_chunk_scan", make=make_mamba2),
    Peer(mixer="mamba", label="transformers' MambaMixer", make=make_mamba, trains_up_to=SHORT),
]
