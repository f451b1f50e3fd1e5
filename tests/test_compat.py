"""A torchvision whose binary part cannot be loaded does not take timm down with it."""

import os
import subprocess
import sys

import pytest

# What torchvision does at import: it describes an operator that its binary part was to define.
FAKE = """
import torch

@torch.library.register_fake("torchvision::nms")
def meta_nms(dets, scores, iou_threshold):
    return dets
"""

SCRIPT = """
import warnings
warnings.simplefilter("error")
try:
    import torchvision
except RuntimeError as error:
    assert "torchvision::nms does not exist" in str(error), error
else:
    raise SystemExit("the fake torchvision is not broken, this test shows nothing")
from mixerzoo.compat import guard_torchvision
guard_torchvision()
guard_torchvision()
import torchvision
assert torchvision.__file__.startswith({folder!r}), torchvision.__file__
print("imported")
"""

HARMLESS = """
import warnings
warnings.simplefilter("error")
import torch
from mixerzoo.compat import guard_torchvision
guard_torchvision()
guard_torchvision()
assert not hasattr(torch.ops.torchvision, "nms")
print("left alone")
"""


def run(script, folder):
    return subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def torchvision(tmp_path):
    folder = tmp_path / "torchvision"
    folder.mkdir()
    return folder


def test_a_torchvision_whose_binary_does_not_load_can_be_imported(torchvision):
    (torchvision / "__init__.py").write_text(FAKE)
    (torchvision / "_C.so").write_bytes(b"built for another torch")
    done = run(SCRIPT.format(folder=str(torchvision.parent)), torchvision.parent)
    assert done.stdout == "imported\n", done.stderr


def test_a_torchvision_without_a_binary_is_left_alone(torchvision):
    (torchvision / "__init__.py").write_text("")
    done = run(HARMLESS, torchvision.parent)
    assert done.stdout == "left alone\n", done.stderr
