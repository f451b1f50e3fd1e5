"""FAR's student: every attention site replaced at once, and what of it is compared with the teacher.

FAR compares head outputs, before the output projection. Which tensor that is shows in the weights: in the teacher,
the input of the linear layer that holds the output projection; in a mixer that took this projection over as its
readout, the input of its readout.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mixerzoo.capture import capture
from mixerzoo.errors import MixerzooError
from mixerzoo.hosts import Replacement, Teacher, assemble
from mixerzoo.plan import Candidate
from mixerzoo.registry import get_registry
from mixerzoo.spec import MixerSpec, Site
from mixerzoo.student import make_replacement

HEADS = "head outputs, before the output projection"
OUTPUTS = "outputs of the sites"


def attention_sites(teacher: Teacher, candidate: Candidate) -> list[Site]:
    """Return the sites that are replaced.

    Raises:
        MixerzooError: if there are none, or the candidate cannot stand at one of them, or has nothing to train.
    """
    spec = get_registry().mixers.get(candidate.mixer)
    sites = [site for site in teacher.sites if site.kind == "attention"]
    if not sites:
        raise MixerzooError(f"model '{teacher.name}': it has no attention site; FAR replaces attention")
    if "attention" not in spec.kinds:
        raise MixerzooError(
            f"mixer '{spec.name}' stands at {', '.join(sorted(spec.kinds))} sites; FAR replaces attention"
        )
    if candidate.width not in spec.widths:
        widths = ", ".join(f"{width:g}" for width in spec.widths)
        raise MixerzooError(f"--mixer {candidate}: widths of '{spec.name}' are {widths}")
    for site in sites:
        if next(spec.outline(site, candidate.width).parameters(), None) is None:
            raise MixerzooError(f"mixer '{spec.name}' has no parameters to train")
    return sites


def start_student(
    teacher: Teacher,
    candidate: Candidate,
    sites: Iterable[Site],
    batches: Iterable[torch.Tensor],
    images: int,
    *,
    seed: int,
) -> nn.Module:
    """Return the student as its mixers inherit, with weights of its own.

    Args:
        teacher: the teacher.
        candidate: what stands at `sites`.
        sites: the sites to replace.
        batches: images (B, C, H, W) that mean attention is taken on, for mixers that inherit it.
        images: how many they are.
        seed: of what is not inherited.
    """
    spec = get_registry().mixers.get(candidate.mixer)
    views = {} if spec.inherit is None else capture(teacher, batches, images).sites
    modules: dict[str, nn.Module] = {}
    for site in sites:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_seed(f"{candidate} {site.name} {seed}"))
            modules[site.name] = replacement = make_replacement(candidate, site)
            if spec.inherit is not None:
                with torch.no_grad():
                    spec.inherit(replacement.mixer, views[site.name].view)
    return copy.deepcopy(assemble(teacher.model, modules))


def _seed(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])


@dataclass(frozen=True, kw_only=True)
class Compared:
    """What of a student is held against its teacher in stage 1.

    Attributes:
        what: in words.
        teacher: site -> the teacher's module.
        student: site -> the student's module.
        inputs: whether the inputs of these modules are compared; else their outputs.
        frozen: parameters of the student's mixers that stage 1 leaves as they are.
    """

    what: str
    teacher: Mapping[str, nn.Module]
    student: Mapping[str, nn.Module]
    inputs: bool
    frozen: frozenset[nn.Parameter]


def compared(teacher: Teacher, student: nn.Module, sites: Iterable[Site], spec: MixerSpec) -> Compared:
    """Return head outputs where the mixers of a fresh student hold the teacher's output projection, else outputs."""
    sites = list(sites)
    projections = {site.name: output_projection(teacher, site) for site in sites}
    readouts: dict[str, nn.Module] = {}
    if spec.readout is not None:
        readouts = {
            site.name: student.get_submodule(f"{site.name}.mixer").get_submodule(spec.readout)
            for site in sites
        }
    if readouts and all(_same_linear(projection, readouts[name]) for name, projection in projections.items()):
        return Compared(
            what=HEADS,
            teacher={name: module for name, module in projections.items() if module is not None},
            student=readouts,
            inputs=True,
            frozen=frozenset(p for module in readouts.values() for p in module.parameters()),
        )
    return Compared(
        what=OUTPUTS,
        teacher={site.name: teacher.model.get_submodule(site.name) for site in sites},
        student={site.name: student.get_submodule(site.name) for site in sites},
        inputs=False,
        frozen=frozenset(),
    )


def output_projection(teacher: Teacher, site: Site) -> nn.Linear | None:
    """Return the linear layer of the teacher's attention that mixes its heads, or None if it is not one layer."""
    module = teacher.model.get_submodule(site.name)
    weight = teacher.host.weights(module, site)["out_weight"]
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    return next((layer for layer in layers if torch.equal(layer.weight, weight)), None)


def _same_linear(one: nn.Linear | None, other: nn.Module) -> bool:
    if one is None or not isinstance(other, nn.Linear) or not torch.equal(one.weight, other.weight):
        return False
    biases = (torch.zeros(layer.out_features) if layer.bias is None else layer.bias for layer in (one, other))
    return torch.equal(*biases)


def set_trainable(student: nn.Module, stage: int, kept: Compared) -> list[nn.Parameter]:
    """Let the replaced mixers train in stage 1, without what is frozen, and everything in stage 2; return these."""
    if stage == 1:
        student.requires_grad_(False)
        for module in student.modules():
            if isinstance(module, Replacement):
                for parameter in module.parameters():
                    parameter.requires_grad_(parameter not in kept.frozen)
    else:
        student.requires_grad_(True)
    return [parameter for parameter in student.parameters() if parameter.requires_grad]


class Tap:
    """Records what goes into, or comes out of, some modules during a `with` block; `seen` has the last, by site."""

    def __init__(self, modules: Mapping[str, nn.Module], *, inputs: bool) -> None:
        self.modules = modules
        self.inputs = inputs
        self.seen: dict[str, torch.Tensor] = {}

    def __enter__(self) -> Tap:
        self._handles = [
            module.register_forward_hook(
                lambda _module, args, output, name=name: self._record(name, args, output)
            )
            for name, module in self.modules.items()
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _record(self, name: str, args: tuple[Any, ...], output: torch.Tensor) -> None:
        self.seen[name] = args[0] if self.inputs else output
