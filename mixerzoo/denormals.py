"""Numbers too small to be normal: a CPU takes some ten times as long for each product of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def tiny_as_zero() -> Iterator[None]:
    """Take numbers below 1e-38 for zero inside the block.

    Gradients that go back through an LSTM over hundreds of tokens end there, and products of such numbers take some ten
    times as long on a CPU. Threads that PyTorch starts inside the block do the same, those of before do not.
    """
    before = float(torch.tensor(1e-40) * torch.ones(())) == 0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)
