"""Train the embedded teacher: `python -m mixerzoo.teachers.train` (about half an hour on two cores).

Writes `digits_vit.safetensors` (half precision) and its card `digits_vit.json` beside this file. Only the
calibration split is trained on; the accuracies on the other two are those of the half-precision weights.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import click
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from mixerzoo.data import ImageConfig, load_images, load_labels, open_digits
from mixerzoo.teachers import digits_vit


def augment(images: torch.Tensor) -> torch.Tensor:
    """Rotate, scale, shear and shift each image a little: (B, C, H, W) to the same shape."""
    B = len(images)
    angle = (torch.rand(B) - 0.5) * 0.6
    scale = 1 + (torch.rand(B) - 0.5) * 0.35
    shear = (torch.rand(B) - 0.5) * 0.4
    theta = torch.zeros(B, 2, 3)
    theta[:, 0, 0] = angle.cos() * scale
    theta[:, 0, 1] = -angle.sin() * scale + shear
    theta[:, 1, 0] = angle.sin() * scale
    theta[:, 1, 1] = angle.cos() * scale
    theta[:, :, 2] = (torch.rand(B, 2) - 0.5) * 0.3
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


@torch.inference_mode()
def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the share of right answers, in [0, 1]."""
    answers = torch.cat([model(part).argmax(-1) for part in images.split(100)])
    return float((answers == labels).float().mean())


@click.command()
@click.option("--epochs", default=60, show_default=True)
@click.option("--batch-size", default=32, show_default=True)
@click.option("--lr", default=1.5e-3, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path(__file__).parent, show_default=True)
def main(epochs: int, batch_size: int, lr: float, seed: int, out: Path) -> None:
    """Train the embedded teacher."""
    torch.manual_seed(seed)
    data = open_digits()
    cfg = digits_vit.PRETRAINED_CFG
    config = ImageConfig(
        size=(1, 32, 32), mean=(0.5,), std=(0.5,), interpolation=str(cfg["interpolation"]), crop_pct=1.0
    )
    parts = {}
    for name in ("calibration", "validation", "test"):
        indices = getattr(data.splits, name)
        labels = load_labels(data, indices)
        assert labels is not None
        parts[name] = (load_images(data, indices, config), labels)
    images, labels = parts["calibration"]

    model = digits_vit.build()
    steps = epochs * (len(images) // batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps, pct_start=0.15)
    started = time.perf_counter()
    for epoch in range(epochs):
        model.train()
        order = torch.randperm(len(images))
        for rows in order[: steps // epochs * batch_size].split(batch_size):
            logits = model(augment(images[rows]))
            loss = F.cross_entropy(logits, labels[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        if epoch % 5 == 4 or epoch == epochs - 1:
            model.eval()
            seconds = time.perf_counter() - started
            click.echo(
                f"epoch {epoch + 1:3d}  loss {loss.item():.3f}  validation "
                f"{accuracy(model, *parts['validation']):.4f}  {seconds:.0f} s"
            )

    weights = {name: tensor.to(torch.float16).contiguous() for name, tensor in model.state_dict().items()}
    model.load_state_dict({name: tensor.to(torch.float32) for name, tensor in weights.items()})
    model.eval()
    save_file(weights, str(out / f"{digits_vit.NAME}.safetensors"))
    card = {
        "name": digits_vit.NAME,
        "data": "scikit-learn digits: 1,137 to train on, 300 for validation, 360 for test",
        "parameters": sum(p.numel() for p in model.parameters()),
        "accuracy": {name: round(accuracy(model, *part), 4) for name, part in parts.items()},
        "recipe": {"epochs": epochs, "batch_size": batch_size, "lr": lr, "seed": seed, "optimizer": "AdamW"},
    }
    (out / f"{digits_vit.NAME}.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    click.echo(json.dumps(card["accuracy"]))


if __name__ == "__main__":
    main()
