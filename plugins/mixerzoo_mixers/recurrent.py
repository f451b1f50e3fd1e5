"""Recurrent mixers.

Shapes: B batch, N tokens, D model width, H heads, K = D / H head width, S hidden units of a head and direction.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from mixerzoo import AttentionView, Caps, MixerSpec
from mixerzoo_mixers._parts import compact, expand, head_width, zero_padding

# Heads that run as one LSTM have at most this many hidden units together: up to about here a step costs the same,
# whatever it multiplies, and fewer steps win (measured on a CPU: 3 heads of 32 units 3.0 ms apart, 1.6 together).
TOGETHER = 128


class MultiheadLstm(nn.Module):
    """FAR's multi-head LSTM: y = W_post concat_h P_h BiLSTM_h((W_pre x)_h). (B, N, D) -> (B, N, D).

    Each head has its own bidirectional LSTM from K to S = K * width hidden units a direction, and its own
    projection P_h from both directions back to K. This is the deployed form; FAR trains one LSTM over all heads
    with block-diagonal weights, most of which are stored zeros, to the same values. If causal, the LSTMs only run
    forward.
    """

    def __init__(self, dim: int, heads: int, width: float, causal: bool) -> None:
        super().__init__()
        hidden = head_width(dim, heads, width)
        head_dim = dim // heads
        self.group = max(
            g for g in range(1, heads + 1) if heads % g == 0 and (g == 1 or g * hidden <= TOGETHER)
        )
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
        # On a GPU the library wants each LSTM's weights in one piece; packed sequences are not worth a second way.
        together = mask is None and self.group > 1 and not x.is_cuda
        states = self._together(inputs) if together else self._apart(inputs, mask)
        parts = [proj(state) for proj, state in zip(self.head_proj, states, strict=True)]
        y: Tensor = self.post_proj(torch.cat(parts, dim=-1))
        return y if mask is None else expand(y, places)

    def _apart(self, inputs: Tensor, mask: Tensor | None) -> list[Tensor]:
        """Run one LSTM after the other; returns what each head's projection gets, (B, N, directions * S)."""
        heads = inputs.chunk(len(self.lstm), dim=-1)
        if mask is None:
            return [lstm(head)[0] for lstm, head in zip(self.lstm, heads, strict=True)]
        lengths = mask.sum(dim=1).clamp(min=1).cpu()
        states = []
        for lstm, head in zip(self.lstm, heads, strict=True):
            packed = pack_padded_sequence(head, lengths, batch_first=True, enforce_sorted=False)
            states.append(
                pad_packed_sequence(lstm(packed)[0], batch_first=True, total_length=mask.shape[1])[0]
            )
        return states

    def _together(self, inputs: Tensor) -> list[Tensor]:
        """Run each group of heads as one LSTM with block-diagonal weights; returns the same as `_apart`."""
        group = self.group
        states: list[Tensor] = []
        eye = torch.eye(group, dtype=inputs.dtype, device=inputs.device).view(group, 1, group, 1)
        for start, part in enumerate(inputs.chunk(len(self.lstm) // group, dim=-1)):
            lstms = cast(list[nn.LSTM], list(self.lstm)[start * group : (start + 1) * group])
            first = lstms[0]
            directions, hidden = 1 + first.bidirectional, first.hidden_size
            weights = []
            for name, _ in first.named_parameters():
                rows = torch.stack([getattr(lstm, name).view(4, hidden, -1) for lstm in lstms], dim=1)
                # Rows go by gate, then head, then unit; a weight's columns by head.
                if name.startswith("weight"):
                    weights.append((rows.unsqueeze(3) * eye).flatten(3).flatten(0, 2))
                else:
                    weights.append(rows.flatten())
            start_state = inputs.new_zeros(directions, inputs.shape[0], group * hidden)
            y, _, _ = torch.lstm(
                part, (start_state, start_state), weights, True, 1, 0.0, self.training, directions == 2, True
            )
            y = y.view(*y.shape[:2], directions, group, hidden)
            states.extend(y.transpose(2, 3).flatten(3).unbind(2))
        return states


def inherit_lstm(mixer: MultiheadLstm, view: AttentionView) -> None:
    """Take over the teacher's output projection, as FAR does.

    Not its values for W_pre: measured on four layers of the embedded teacher, that left the mixer worse after its
    readout was solved than a random start (NMSE .27 to .36 instead of .22 to .30 in the middle one).
    """
    mixer.post_proj.weight.copy_(view.out_weight)
    mixer.post_proj.bias.copy_(view.out_bias)


MULTIHEAD_LSTM = MixerSpec(
    name="multihead_lstm",
    build=MultiheadLstm,
    summary="a bidirectional LSTM a head",
    widths=(0.25, 0.5, 1.0),
    caps=Caps(any_length=True, causal=True, masks=True),
    inherit=inherit_lstm,
    readout="post_proj",
    cost="N D^2 + N D K, one token after the other",
    paper="FAR, arXiv 2505.21535",
    letter="R",
)
