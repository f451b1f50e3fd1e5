"""Tensors in files: like others, and small in memory once let go of."""

import gc
from pathlib import Path

import pytest
import torch

from mixerzoo.spill import Spill

STATUS = Path("/proc/self/status")


def test_they_are_like_other_tensors(tmp_path):
    spill = Spill(tmp_path)
    x, y = spill.empty((4, 3), torch.bfloat16), spill.empty((2,), torch.float32)
    assert not x.any()
    x[1:3], y[0] = torch.ones(3), 7
    spill.release()
    assert x.sum() == 6
    assert y.tolist() == [7, 0]
    assert sorted(path.stat().st_size for path in spill.folder.iterdir()) == [8, 24]


def test_the_folder_goes_with_them(tmp_path):
    spill = Spill(tmp_path)
    x = spill.empty((5,), torch.float32)
    x.fill_(3)
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
    before = resident()
    x = spill.empty((2**24,), torch.float32)  # 64 MiB
    x.fill_(1)
    assert resident() - before > 50_000
    spill.release()
    assert resident() - before < 20_000
    assert x[-1] == 1
