"""Mixers that see the tokens as a picture, and the rule for those that are not part of it.

Class and register tokens (the prefix, P of them) belong to no grid. What happens to them is the same for every
grid mixer:

- a mixer with queries and keys treats them as global: they see every token and every token sees them; only what
  slides over the grid (windows, convolutions, pooling) leaves them out;
- a mixer without takes the grid alone. In place of a mixed vector of its own, each prefix token gets the mean of
  the mixed grid; and the mean of the prefix tokens is a further feature for every token (`read_grid`).

Shapes: B batch, N = P + rows * columns tokens, D model width, C channels of the mixed vectors.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mixerzoo import AttentionView, MixerzooError
from mixerzoo_mixers._parts import read_out, split_heads


def need_grid(mixer: str, grid: tuple[int, int] | None) -> tuple[int, int]:
    """Return the grid, (rows, columns).

    Raises:
        MixerzooError: if the site has none.
    """
    if grid is None:
        raise MixerzooError(
            f"mixer '{mixer}' needs a grid of tokens, and this site has none; "
            "take one that works on any sequence, such as linear_attention"
        )
    return grid


def to_grid(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Lay the tokens x (B, P + rows * columns, C) out as a picture without the prefix: (B, C, rows, columns)."""
    rows, columns = grid
    cells = x[:, x.shape[1] - rows * columns :]
    return cells.reshape(x.shape[0], rows, columns, x.shape[2]).permute(0, 3, 1, 2)


def from_grid(picture: Tensor) -> Tensor:
    """Undo `to_grid` for the tokens of the grid: (B, C, rows, columns) to (B, rows * columns, C)."""
    return picture.flatten(2).mT


def grid_readout(channels: int, dim: int, prefix: int) -> nn.Linear:
    """Return the readout of `read_grid`: C + D features, and D more where there is a prefix."""
    return nn.Linear(channels + (2 if prefix else 1) * dim, dim)


def read_grid(readout: nn.Linear, mixed: Tensor, x: Tensor) -> Tensor:
    """Read out the mixed grid (B, rows * columns, C) beside the tokens x (B, N, D) themselves; returns (B, N, D).

    The features are [mixed; x], and, if there are prefix tokens, their mean. A prefix token's mixed vector is the
    mean of the mixed grid.
    """
    prefix = x.shape[1] - mixed.shape[1]
    if not prefix:
        y: Tensor = readout(torch.cat((mixed, x), dim=-1))
        return y
    mean = mixed.mean(dim=1, keepdim=True).expand(-1, prefix, -1)
    own = torch.cat((torch.cat((mean, mixed), dim=1), x), dim=-1)
    return read_out(readout, own, x[:, :prefix].mean(dim=1, keepdim=True))


def inherit_prefix(view: AttentionView, readout: nn.Linear, prefix: int) -> None:
    """Start the readout of `read_grid` for the mean of the prefix tokens: each head's mean attention to them."""
    if not prefix:
        return
    share = view.mean_attention[:, :, :prefix].sum(dim=2).mean(dim=1)
    heads = len(share)
    values = share[:, None, None] * split_heads(view.v_weight, heads, 0)
    readout.weight[:, -view.v_weight.shape[1] :] = view.out_weight @ values.flatten(0, 1)
