"""The architecture of the embedded teacher: a small ViT for 8x8 digits shown at 32x32, patch 2, 257 tokens."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from torch import nn

from mixerzoo.compat import guard_torchvision

NAME = "digits_vit"
PRETRAINED_CFG = {
    "input_size": (1, 32, 32),
    "mean": (0.5,),
    "std": (0.5,),
    "interpolation": "bilinear",
    "crop_pct": 1.0,
    "num_classes": 10,
}


def build() -> nn.Module:
    """Return the untrained model: width 96, depth 8, 3 heads, 0.92 M parameters."""
    guard_torchvision()
    from timm.models.vision_transformer import VisionTransformer

    model: Any = VisionTransformer(
        img_size=32, patch_size=2, in_chans=1, num_classes=10, embed_dim=96, depth=8, num_heads=3
    )
    model.pretrained_cfg = dict(PRETRAINED_CFG)
    built: nn.Module = model
    return built


def load() -> nn.Module:
    """Return the trained model in float32 and eval mode."""
    model = build()
    weights = load_safetensors((resources.files("mixerzoo.teachers") / f"{NAME}.safetensors").read_bytes())
    model.load_state_dict({name: tensor.to(torch.float32) for name, tensor in weights.items()})
    return model.eval()


def card() -> dict[str, Any]:
    """Return what the training script measured: accuracy, parameters, recipe."""
    content: dict[str, Any] = json.loads(
        (resources.files("mixerzoo.teachers") / f"{NAME}.json").read_text(encoding="utf-8")
    )
    return content
