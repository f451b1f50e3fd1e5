"""Units of a module that can be pruned: which weights belong to each.

A mixer that can be pruned names its units (`MixerSpec.units`) and is built with fewer of them (`sizes`). Units lie in
rows, such as the directions of each head of an LSTM: each row keeps its own, and all of them as many, so that what is
computed for all rows in one batched product or kernel still is, and a smaller module really is a faster one.

Shapes: U units of a row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Share:
    """What of one parameter belongs to the units of a row.

    Attributes:
        parameter: its name in the module.
        dim: the dimension along which the units lie.
        places: (U, m) positions along it of each unit; positions that are no unit's are never cut.
        only: (dimension, index): the share is in this slice of the parameter, where rows lie along that dimension.
        counts: whether it is part of the unit's norm; biases and what follows the unit often are not.
    """

    parameter: str
    dim: int
    places: Tensor
    only: tuple[int, int] | None = None
    counts: bool = True

    def slice_of(self, tensor: Tensor) -> tuple[Tensor, int]:
        """Return the part of the parameter that the share is in, and the units' dimension there."""
        dim = self.dim % tensor.ndim
        if self.only is None:
            return tensor, dim
        row_dim, row = self.only
        return tensor.select(row_dim, row), dim - (row_dim < dim)


@dataclass(frozen=True, kw_only=True)
class Units:
    """One kind of unit of a module.

    Attributes:
        rows: the shares of each row; every row has, and keeps, as many units as the others.
        multiple: as many of them as are kept are a multiple of this; it is also the least.
    """

    rows: tuple[tuple[Share, ...], ...]
    multiple: int = 1

    @property
    def size(self) -> int:
        """Units of a row."""
        return len(self.rows[0][0].places)

    def allowed(self, count: int) -> int:
        """Return the nearest number of units, not below `count`, that may be kept."""
        return min(self.size, max(self.multiple, math.ceil(count / self.multiple) * self.multiple))


def places(*shape: int, units: int, rows: int | None = None) -> list[Tensor]:
    """Return the positions of units along a dimension of size prod(shape) that is laid out as `shape`.

    Args:
        shape: the layout, such as (4, S) for the four gates of S LSTM units.
        units: the axis of it along which the units lie.
        rows: the axis along which rows lie, or None where there is one.

    Returns:
        (U, m) for each row.
    """
    grid = torch.arange(math.prod(shape)).view(shape)
    if rows is None:
        return [grid.movedim(units, 0).reshape(shape[units], -1)]
    return list(grid.movedim((rows, units), (0, 1)).reshape(shape[rows], shape[units], -1).unbind())


def sized(sizes: Mapping[str, int] | None, kind: str, natural: int) -> int:
    """Return how many units of a kind to build: as `sizes` says, else `natural`.

    Raises:
        ValueError: if `sizes` asks for more than there are, or for less than one.
    """
    size = (sizes or {}).get(kind, natural)
    if not 0 < size <= natural:
        raise ValueError(f"{kind}={size} is not between 1 and {natural}")
    return size
