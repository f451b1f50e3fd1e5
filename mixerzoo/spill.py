"""Activations that grow by the batch, in memory or, where they may not fit, in files: used as any other tensor.

Files are written in order and mapped when they are full; the memory of what was read from them can be given back.
"""

from __future__ import annotations

import math
import mmap
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch


class MemoryRows:
    """A tensor of a known shape that is filled row by row, in memory: in huge pages where there are any."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        pages = mmap.mmap(-1, max(1, math.prod(shape) * dtype.itemsize))
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # the kernel has none
                pages.madvise(mmap.MADV_HUGEPAGE)
        self._tensor = torch.frombuffer(pages, dtype=dtype, count=math.prod(shape)).view(*shape)
        self._count = 0

    def append(self, rows: torch.Tensor) -> None:
        """Add rows after those that are there."""
        self._tensor[self._count : self._count + len(rows)] = rows
        self._count += len(rows)

    def tensor(self) -> torch.Tensor:
        """Return the tensor."""
        return self._tensor


class FileRows:
    """The same in a file of a `Spill`. They are written, not mapped: a new page of a mapped file costs much more."""

    def __init__(self, spill: Spill, name: str, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.spill, self.shape, self.dtype = spill, tuple(shape), dtype
        self._path = spill.folder / name

    def append(self, rows: torch.Tensor) -> None:
        """Add rows after those that are there."""
        with self._path.open("ab") as file:
            rows.to(self.dtype).contiguous().view(torch.uint8).numpy().tofile(file)

    def tensor(self) -> torch.Tensor:
        """Return the tensor, once; rows that were not written are zeros."""
        size = math.prod(self.shape) * self.dtype.itemsize
        with self._path.open("ab") as file:
            file.truncate(size)
        return torch.frombuffer(self.spill.map(self._path, size), dtype=self.dtype).view(self.shape)


class Spill:
    """A temporary folder for tensors, which goes away with this object; tensors that are in use then stay.

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

    def map(self, path: Path, size: int) -> mmap.mmap:
        """Map a file of `size` bytes in the folder; it has no name from then on, so that nothing is left by a kill."""
        with path.open("r+b") as file:
            self._maps.append(mmap.mmap(file.fileno(), size))
        with suppress(OSError):  # Windows removes no file that is mapped
            path.unlink()
        return self._maps[-1]

    def release(self) -> None:
        """Give the memory of all tensors back to the system; they come back from their files when they are used.

        Without it, all that was ever read would count as memory of this process. Where the system has no such
        call, it decides by itself.
        """
        for pages in self._maps:
            if hasattr(mmap, "MADV_DONTNEED"):
                pages.madvise(mmap.MADV_DONTNEED)
