"""Recurrent mixers.

Shapes: B batch, N tokens, D model width, H heads, K = D / H head width, S hidden units of a head and direction.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from mixerzoo import AttentionView, Caps, MixerSpec
from mixerzoo.units import Share, Units, places, sized
from mixerzoo_mixers._grid import grid_readout, need_grid, read_grid
from mixerzoo_mixers._parts import check_tokens, compact, expand, head_width, split_heads, zero_padding
from mixerzoo_mixers.kernels import usable
from mixerzoo_mixers.kernels.lstm import recurrence

SHORTEST = -1.0  # of the forget gates' biases at the start: they keep a quarter of what they hold
MULTIPLE = 4  # units of a pruned LSTM: whole vectors of the processor


class MultiheadLstm(nn.Module):
    """FAR's multi-head LSTM: y = W_post concat_h P_h BiLSTM_h((W_pre x)_h). (B, N, D) -> (B, N, D).

    Each head has its own bidirectional LSTM from K to S = K * width hidden units a direction, and its own
    projection P_h from both directions back to K. This is the deployed form; FAR trains one LSTM over all heads
    with block-diagonal weights, most of which are stored zeros, to the same values. If causal, the LSTMs only run
    forward. `units` may be fewer than S: each direction of each head has then lost some of its own.
    """

    def __init__(
        self, dim: int, heads: int, width: float, causal: bool, sizes: Mapping[str, int] | None = None
    ) -> None:
        super().__init__()
        hidden = sized(sizes, "units", head_width(dim, heads, width))
        head_dim = dim // heads
        self.pre_proj = nn.Linear(dim, dim)
        self.lstm = nn.ModuleList(
            nn.LSTM(head_dim, hidden, batch_first=True, bidirectional=not causal) for _ in range(heads)
        )
        directions = 1 if causal else 2
        self.head_proj = nn.ModuleList(nn.Linear(directions * hidden, head_dim) for _ in range(heads))
        self.post_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mix x (B, N, D); tokens where mask (B, N) is False are passed over."""
        if mask is not None:
            x, mask, places = compact(zero_padding(x, mask), mask)
        inputs: Tensor = self.pre_proj(x)
        mixed = self._fused(inputs, mask) if usable("lstm", inputs) else self._apart(inputs, mask)
        y: Tensor = self.post_proj(mixed)
        return y if mask is None else expand(y, places)

    def _apart(self, inputs: Tensor, mask: Tensor | None) -> Tensor:
        """Run one LSTM after the other; returns the projected heads side by side, (B, N, D)."""
        lengths = None if mask is None else mask.sum(dim=1).clamp(min=1).cpu()
        parts = []
        for lstm, proj, x in zip(
            cast(list[nn.LSTM], list(self.lstm)),
            self.head_proj,
            inputs.chunk(len(self.lstm), dim=-1),
            strict=True,
        ):
            if lengths is None:
                states = states_of(lstm, x)
            else:
                packed = lstm(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))[0]
                states = pad_packed_sequence(packed, batch_first=True, total_length=x.shape[1])[0]
            parts.append(proj(states))
        return torch.cat(parts, dim=-1)

    def _fused(self, inputs: Tensor, mask: Tensor | None) -> Tensor:
        """Do the same with all recurrences in one kernel, and all products of one kind as one."""
        batch, tokens, _ = inputs.shape
        lstms = cast(list[nn.LSTM], list(self.lstm))
        suffixes = ("", "_reverse") if lstms[0].bidirectional else ("",)

        def stacked(name: str) -> Tensor:
            return torch.stack([getattr(lstm, f"{name}_l0{suffix}") for suffix in suffixes for lstm in lstms])

        heads = split_heads(inputs, len(lstms)).permute(2, 0, 1, 3).flatten(1, 2)  # (H, B * N, K)
        inputs = heads.repeat(len(suffixes), 1, 1) @ stacked("weight_ih").mT.contiguous()
        bias = stacked("bias_ih") + stacked("bias_hh")
        lengths = None if mask is None else mask.sum(dim=1)
        states = recurrence(
            inputs.view(-1, batch, tokens, inputs.shape[2]), bias, stacked("weight_hh"), lengths, len(lstms)
        )
        both = torch.cat(states.flatten(1, 2).chunk(len(suffixes)), dim=-1)  # (H, B * N, directions * S)
        projs = cast(list[nn.Linear], list(self.head_proj))
        weight, bias = (torch.stack([getattr(p, name) for p in projs]) for name in ("weight", "bias"))
        mixed = torch.baddbmm(bias.unsqueeze(1), both, weight.mT)
        return mixed.view(-1, batch, tokens, mixed.shape[2]).permute(1, 2, 0, 3).flatten(2)


def spread_memories(lstm: nn.LSTM, tokens: int) -> None:
    """Start the units of an LSTM with forget gates that remember for 1 to `tokens` tokens, evenly on a log scale.

    That is the chrono initialisation (Tallec & Ollivier, arXiv 1804.11188) but for the scale. With PyTorch's, all
    units have forgotten half of what they were told a token later, and attention sees further.
    """
    size, longest = lstm.hidden_size, math.log(tokens)
    for name, bias in lstm.named_parameters():
        if name.startswith("bias_ih"):
            forget = torch.empty(size).uniform_(SHORTEST, longest)
            bias[:size], bias[size : 2 * size] = -forget, forget
        elif name.startswith("bias_hh"):
            bias[: 2 * size] = 0


def inherit_lstm(mixer: MultiheadLstm, view: AttentionView) -> None:
    """Take over the teacher's output projection, as FAR does, and remember for as long as attention sees far.

    Not its values for W_pre: measured on four layers of the embedded teacher, that left the mixer worse after its
    readout was solved than a random start (NMSE .27 to .36 instead of .22 to .30 in the middle one).
    """
    mixer.post_proj.weight.copy_(view.out_weight)
    mixer.post_proj.bias.copy_(view.out_bias)
    for lstm in cast(list[nn.LSTM], list(mixer.lstm)):
        spread_memories(lstm, view.mean_attention.shape[-1])


def direction_units(path: str, lstm: nn.LSTM) -> list[tuple[Share, ...]]:
    """Return a row of units for each direction of an LSTM: their rows of all gates and what they tell each other.

    That is FAR's group; biases are cut with it.
    """
    gates, own = places(4, lstm.hidden_size, units=1)[0], places(lstm.hidden_size, units=0)[0]
    return [
        (
            Share(parameter=f"{path}.weight_ih_l0{suffix}", dim=0, places=gates),
            Share(parameter=f"{path}.weight_hh_l0{suffix}", dim=0, places=gates),
            Share(parameter=f"{path}.weight_hh_l0{suffix}", dim=1, places=own),
            Share(parameter=f"{path}.bias_ih_l0{suffix}", dim=0, places=gates, counts=False),
            Share(parameter=f"{path}.bias_hh_l0{suffix}", dim=0, places=gates, counts=False),
        )
        for suffix in (("", "_reverse") if lstm.bidirectional else ("",))
    ]


def lstm_units(mixer: MultiheadLstm) -> dict[str, Units]:
    """Return the hidden units of every head and direction; all keep as many: they are one kernel."""
    rows = []
    for head, lstm in enumerate(cast(list[nn.LSTM], list(mixer.lstm))):
        directions = direction_units(f"lstm.{head}", lstm)
        outs = places(len(directions), lstm.hidden_size, units=1, rows=0)
        for shares, out in zip(directions, outs, strict=True):
            rows.append(
                (*shares, Share(parameter=f"head_proj.{head}.weight", dim=1, places=out, counts=False))
            )
    return {"units": Units(rows=tuple(rows), multiple=MULTIPLE)}


class Lstm2d(nn.Module):
    """Sequencer's LSTMs along the columns and the rows of the grid, each both ways. (B, N, D) -> (B, N, D).

    y_n = W [down and up the column; along the row and back; x]_n + b, and the rule for prefix tokens of `read_grid`.
    S = D / 4 * width hidden units a direction.
    """

    def __init__(
        self,
        dim: int,
        tokens: int,
        width: float,
        prefix: int,
        grid: tuple[int, int] | None,
        sizes: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__()
        hidden = sized(sizes, "units", max(1, round(dim / 4 * width)))
        self.grid, self.tokens = need_grid("lstm2d", grid), tokens
        self.rnn_v, self.rnn_h = (
            nn.LSTM(dim, hidden, batch_first=True, bidirectional=True) for _ in range(2)
        )
        self.readout = grid_readout(4 * hidden, dim, prefix)

    def forward(self, x: Tensor) -> Tensor:
        """Mix x (B, N, D)."""
        check_tokens(x, self.tokens)
        rows, columns = self.grid
        cells = x[:, x.shape[1] - rows * columns :].unflatten(1, (rows, columns))
        down = both_ways(self.rnn_v, cells.transpose(1, 2).flatten(0, 1))  # (B * columns, rows, 2 S)
        along = both_ways(self.rnn_h, cells.flatten(0, 1)).unflatten(0, (-1, rows))
        down = down.unflatten(0, (-1, columns)).transpose(1, 2)
        return read_grid(self.readout, torch.cat((down, along), dim=-1).flatten(1, 2), x)


def lstm2d_units(mixer: Lstm2d) -> dict[str, Units]:
    """Return the hidden units of the four directions."""
    directions = [*direction_units("rnn_v", mixer.rnn_v), *direction_units("rnn_h", mixer.rnn_h)]
    outs = places(4, mixer.rnn_v.hidden_size, units=1, rows=0)
    rows = tuple(
        (*shares, Share(parameter="readout.weight", dim=1, places=out, counts=False))
        for shares, out in zip(directions, outs, strict=True)
    )
    return {"units": Units(rows=rows, multiple=MULTIPLE)}


def states_of(lstm: nn.LSTM, x: Tensor) -> Tensor:
    """Return the hidden states of an LSTM over x (B, N, K): (B, N, directions * S)."""
    if not torch.compiler.is_exporting():
        y: Tensor = lstm(x)[0]
        return y
    # torch.export switches oneDNN off. PyTorch then goes through the tokens one by one, and through no other number.
    backend: Any = torch.backends.mkldnn
    before, backend.enabled = backend.enabled, True
    try:
        y = lstm(x)[0]
    finally:
        backend.enabled = before
    return y


def both_ways(lstm: nn.LSTM, x: Tensor) -> Tensor:
    """Run a bidirectional LSTM over x (B, N, K), in one kernel where there is one; returns (B, N, 2 S)."""
    if not usable("lstm", x):
        return states_of(lstm, x)

    def stacked(name: str) -> Tensor:
        return torch.stack([getattr(lstm, f"{name}_l0{suffix}") for suffix in ("", "_reverse")])

    inputs = x.flatten(0, 1) @ stacked("weight_ih").mT.contiguous()
    bias = stacked("bias_ih") + stacked("bias_hh")
    states = recurrence(inputs.view(2, *x.shape[:2], -1), bias, stacked("weight_hh"), None, 1)
    return torch.cat(states.unbind(), dim=-1)


MULTIHEAD_LSTM = MixerSpec(
    name="multihead_lstm",
    build=MultiheadLstm,
    summary="a bidirectional LSTM a head",
    widths=(0.25, 0.5, 1.0),
    caps=Caps(any_length=True, causal=True, masks=True, exportable=True),
    inherit=inherit_lstm,
    readout="post_proj",
    units=lstm_units,
    cost="N D^2 + N D K, one token after the other",
    paper="FAR, arXiv 2505.21535",
    letter="R",
)

LSTM2D = MixerSpec(
    name="lstm2d",
    build=Lstm2d,
    summary="LSTMs along the rows and the columns of the grid, and the token itself",
    widths=(0.5, 1.0, 2.0),
    caps=Caps(exportable=True),
    readout="readout",
    units=lstm2d_units,
    cost="N D^2, one row after the other",
    paper="Sequencer, arXiv 2205.01972",
    letter="Ld",
)
