"""References of recurrent mixers: the formulae, token by token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mixerzoo_mixers.naive._parts import affine, each, read_grid, reference, sigmoid


def run(lstm: Any, sequence: list[Tensor], suffix: str) -> list[Tensor]:
    """Return the hidden states of one direction of an LSTM, its sequence in that order."""
    weight_x, weight_h, bias_x, bias_h = (
        getattr(lstm, f"{name}_l0{suffix}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    hidden = cell = torch.zeros_like(weight_h[0])
    states = []
    for v in sequence:
        i, f, g, o = (weight_x @ v + bias_x + weight_h @ hidden + bias_h).chunk(4)
        cell = sigmoid(f) * cell + sigmoid(i) * torch.tanh(g)
        hidden = sigmoid(o) * torch.tanh(cell)
        states.append(hidden)
    return states


@reference
def multihead_lstm(mixer: Any, x: Tensor, real: Tensor) -> Tensor:
    """Over the real tokens: y = W_post concat_h P_h [forward LSTM_h; backward LSTM_h] of (W_pre x)_h."""
    kept = [n for n in range(len(x)) if bool(real[n])]
    heads = []
    for h, (lstm, proj) in enumerate(zip(mixer.lstm, mixer.head_proj, strict=True)):
        inputs = [affine(mixer.pre_proj, x[n]).chunk(len(mixer.lstm))[h] for n in kept]
        states = [run(lstm, inputs, "")]
        if lstm.bidirectional:
            states.append(run(lstm, inputs[::-1], "_reverse")[::-1])
        heads.append([affine(proj, torch.cat(both)) for both in zip(*states, strict=True)])
    mixed = {n: torch.cat(parts) for n, *parts in zip(kept, *heads, strict=True)}
    return each(x, real, lambda n: affine(mixer.post_proj, mixed[n]))


def run_both(lstm: Any, sequence: list[Tensor]) -> list[Tensor]:
    """Return the hidden states of both directions side by side."""
    back = run(lstm, sequence[::-1], "_reverse")[::-1]
    return [torch.cat(both) for both in zip(run(lstm, sequence, ""), back, strict=True)]


@reference
def lstm2d(mixer: Any, x: Tensor, real: Tensor) -> Tensor:
    """M = [LSTM_v down and up the column; LSTM_h along the row and back], and the rule for prefix tokens."""
    rows, columns = mixer.grid
    cells = list(x[len(x) - rows * columns :])
    down = [run_both(mixer.rnn_v, cells[j::columns]) for j in range(columns)]
    along = [run_both(mixer.rnn_h, cells[i * columns : (i + 1) * columns]) for i in range(rows)]
    mixed = [torch.cat((down[j][i], along[i][j])) for i in range(rows) for j in range(columns)]
    return read_grid(mixer, mixed, x)
