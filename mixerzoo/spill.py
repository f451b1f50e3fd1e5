"""Tensors in files, for what may not fit into memory: used as any other, and let go of by the page."""

from __future__ import annotations

import math
import mmap
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch


class Spill:
    """Tensors in a temporary folder that goes away with this object, and the tensors with it.

    Args:
        parent: where the folder is made; the system's temporary folder unless given.

    Attributes:
        folder: where the files are.
        remove: removes them now.
    """

    def __init__(self, parent: Path | None = None) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="mixerzoo-", dir=parent))
        self.remove = weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        self._maps: list[mmap.mmap] = []

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Return a tensor in a file of its own, filled with zeros."""
        size = math.prod(shape) * dtype.itemsize
        with (self.folder / str(len(self._maps))).open("w+b") as file:
            file.truncate(size)
            self._maps.append(mmap.mmap(file.fileno(), size))
        return torch.frombuffer(self._maps[-1], dtype=dtype).view(*shape)

    def release(self) -> None:
        """Give the memory of all tensors back to the system; they come back from their files when they are used.

        Without it, all that was ever touched would count as memory of this process. Where the system has no such
        call, it decides by itself.
        """
        for pages in self._maps:
            if hasattr(mmap, "MADV_DONTNEED"):
                pages.madvise(mmap.MADV_DONTNEED)
