"""Students: a teacher with a plan applied, from the library or as a checkpoint on disk."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from mixerzoo.errors import MixerzooError, did_you_mean
from mixerzoo.files import read_json, write_json, write_tensors
from mixerzoo.hosts import Host, Replacement, Teacher
from mixerzoo.plan import Candidate, Plan
from mixerzoo.registry import get_registry
from mixerzoo.spec import Site

PLAN_FILE = "plan.json"
WEIGHTS_FILE = "model.safetensors"
SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Student:
    """A model and the plan it follows."""

    plan: Plan
    model: nn.Module


def make_replacement(
    candidate: Candidate, site: Site, state: Mapping[str, torch.Tensor] | None = None
) -> Replacement:
    """Build a candidate for a site, with the given weights.

    Raises:
        MixerzooError: for an unknown mixer, or weights that do not fit it.
    """
    spec = get_registry().mixers.get(candidate.mixer)
    mixer = spec.make(site, candidate.width)
    if state is not None:
        try:
            mixer.load_state_dict(dict(state))
        except RuntimeError as error:
            first = str(error).splitlines()[1:2] or [str(error)]
            raise MixerzooError(
                f"{candidate} at {site.name}: its weights do not fit ({first[0].strip()})"
            ) from None
    return Replacement(mixer.eval().requires_grad_(False), site, masks=spec.caps.masks)


def save_student(folder: Path, student: Student, teacher: Teacher) -> None:
    """Write `plan.json` and `model.safetensors`; the plan comes last, so that it only names a whole model."""
    registry = get_registry()
    used = {candidate.mixer for _, candidate in student.plan.choices if not candidate.is_keep}
    write_tensors(folder / WEIGHTS_FILE, student.model.state_dict())
    write_json(
        folder / PLAN_FILE,
        {
            "schema": SCHEMA,
            "teacher": teacher.name,
            "architecture": teacher.host.architecture(teacher.model),
            "host": teacher.host.name,
            "image": {
                "size": teacher.image.size,
                "mean": teacher.image.mean,
                "std": teacher.image.std,
                "interpolation": teacher.image.interpolation,
                "crop_pct": teacher.image.crop_pct,
            },
            "plan": student.plan.to_json(),
            "sites": [site.to_json() for site in teacher.sites],
            "plugins": {mixer: str(registry.mixers.origin(mixer)) for mixer in sorted(used)},
        },
    )


def load_student(folder: Path, *, model: nn.Module | None = None) -> Student:
    """Rebuild a student from its folder; reads JSON and safetensors only, and builds registered mixers only.

    Args:
        folder: holds `plan.json` and `model.safetensors`.
        model: an instance of the teacher's architecture, for teachers that cannot be built by name; it is
            copied.

    Raises:
        MixerzooError: if something is missing or does not fit; a missing plugin is named with its version.
    """
    content = read_json(folder / PLAN_FILE)
    try:
        plan = Plan.from_json(content["plan"])
        sites = [Site.from_json(site) for site in content["sites"]]
        plugins: dict[str, str] = content["plugins"]
        architecture: dict[str, Any] | None = content["architecture"]
        host_name: str = content["host"]
        needed = plugins.items()
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise MixerzooError(f"'{folder / PLAN_FILE}': not a plan of mixerzoo ({error!r})") from None
    registry = get_registry()
    for mixer, origin in needed:
        if mixer not in registry.mixers:
            raise MixerzooError(f"'{folder}' needs mixer '{mixer}' of {origin}; install that distribution")
    if model is None:
        if architecture is None:
            raise MixerzooError(
                f"'{folder}': its teacher '{content['teacher']}' cannot be built by name; "
                "pass an instance of it: mixerzoo.load(folder, model=...)"
            )
        host: Host = registry.hosts.get(host_name)
        try:
            model = host.create(architecture)
        except MixerzooError:
            raise
        except Exception as error:  # the file's words go to the model's library, which may raise anything
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise MixerzooError(
                f"'{folder}': its teacher cannot be rebuilt ({reason}); "
                "pass an instance of it: mixerzoo.load(folder, model=...)"
            ) from None
    else:
        model = copy.deepcopy(model)
    _put(model, plan, sites)
    try:
        weights = load_file(folder / WEIGHTS_FILE)
    except (SafetensorError, OSError) as error:
        raise MixerzooError(f"'{folder / WEIGHTS_FILE}': not readable ({error})") from None
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        first = str(error).splitlines()[1:2] or [str(error)]
        raise MixerzooError(f"'{folder / WEIGHTS_FILE}' does not fit its plan ({first[0].strip()})") from None
    return Student(plan=plan, model=model.eval())


def load(path: str | Path, *, model: nn.Module | None = None) -> nn.Module:
    """Return the student in a folder such as `runs/x/best`, in eval mode: images (B, C, H, W) to its output.

    Args:
        path: the folder, or the run directory that holds it.
        model: an instance of the teacher's architecture, for teachers that cannot be built by name.

    Raises:
        MixerzooError: if the folder is not a student, or a plugin it needs is missing.
    """
    folder = Path(path)
    if not (folder / PLAN_FILE).exists() and (folder / "best" / PLAN_FILE).exists():
        folder = folder / "best"
    return load_student(folder, model=model).model


def _put(model: nn.Module, plan: Plan, sites: Sequence[Site]) -> None:
    by_name = {site.name: site for site in sites}
    for name, candidate in plan.choices:
        if candidate.is_keep:
            continue
        if name not in by_name:
            raise MixerzooError(f"plan: '{name}' is not a site of its teacher: {did_you_mean(name, by_name)}")
        try:
            model.get_submodule(name)
        except AttributeError as error:
            raise MixerzooError(f"plan: the model has no site '{name}' ({error})") from None
        model.set_submodule(name, make_replacement(candidate, by_name[name]))
