"""Host for timm's vision transformers: plain ViT, DeiT, DINOv2 and kin, found by behaviour, not by class name.

A module is an attention site if, watched during a forward pass, it is called once with one (B, N, D) tensor and
its output is what softmax attention with its own weights gives; likewise an MLP. Whatever only looks like a site
is listed with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from mixerzoo.compat import guard_torchvision
from mixerzoo.data import ImageConfig
from mixerzoo.errors import MixerzooError
from mixerzoo.hosts import Rejected, Stage, run_stages, timm_parts
from mixerzoo.spec import Kind, Site
from mixerzoo.teachers import digits_vit
from mixerzoo.units import Units

COLOURS = 3  # channels of a colour image
TOLERANCE = 1e-3  # of recomputed outputs, relative to their largest value


class TimmVitHost:
    """Adapter for timm models whose blocks are `x + scale(attn(norm(x)))` and `x + scale(mlp(norm(x)))`."""

    name = "timm"

    def model_names(self) -> Sequence[str]:
        """Return timm's names and the embedded teacher's."""
        return _timm_names()

    def load(self, name: str, checkpoint: Path | None) -> nn.Module:
        """Return a pretrained timm model, or one with the weights of a safetensors file."""
        if name == digits_vit.NAME and checkpoint is None:
            return digits_vit.load()
        if checkpoint is not None:
            return _load_checkpoint(name, checkpoint)
        timm = _timm()
        try:
            model: nn.Module = timm.create_model(name, pretrained=True)
        except Exception as error:  # hub, network and naming errors come in many types
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise MixerzooError(
                f"model '{name}': its pretrained weights cannot be had ({reason}); "
                "give a local file with --checkpoint FILE.safetensors"
            ) from None
        return model

    def accepts(self, model: nn.Module) -> bool:
        """Whether the model has what timm's models have."""
        return hasattr(model, "forward_features") and hasattr(model, "pretrained_cfg")

    def architecture(self, model: nn.Module) -> dict[str, Any] | None:
        """Return name, classes, image size and channels, if they rebuild the same model."""
        name = _config(model).get("architecture") or digits_vit.NAME
        described: dict[str, Any] = {"host": self.name, "model": name}
        if name != digits_vit.NAME:
            described |= {"num_classes": int(getattr(model, "num_classes", 0))}
            size = getattr(getattr(model, "patch_embed", None), "img_size", None)
            if size is not None:
                described |= {"img_size": [int(side) for side in size]}
            channels = _channels(model)
            if channels not in (None, COLOURS):  # which is what timm builds unasked
                described |= {"in_chans": channels}
        try:
            rebuilt = self.create(described)
            rebuilt.load_state_dict(model.state_dict())
            # Same shapes are not enough: heads, activation and pooling leave no trace in them.
            same = _agree(rebuilt, model, self.image_config(model))
        except Exception:  # a class that timm does not build by name, or other arguments: not knowable
            return None
        return described if same else None

    def create(self, architecture: Mapping[str, Any]) -> nn.Module:
        """Return the untrained model."""
        if architecture["model"] == digits_vit.NAME:
            return digits_vit.build().eval()
        # Names such as hf-hub:... would make timm ask the network; a file must not be able to.
        if architecture["model"] not in _timm_names():
            raise MixerzooError(f"architecture '{architecture['model']}': not a model of the installed timm")
        kwargs = {
            key: architecture[key] for key in ("num_classes", "img_size", "in_chans") if key in architecture
        }
        if "img_size" in kwargs:
            kwargs["img_size"] = tuple(kwargs["img_size"])
        model: nn.Module = _timm().create_model(architecture["model"], pretrained=False, **kwargs)
        return model.eval()

    def image_config(self, model: nn.Module) -> ImageConfig:
        """Return timm's data configuration, at the size and for the channels that the patch embedding is built for.

        Raises:
            MixerzooError: if these are neither one nor three.
        """
        guard_torchvision()
        from timm.data import resolve_data_config

        config = resolve_data_config(_config(model), model=model)
        channels, height, width = config["input_size"]
        built_for = getattr(getattr(model, "patch_embed", None), "img_size", None)
        if built_for is not None:
            height, width = built_for
        mean, std = tuple(config["mean"]), tuple(config["std"])
        channels = _channels(model) or channels
        if channels not in (1, COLOURS):
            raise MixerzooError(
                f"a model for images of {channels} channels: images have 1 (grey) or {COLOURS} (colour); "
                "give a model for such ones"
            )
        if channels != len(mean):  # its weights were trained on images of others
            mean, std = ((sum(values) / len(values),) * channels for values in (mean, std))
        return ImageConfig(
            size=(channels, int(height), int(width)),
            mean=mean,
            std=std,
            interpolation=config["interpolation"],
            # A student made for one size is timed and judged at it: nothing is cropped away at another one.
            crop_pct=config["crop_pct"] if (height, width) == tuple(config["input_size"][1:]) else 1.0,
            crop_mode=config["crop_mode"],
        )

    def is_classifier(self, model: nn.Module) -> bool:
        """Whether there is a classification head."""
        return int(getattr(model, "num_classes", 0)) > 0

    @torch.inference_mode()
    def find_sites(self, model: nn.Module) -> tuple[list[Site], list[Rejected]]:
        """Watch one forward pass and keep the modules that behave like attention or like an MLP."""
        config = self.image_config(model)
        example = torch.randn(2, *config.size, generator=torch.Generator().manual_seed(0))
        suspects = {name: kind for name, module in model.named_modules() if (kind := _looks_like(module))}
        calls = _watch(model, example, suspects)
        prefix = int(getattr(model, "num_prefix_tokens", 0))
        stages = len(self.stages(model))
        sites: list[Site] = []
        rejected: list[Rejected] = []
        for name in sorted(calls, key=lambda name: calls[name].order):
            kind, call, module = suspects[name], calls[name], model.get_submodule(name)
            reason = call.reason or self._misbehaves(module, kind, call)
            if reason:
                rejected.append(Rejected(name=name, reason=reason))
                continue
            _, N, D = call.x.shape
            norm, scale = _branch(model, name, calls[name])
            grid = _grid(model)
            sites.append(
                Site(
                    name=name,
                    kind=kind,
                    index=len(sites),
                    stage=_stage(name, stages),
                    dim=D,
                    heads=int(module.num_heads) if kind == "attention" else 1,  # type: ignore[arg-type]
                    tokens=N,
                    prefix=prefix,
                    grid=grid if grid and grid[0] * grid[1] + prefix == N else None,
                    hidden=timm_parts.hidden_size(module) if kind == "mlp" else None,
                    activation=_activation(module) if kind == "mlp" else None,
                    gated=kind == "mlp" and timm_parts.is_gated(module),
                    norm=norm,
                    scale=scale,
                )
            )
        rejected += [
            Rejected(name=name, reason="it is not called in a forward pass")
            for name in suspects
            if name not in calls
        ]
        return sites, rejected

    def stages(self, model: nn.Module) -> list[Stage]:
        """Return embedding, blocks, head where that composition is the model; else the model as one stage."""
        parts = ("patch_embed", "_pos_embed", "norm_pre", "blocks", "norm", "forward_head")
        if not all(hasattr(model, part) for part in parts) or not isinstance(model.blocks, nn.Sequential):
            return [model]
        m: Any = model

        def embed(images: torch.Tensor) -> torch.Tensor:
            x: torch.Tensor = m.norm_pre(m.patch_drop(m._pos_embed(m.patch_embed(images))))
            return x

        def head(x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = m.forward_head(m.norm(x))
            return out

        stages: list[Stage] = [embed, *m.blocks, head]
        return stages if _composes(model, stages, self.image_config(model)) else [model]

    def classifier_layer(self, model: nn.Module) -> str | None:
        """Return the path of timm's classifier where that is a single linear layer."""
        m: Any = model
        found = m.get_classifier() if hasattr(m, "get_classifier") else None
        names = (name for name, module in model.named_modules() if module is found)
        return next(names, None) if isinstance(found, nn.Linear) else None

    def attention_maps(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Return softmax(q k^T / sqrt(K)), (B, H, N, N), with the module's own q and k norms."""
        m: Any = module
        q, k, _ = _qkv(module, x)
        maps: torch.Tensor = (q * m.scale @ k.transpose(-2, -1)).softmax(-1)
        return maps

    def hidden_units(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Return act(fc1(x)), or act(gate) * value of a gated MLP: (B, N, hidden)."""
        return timm_parts.hidden_units(module, x)

    def weights(self, module: nn.Module, site: Site) -> dict[str, torch.Tensor]:
        """Return copies of the module's weights, split into q, k, v and output, or into in and out."""
        m: Any = module
        if site.kind == "mlp":
            return timm_parts.mlp_weights(module)
        weight, bias = timm_parts.parts(m.qkv)
        out_weight, out_bias = timm_parts.parts(m.proj)
        found = {"out_weight": out_weight, "out_bias": out_bias}
        for letter, w, b in zip("qkv", weight.chunk(3), bias.chunk(3), strict=True):
            found |= {f"{letter}_weight": w.clone(), f"{letter}_bias": b.clone()}
        return found

    def output_layer(self, module: nn.Module, site: Site) -> str | None:
        """Return the module's last linear layer: `fc2` of an MLP, `proj` of attention."""
        name = "fc2" if site.kind == "mlp" else "proj"
        return name if isinstance(getattr(module, name, None), nn.Linear) else None

    def units(self, module: nn.Module, site: Site) -> Mapping[str, Units]:
        """Return the hidden units of an MLP, or the heads of an attention without norms inside."""
        return timm_parts.units(module, site.kind)

    def _misbehaves(self, module: nn.Module, kind: Kind, call: _Call) -> str | None:
        """Return why the module's output is not what its weights say, or None."""
        m: Any = module
        try:
            if kind == "attention":
                _, _, v = _qkv(module, call.x)
                mixed = (self.attention_maps(module, call.x) @ v).transpose(1, 2).flatten(2)
                expected = m.proj(mixed)
            else:
                expected = m.fc2(self.hidden_units(module, call.x))
        except (RuntimeError, AttributeError, TypeError) as error:
            return f"{type(module).__name__} is built differently ({str(error).splitlines()[0][:80]})"
        if expected.shape != call.y.shape or not torch.isfinite(expected).all():
            return f"{type(module).__name__}: {tuple(call.x.shape)} becomes {tuple(call.y.shape)}"
        error_size = float((expected - call.y).abs().max() / call.y.abs().max().clamp_min(1e-12))
        if error_size > TOLERANCE:
            what = "softmax(q k) v" if kind == "attention" else timm_parts.formula(module)
            return f"{type(module).__name__} is more than {what} (relative difference {error_size:.1g})"
        if kind == "attention" and m.qkv.out_features != 3 * call.x.shape[-1]:
            return f"heads x head width is {m.qkv.out_features // 3}, not the model width {call.x.shape[-1]}"
        return None


class _Call:
    """What was seen of one suspect during the watched forward pass."""

    def __init__(self, order: int) -> None:
        self.order = order
        self.count = 0
        self.x = torch.empty(0)
        self.y = torch.empty(0)
        self.residual: dict[str, torch.Tensor] = {}
        self.reason: str | None = None


def _watch(model: nn.Module, example: torch.Tensor, suspects: Mapping[str, Kind]) -> dict[str, _Call]:
    calls: dict[str, _Call] = {}
    norm_inputs: dict[str, torch.Tensor] = {}
    handles = []

    def seen(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        call = calls.setdefault(name, _Call(len(calls)))
        call.count += 1
        extra = [key for key, value in kwargs.items() if value is not None and value is not False]
        if call.count > 1:
            call.reason = "it is called more than once in a forward pass"
        elif len(args) != 1 or extra:
            call.reason = f"it takes more than the tokens ({', '.join(extra) or f'{len(args)} arguments'})"
        elif not isinstance(output, torch.Tensor) or args[0].ndim != 3 or output.shape != args[0].shape:
            shape = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
            call.reason = f"it maps {tuple(args[0].shape)} to {shape}, not (B, N, D) to (B, N, D)"
        elif args[0].shape[0] != len(example):
            call.reason = f"it works on windows: {tuple(args[0].shape)} for {len(example)} images"
        else:
            call.x, call.y = args[0], output

    for name in suspects:
        module = model.get_submodule(name)
        handles.append(
            module.register_forward_hook(
                lambda _m, args, kwargs, output, name=name: seen(name, args, kwargs, output), with_kwargs=True
            )
        )
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in ("norm1", "norm2"):
            handles.append(
                module.register_forward_hook(
                    lambda _m, args, output, name=name: norm_inputs.__setitem__(name, args[0])
                )
            )
    try:
        model(example)
    finally:
        for handle in handles:
            handle.remove()
    for name, call in calls.items():
        parent = name.rpartition(".")[0]
        call.residual = {key: x for key, x in norm_inputs.items() if key.rpartition(".")[0] == parent}
    return calls


def _branch(model: nn.Module, name: str, call: _Call) -> tuple[str | None, str | None]:
    """Return the paths of the norm before a site and of the layer scale after it, if the block is pre-norm."""
    parent = name.rpartition(".")[0]
    number = "1" if name.endswith(".attn") else "2"
    norm, scale = f"{parent}.norm{number}", f"{parent}.ls{number}"
    block: Any = model.get_submodule(parent)
    after = getattr(block, f"ls{number}", None)
    plain = after is None and getattr(block, f"gamma_{number}", call) is None  # EVA's, without a layer scale
    if norm not in call.residual or not (plain or isinstance(after, nn.Module)):
        return None, None
    if not torch.equal(model.get_submodule(norm)(call.residual[norm]), call.x):
        return None, None
    return norm, None if plain or isinstance(after, nn.Identity) else scale


def _composes(model: nn.Module, stages: list[Stage], config: ImageConfig) -> bool:
    example = torch.randn(1, *config.size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return _close(run_stages(stages, example), model(example))


def _agree(one: nn.Module, other: nn.Module, config: ImageConfig) -> bool:
    example = torch.randn(1, *config.size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return _close(one(example), other(example))


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    # A student that has gone to NaN still has its teacher's stages.
    return torch.allclose(one, other, rtol=1e-4, atol=1e-5, equal_nan=True)


def _stage(name: str, stages: int) -> int:
    """Return the stage of a module: its block's, or the head's where it is in no block."""
    if stages == 1:
        return 0
    return int(name.split(".")[1]) + 1 if name.startswith("blocks.") else stages - 1


def _looks_like(module: nn.Module) -> Kind | None:
    if all(hasattr(module, part) for part in ("num_heads", "proj")) and (
        hasattr(module, "qkv") or hasattr(module, "q")
    ):
        return "attention"
    return "mlp" if timm_parts.is_mlp(module) else None


def _qkv(module: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    m: Any = module
    B, N, _ = x.shape
    q, k, v = m.qkv(x).reshape(B, N, 3, m.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    q_norm, k_norm = getattr(m, "q_norm", nn.Identity()), getattr(m, "k_norm", nn.Identity())
    return q_norm(q), k_norm(k), v


def _activation(module: nn.Module) -> str:
    act: Any = module.act
    if isinstance(act, nn.GELU):
        return "gelu" if act.approximate == "none" else "gelu_tanh"
    return {"QuickGELU": "quick_gelu", "SiLU": "silu", "ReLU": "relu", "GELUTanh": "gelu_tanh"}.get(
        type(act).__name__, type(act).__name__.lower()
    )


def _grid(model: nn.Module) -> tuple[int, int] | None:
    size = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    return None if size is None else (int(size[0]), int(size[1]))


def _channels(model: nn.Module) -> int | None:
    """Return how many channels the patch embedding takes: timm's configuration is of the pretrained weights."""
    found = getattr(getattr(getattr(model, "patch_embed", None), "proj", None), "in_channels", None)
    return None if found is None else int(found)


def _config(model: nn.Module) -> dict[str, Any]:
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    return dict(config) if isinstance(config, Mapping) else dict(config.to_dict())


def _timm() -> Any:
    guard_torchvision()
    import timm

    return timm


@cache
def _timm_names() -> tuple[str, ...]:
    return (digits_vit.NAME, *_timm().list_models())


def _load_checkpoint(name: str, checkpoint: Path) -> nn.Module:
    """Build `name` for the classes, the image size and the channels that the file's weights show, and load them."""
    if not checkpoint.is_file():
        raise MixerzooError(f"checkpoint '{checkpoint}': no such file")
    try:
        state = load_file(checkpoint)
    except (SafetensorError, OSError) as error:
        raise MixerzooError(
            f"checkpoint '{checkpoint}': not a safetensors file ({error}); "
            "convert it with safetensors.torch.save_file(state_dict, path)"
        ) from None
    if name == digits_vit.NAME:
        model = digits_vit.build()
    else:
        kwargs: dict[str, Any] = {"num_classes": len(state["head.weight"]) if "head.weight" in state else 0}
        size = _image_size(name, state, checkpoint)
        if size is not None:
            kwargs["img_size"] = size
        patches = state.get("patch_embed.proj.weight")
        if patches is not None and patches.ndim == 4:
            kwargs["in_chans"] = patches.shape[1]
        model = _untrained(name, checkpoint, **kwargs)
    expected = model.state_dict()
    for key in sorted(expected.keys() | state.keys()):
        if key not in state:
            raise MixerzooError(
                f"checkpoint '{checkpoint}' does not fit model '{name}': '{key}' is missing in it"
            )
        if key not in expected:
            raise MixerzooError(
                f"checkpoint '{checkpoint}' does not fit model '{name}': it has an extra '{key}'"
            )
        if state[key].shape != expected[key].shape:
            raise MixerzooError(
                f"checkpoint '{checkpoint}' does not fit model '{name}': '{key}' is {tuple(state[key].shape)}, "
                f"not {tuple(expected[key].shape)}"
            )
    model.load_state_dict(state)
    return model


def _untrained(name: str, checkpoint: Path, **kwargs: Any) -> nn.Module:
    """Build timm's model for the weights of a file."""
    try:
        model: nn.Module = _timm().create_model(name, pretrained=False, **kwargs)
    except Exception as error:  # timm raises another type for every argument that a model does not take
        raise MixerzooError(
            f"model '{name}': cannot be built for checkpoint '{checkpoint}' ({' '.join(str(error).split())[:200]}); "
            "give the name of the model that its weights are of, without what follows the dot"
        ) from None
    return model


def _image_size(name: str, state: Mapping[str, torch.Tensor], checkpoint: Path) -> tuple[int, int] | None:
    """Return the square image size that the position embedding belongs to, where timm's model can be built so."""
    positions = state.get("pos_embed")
    if positions is None or positions.ndim != 3:
        return None
    reference: Any = _untrained(name, checkpoint)
    if "pos_embed" not in reference.state_dict() or not hasattr(reference, "patch_embed"):
        return None
    extra = reference.pos_embed.shape[1] - reference.patch_embed.num_patches
    side = round(max(positions.shape[1] - extra, 1) ** 0.5)
    patch = reference.patch_embed.patch_size
    return (side * int(patch[0]), side * int(patch[1]))
