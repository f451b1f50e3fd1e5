"""Tensors in files: like others, and small in memory once let go of."""

import gc
from pathlib import Path

import pytest
import torch

from mixerzoo.spill import FileRows, MemoryRows, Spill

STATUS = Path("/proc/self/status")


def filled(spill, *rows, shape, name="x", dtype=torch.float32):
    store = MemoryRows(shape, dtype) if spill is None else FileRows(spill, name, shape, dtype)
    for part in rows:
        store.append(part)
    return store.tensor()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_in_files_are_those_in_memory(tmp_path, dtype):
    parts = torch.randn(9, 4, 3).split((2, 1, 6))
    wide = [part.mT.contiguous().mT for part in parts]  # not contiguous
    spill = Spill(tmp_path)
    x = filled(spill, *wide, shape=(9, 4, 3), dtype=dtype)
    assert x.dtype == dtype
    assert torch.equal(x, filled(None, *parts, shape=(9, 4, 3), dtype=dtype))
    spill.release()
    assert torch.equal(x, torch.cat(parts).to(dtype))
    assert list(spill.folder.iterdir()) == []  # a killed process leaves nothing


def test_rows_that_were_not_written_are_zeros(tmp_path):
    x = filled(Spill(tmp_path), torch.ones(1, 2), shape=(3, 2))
    assert x.tolist() == [[1, 1], [0, 0], [0, 0]]


def test_the_folder_goes_with_them(tmp_path):
    spill = Spill(tmp_path)
    x = filled(spill, torch.full((5,), 3.0), shape=(5,))
    del spill
    gc.collect()
    assert not list(tmp_path.iterdir())
    assert x.sum() == 15  # what is in use stays


@pytest.mark.skipif(not STATUS.exists(), reason="memory is read from /proc")
def test_what_is_let_go_of_is_no_memory_of_this_process(tmp_path):
    def resident() -> int:
        (line,) = [line for line in STATUS.read_text().splitlines() if line.startswith("VmRSS")]
        return int(line.split()[1])

    spill = Spill(tmp_path)
    filled(
        spill, torch.ones(2**24), shape=(2**24,), name="first"
    )  # what PyTorch keeps for itself is there now
    before = resident()
    x = filled(spill, torch.ones(2**24), shape=(2**24,))  # 64 MiB
    assert x.sum() == 2**24
    assert resident() - before > 50_000
    spill.release()
    assert resident() - before < 20_000
    assert x[-1] == 1
