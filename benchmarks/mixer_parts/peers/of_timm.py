"""timm: its own modules for the mixers that it has."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mixer_parts.peers.peer import Peer
from mixer_parts.shapes import Skipped
from mixerzoo.compat import guard_torchvision


class ReadOut(nn.Module):
    """A mixing module, then the mixer's readout: y = readout([mix(x); x]). (B, N, D) -> (B, N, D)."""

    def __init__(self, mix: nn.Module, readout: nn.Linear) -> None:
        super().__init__()
        self.mix = mix
        self.readout = copy.deepcopy(readout)

    def forward(self, x: Tensor) -> Tensor:
        """Mix x (B, N, D)."""
        y: Tensor = self.readout(torch.cat((self.mix(x), x), dim=-1))
        return y


def make_gmlp(mixer: Any) -> nn.Module:
    """Make a GatedMlp with a SpatialGatingUnit; its last layer is the readout."""
    guard_torchvision()
    from timm.layers import GatedMlp
    from timm.models.mlp_mixer import SpatialGatingUnit

    dim, units = mixer.gate_value.in_features, mixer.gate_value.out_features
    gate = partial(SpatialGatingUnit, seq_len=mixer.tokens)
    mlp = GatedMlp(dim, units, gate_layer=gate)
    mlp.fc1 = copy.deepcopy(mixer.gate_value)
    mlp.gate.norm = copy.deepcopy(mixer.norm)
    mlp.gate.proj.load_state_dict({"weight": mixer.mixing, "bias": mixer.shift})
    mlp.fc2 = nn.Identity()
    return ReadOut(mlp, mixer.readout)


class TokenMlps(nn.Module):
    """The token-mixing MLP of timm's MixerBlock, one a head."""

    def __init__(self, mixer: Any) -> None:
        super().__init__()
        guard_torchvision()
        from timm.models.mlp_mixer import MixerBlock

        heads, hidden, tokens = mixer.weight1.shape
        self.value = copy.deepcopy(mixer.value)
        blocks = [MixerBlock(hidden, tokens, mlp_ratio=(1.0, 1.0)) for _ in range(heads)]
        self.mlps = nn.ModuleList(block.mlp_tokens for block in blocks)
        mlp: Any
        for h, mlp in enumerate(self.mlps):
            mlp.fc1.load_state_dict({"weight": mixer.weight1[h], "bias": mixer.bias1[h]})
            mlp.fc2.load_state_dict({"weight": mixer.weight2[h], "bias": mixer.bias2[h]})

    def forward(self, x: Tensor) -> Tensor:
        """Mix x (B, N, D)."""
        parts = self.value(x).chunk(len(self.mlps), dim=-1)
        return torch.cat([mlp(part.mT).mT for mlp, part in zip(self.mlps, parts, strict=True)], dim=-1)


def make_token_mlp(mixer: Any) -> nn.Module:
    """Make a token-mixing MLP a head."""
    return ReadOut(TokenMlps(mixer), mixer.readout)


class Mla(nn.Module):
    """timm's LiteMLA, on one scale or two; without a grid the tokens are a picture of one column."""

    def __init__(self, mixer: Any) -> None:
        super().__init__()
        guard_torchvision()
        from timm.models.efficientvit_mit import LiteMLA

        heads, dim = mixer.heads, mixer.qkv.in_features
        rank = mixer.qkv.out_features // (3 * heads)
        self.grid = getattr(mixer, "grid", None)
        options = {"scales": (5,) if self.grid else (), "eps": 1e-6, "norm_layer": (None, None)}
        self.mla = LiteMLA(dim, dim, heads=heads, dim=rank, use_bias=(True, False), **options)
        self.mla.proj = nn.Identity()

        def by_head(ours: Tensor) -> Tensor:  # LiteMLA has q, k and v of one head side by side
            return ours.unflatten(0, (3, heads, -1)).transpose(0, 1).flatten(0, 2)

        def load(layer: nn.Module, **weights: Tensor) -> None:
            shapes = {name: tensor.shape for name, tensor in layer.state_dict().items()}
            layer.load_state_dict({name: by_head(w).view(shapes[name]) for name, w in weights.items()})

        load(self.mla.qkv.conv, weight=mixer.qkv.weight, bias=mixer.qkv.bias)
        for near, blend in self.mla.aggreg:
            near.bias = blend.bias = None
            load(near, weight=mixer.near.weight)
            load(blend, weight=mixer.blend)

    def forward(self, x: Tensor) -> Tensor:
        """Mix x (B, N, D)."""
        grid = self.grid or (x.shape[1], 1)
        y: Tensor = self.mla(x.mT.unflatten(-1, grid)).flatten(2).mT
        return y


def make_mla(mixer: Any) -> nn.Module:
    """Make LiteMLA; its projection is the readout."""
    return ReadOut(Mla(mixer), mixer.readout)


class Cascade(nn.Module):
    """timm's CascadedGroupAttention on the mixer's projected input, its norms folded as for deployment.

    Its heads pass on what they found as it is. The mixer's factors for that go into the values of the head before;
    the readout takes them out again.
    """

    def __init__(self, mixer: Any) -> None:
        super().__init__()
        guard_torchvision()
        from timm.models.efficientvit_msra import CascadedGroupAttention

        if mixer.grid[0] != mixer.grid[1]:
            raise Skipped("square grids only")
        heads, channels = len(mixer.qkv), mixer.inner.out_features
        rank = channels // heads
        self.grid = mixer.grid
        self.inner = copy.deepcopy(mixer.inner)
        self.attention = CascadedGroupAttention(
            channels, rank, heads, attn_ratio=1, resolution=mixer.grid[0], kernels=(5,) * heads
        )
        self.attention.scale = mixer.scale
        self.attention.proj = nn.Identity()
        self.attention.qkvs = nn.ModuleList(nn.Conv2d(rank, 3 * rank, 1) for _ in range(heads))
        self.attention.dws = copy.deepcopy(mixer.conv)
        with torch.no_grad():
            self.attention.attention_biases.copy_(mixer.bias.flatten(1))
            for theirs, ours, factor in zip(
                self.attention.qkvs, mixer.qkv, (*mixer.cascade, torch.ones(())), strict=True
            ):
                scale = torch.cat((torch.ones(2 * rank), factor.expand(rank)))
                theirs.weight.copy_((scale[:, None] * ours.weight)[..., None, None])
                theirs.bias.copy_(scale * ours.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Mix x (B, N, D)."""
        y: Tensor = self.attention(self.inner(x).mT.unflatten(-1, self.grid)).flatten(2).mT
        return y


def make_cascaded_group(mixer: Any) -> nn.Module:
    """Make CascadedGroupAttention; its projection is the readout."""
    peer = ReadOut(Cascade(mixer), mixer.readout)
    heads = len(mixer.qkv)
    with torch.no_grad():
        columns = peer.readout.weight[:, : mixer.inner.out_features].unflatten(1, (heads, -1))
        columns[:, :-1] /= mixer.cascade[:, None]
    return peer


def make_attention(mixer: Any) -> nn.Module:
    """Make Attention; its projection is the readout."""
    guard_torchvision()
    from timm.layers import Attention

    width = mixer.qkv.out_features // (3 * mixer.heads)
    attention = Attention(mixer.qkv.in_features, mixer.heads, attn_head_dim=width, qkv_bias=True)
    attention.qkv = copy.deepcopy(mixer.qkv)
    attention.proj = nn.Identity()
    return ReadOut(attention, mixer.readout)


class Sequencer(nn.Module):
    """timm's LSTM2d on tokens without a prefix. (B, N, D) -> (B, N, 4 S)."""

    def __init__(self, mixer: Any) -> None:
        super().__init__()
        guard_torchvision()
        from timm.models.sequencer import LSTM2d

        self.grid = mixer.grid
        self.lstm = LSTM2d(mixer.rnn_v.input_size, mixer.rnn_v.hidden_size, with_fc=False)
        self.lstm.rnn_v, self.lstm.rnn_h = copy.deepcopy(mixer.rnn_v), copy.deepcopy(mixer.rnn_h)

    def forward(self, x: Tensor) -> Tensor:
        """Mix x (B, N, D)."""
        y: Tensor = self.lstm(x.unflatten(1, self.grid)).flatten(1, 2)
        return y


def make_sequencer(mixer: Any) -> nn.Module:
    """Make LSTM2d, without its own projection: that is the readout."""
    return ReadOut(Sequencer(mixer), mixer.readout)


PEERS = [
    Peer(mixer="lstm2d", label="timm's LSTM2d", make=make_sequencer, prefix=False),
    Peer(mixer="fewer_heads", label="timm's Attention", make=make_attention),
    Peer(
        mixer="cascaded_group",
        label="timm's CascadedGroupAttention",
        make=make_cascaded_group,
        prefix=False,
    ),
    Peer(mixer="gmlp", label="timm's GatedMlp, SpatialGatingUnit", make=make_gmlp),
    Peer(mixer="token_mlp", label="timm's MixerBlock.mlp_tokens", make=make_token_mlp),
    Peer(mixer="relu_attention", label="timm's LiteMLA, one scale", make=make_mla),
    Peer(mixer="lite_mla", label="timm's LiteMLA", make=make_mla, prefix=False),
]
