"""A teacher small enough that a whole pipeline takes seconds: for tests in this folder and below it."""

import torch

from mixerzoo.compat import guard_torchvision
from mixerzoo.hosts import as_teacher
from mixerzoo.hosts.timm_vit import TimmVitHost

CONFIG = {
    "input_size": (1, 16, 16),
    "mean": (0.5,),
    "std": (0.5,),
    "interpolation": "bilinear",
    "crop_pct": 1.0,
    "num_classes": 10,
}
SHAPE = {
    "img_size": 16,
    "patch_size": 4,
    "in_chans": 1,
    "num_classes": 10,
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 3,
}


def seeded(make, *, seed=0, spread=0.3):
    """Return `make()` in eval mode, with larger weights than timm starts from: attention is far from uniform."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim >= 2 or name.endswith("bias"):
                    parameter.normal_(std=spread)
                elif name.endswith("gamma"):  # layer scale
                    parameter.mul_(torch.empty_like(parameter).uniform_(0.5, 1.5))
    model.pretrained_cfg = dict(CONFIG)
    return model.eval()


def tiny_vit(*, init_values=None, reg_tokens=0, num_classes=10, seed=0, **options):
    """Return a ViT of width 24, depth 2, 3 heads, for 16x16 grey images in patches of 4; options are timm's."""
    guard_torchvision()
    from timm.models.vision_transformer import VisionTransformer

    shape = (
        SHAPE | {"num_classes": num_classes, "init_values": init_values, "reg_tokens": reg_tokens} | options
    )
    return seeded(lambda: VisionTransformer(**shape), seed=seed)


def tiny_teacher(*, name="tiny", **options):
    """Return that model as a teacher."""
    return as_teacher(tiny_vit(**options), TimmVitHost(), name=name)


def tiny_images(count=40, *, seed=1):
    """Return prepared images (count, 1, 16, 16): noise, smooth enough that patches look alike or not."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 1, 4, 4, generator=generator)
    fine = torch.randn(count, 1, 16, 16, generator=generator)
    return torch.nn.functional.interpolate(coarse, size=16, mode="bilinear") + 0.3 * fine


def tiny_batches(count=40, *, batch_size=8, seed=1):
    """Return those images in batches."""
    return list(tiny_images(count, seed=seed).split(batch_size))
