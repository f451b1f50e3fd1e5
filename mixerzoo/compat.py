"""Repairs of the environment that must happen before other packages are imported."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

import torch

# Library fragments unregister their operators when they are collected, so they are kept here.
_KEPT: list[torch.library.Library] = []


@cache
def guard_torchvision() -> None:
    """Make `import torchvision` work where its binary part cannot be loaded.

    A CPU-only torch beside a torchvision built for CUDA is what `pip install` gives many people. Its `_C.so`
    does not load, and `import torchvision` (hence timm) dies with "operator torchvision::nms does not exist".
    Declaring the two operators' schemas is enough for everything that does not call them. A torchvision that
    loads is left alone. Call this before the first import of timm or torchvision.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return
    for binary in Path(spec.submodule_search_locations[0]).glob("_C*.so"):
        try:
            torch.ops.load_library(str(binary))
        except OSError:
            library = torch.library.Library("torchvision", "DEF")
            for name in ("nms", "qnms"):
                library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _KEPT.append(library)
        return
