"""Hosts: adapters for model families. A host finds the sites of a model, reads them and puts mixers there."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from mixerzoo.data import ImageConfig
from mixerzoo.errors import MixerzooError, did_you_mean
from mixerzoo.spec import Site
from mixerzoo.units import Units

Stage = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """A module that looks like a site and cannot be one."""

    name: str
    reason: str


class Host(Protocol):
    """What a plugin registers to teach mixerzoo a model family. Models are in eval mode throughout."""

    @property
    def name(self) -> str:
        """Unique among hosts."""

    def model_names(self) -> Sequence[str]:
        """Return the `--model` names this host can load."""

    def load(self, name: str, checkpoint: Path | None) -> nn.Module:
        """Return a pretrained model. Raises MixerzooError with the way out."""

    def accepts(self, model: nn.Module) -> bool:
        """Whether a model object belongs to this family."""

    def architecture(self, model: nn.Module) -> dict[str, Any] | None:
        """Return JSON data from which `create` rebuilds the untrained model, or None if that cannot be known."""

    def create(self, architecture: Mapping[str, Any]) -> nn.Module:
        """Return the untrained model that `architecture` describes."""

    def image_config(self, model: nn.Module) -> ImageConfig:
        """Return how images must be prepared."""

    def find_sites(self, model: nn.Module) -> tuple[list[Site], list[Rejected]]:
        """Return the sites in forward order, and what looked like one with the reason why it is not."""

    def stages(self, model: nn.Module) -> list[Stage]:
        """Return functions whose composition, in order, is the model; one where it cannot be taken apart."""

    def is_classifier(self, model: nn.Module) -> bool:
        """Whether the output is logits over classes; otherwise it is an embedding."""

    def classifier_layer(self, model: nn.Module) -> str | None:
        """Return the path of the linear layer whose output is the model's, or None if there is none."""

    def attention_maps(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Return the attention (B, H, N, N) that the teacher's module at an attention site pays on x (B, N, D)."""

    def hidden_units(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Return the activated hidden units (B, N, hidden) of the teacher's module at an mlp site."""

    def weights(self, module: nn.Module, site: Site) -> dict[str, torch.Tensor]:
        """Return copies of the weight fields of AttentionView or MlpView, by field name."""

    def output_layer(self, module: nn.Module, site: Site) -> str | None:
        """Return the path of the linear layer whose output is the module's, or None if there is none."""

    def units(self, module: nn.Module, site: Site) -> Mapping[str, Units]:
        """Return the units of the teacher's own module that can be pruned, by kind: `hidden` of an MLP, `heads`."""


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """The pretrained model and all that is known about it.

    Attributes:
        name: as the user said it.
        model: float32, eval mode, gradients off.
        host: the adapter of its family.
        sites: in forward order.
        rejected: what looked like a site and is not.
        image: how images must be prepared.
        classifier: whether the output is logits.
        fingerprint: hash of the weights; part of every library key.
    """

    name: str
    model: nn.Module
    host: Host
    sites: tuple[Site, ...]
    rejected: tuple[Rejected, ...]
    image: ImageConfig
    classifier: bool
    fingerprint: str

    @property
    def params(self) -> int:
        """Number of parameters."""
        return count_params(self.model)

    def site(self, name: str) -> Site:
        """Return the site called `name`."""
        for site in self.sites:
            if site.name == name:
                return site
        raise MixerzooError(f"unknown site '{name}': {did_you_mean(name, [s.name for s in self.sites])}")


class Replacement(nn.Module):
    """What stands at a site in a student: the mixer, behind the call signature that hosts use.

    Raises:
        MixerzooError: if the model passes a mask or asks for causality that the mixer does not have.
    """

    def __init__(self, mixer: nn.Module, site: Site, *, masks: bool) -> None:
        super().__init__()
        self.mixer = mixer
        self.site_name = site.name
        self.causal = site.causal
        self.masks = masks

    def forward(
        self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False
    ) -> torch.Tensor:
        """Map (B, N, D) to (B, N, D). `attn_mask` may only hide whole tokens: bool, broadcastable from (B, 1, 1, N)."""
        if is_causal and not self.causal:
            raise MixerzooError(
                f"site '{self.site_name}': called with is_causal=True, but its mixer was built to look both ways"
            )
        if attn_mask is None:
            out: torch.Tensor = self.mixer(x)
            return out
        if not self.masks:
            raise MixerzooError(
                f"site '{self.site_name}': called with attn_mask, but its mixer does not take masks; "
                "choose mixers whose 'masks' column in `mixerzoo mixers` is set"
            )
        out = self.mixer(x, mask=self._token_mask(x, attn_mask))
        return out

    def _token_mask(self, x: torch.Tensor, attn_mask: torch.Tensor) -> torch.Tensor:
        B, N, _ = x.shape
        shape = tuple(attn_mask.shape)
        padding = shape == (B, 1, 1, N) or (shape[-1:] == (N,) and attn_mask.numel() == N)
        if attn_mask.dtype != torch.bool or not padding:
            raise MixerzooError(
                f"site '{self.site_name}': attn_mask of shape {shape} {attn_mask.dtype} is not a "
                f"padding mask; give bool of shape ({B}, 1, 1, {N}), True for real tokens"
            )
        return attn_mask.reshape(-1, N).expand(B, N)


def count_params(model: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(p.numel() for p in model.parameters())


def assemble(model: nn.Module, modules: Mapping[str, nn.Module]) -> nn.Module:
    """Return a copy of `model` with `modules` put at the named sites; all other weights are shared with it."""
    memo: dict[int, Any] = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    student = copy.deepcopy(model, memo)
    for name, module in modules.items():
        student.set_submodule(name, module)
    return student.eval()


def run_stages(stages: Sequence[Stage], hidden: torch.Tensor, *, first: int = 0) -> torch.Tensor:
    """Run `stages` from number `first` on."""
    for stage in stages[first:]:
        hidden = stage(hidden)
    return hidden


def fingerprint(model: nn.Module) -> str:
    """Return a hash of all parameters and buffers, with their names."""
    hasher = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        hasher.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        hasher.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()


def as_teacher(model: nn.Module, host: Host, *, name: str) -> Teacher:
    """Freeze `model`, find its sites, and describe it.

    Raises:
        MixerzooError: if it has no site.
    """
    model = model.eval().to(torch.float32).requires_grad_(False)
    sites, rejected = host.find_sites(model)
    if not sites:
        why = f" ({rejected[0].name}: {rejected[0].reason})" if rejected else ""
        raise MixerzooError(
            f"model '{name}': no site to replace in it{why}; a plain vision transformer of timm has them"
        )
    return Teacher(
        name=name,
        model=model,
        host=host,
        sites=tuple(sites),
        rejected=tuple(rejected),
        image=host.image_config(model),
        classifier=host.is_classifier(model),
        fingerprint=fingerprint(model),
    )
