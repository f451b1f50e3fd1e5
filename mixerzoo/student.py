"""Students: a teacher with a plan applied, from the library or as a checkpoint on disk."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from mixerzoo.data import ImageConfig
from mixerzoo.errors import MixerzooError, did_you_mean
from mixerzoo.files import read_json, write_json, write_tensors
from mixerzoo.hosts import Host, Replacement, Teacher
from mixerzoo.plan import Candidate, Plan
from mixerzoo.registry import get_registry
from mixerzoo.spec import Site

PLAN_FILE = "plan.json"
WEIGHTS_FILE = "model.safetensors"
PLAN_KEY = "mixerzoo"  # the metadata of a single safetensors file that holds the content of plan.json
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
    mixer = spec.make(site, candidate.width, dict(candidate.sizes))
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
            "host_plugin": _host_plugin(teacher.host.name),
            "image": asdict(teacher.image),
            "plan": student.plan.to_json(),
            "sites": [site.to_json() for site in teacher.sites],
            "plugins": {mixer: str(registry.mixers.origin(mixer)) for mixer in sorted(used)},
        },
    )


def read_plan(path: Path) -> dict[str, Any]:
    """Return what `plan.json` in a student's folder says, or the metadata of a single file.

    Raises:
        MixerzooError: if it is not there, or not JSON; its fields are looked at by `load_student`.
    """
    if not path.is_file():
        content = read_json(path / PLAN_FILE)
        where = path / PLAN_FILE
    else:
        try:
            with safe_open(path, framework="pt") as file:
                text = (file.metadata() or {}).get(PLAN_KEY)
            content, where = None if text is None else json.loads(text), path
        except (SafetensorError, OSError, ValueError) as error:
            raise MixerzooError(f"'{path}': not readable as a student ({error})") from None
        if content is None:
            raise MixerzooError(
                f"'{path}': weights without a plan; give a student's folder, "
                "or a file of `mixerzoo export --format safetensors`"
            )
    if not isinstance(content, dict):
        raise MixerzooError(f"'{where}': not a plan of mixerzoo (it holds a {type(content).__name__})")
    return content


def image_config(content: Mapping[str, Any]) -> ImageConfig:
    """Return how images were prepared for a student's teacher, from the content of `plan.json`.

    Raises:
        MixerzooError: if it does not say so.
    """
    try:
        said = content["image"]
        lists = {name: tuple(said[name]) for name in ("size", "mean", "std")}
        return ImageConfig(**{**said, **lists})
    except (LookupError, TypeError) as error:
        raise MixerzooError(f"plan: how its images are prepared cannot be read ({error!r})") from None


def load_student(path: Path, *, model: nn.Module | None = None) -> Student:
    """Rebuild a student from its folder; reads JSON and safetensors only, and builds registered mixers only.

    Args:
        path: holds `plan.json` and `model.safetensors`; or one safetensors file with the plan in its metadata.
        model: an instance of the teacher's architecture, for teachers that cannot be built by name; it is
            copied.

    Raises:
        MixerzooError: if something is missing or does not fit; missing plugins are named with their versions.
    """
    content = read_plan(path)
    single = path.is_file()
    try:
        plan = Plan.from_json(content["plan"])
        sites = [Site.from_json(site) for site in content["sites"]]
        plugins: dict[str, str] = dict(content["plugins"].items())
        architecture: dict[str, Any] | None = content["architecture"]
        host_name: str = content["host"]
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        where = path if single else path / PLAN_FILE
        raise MixerzooError(f"'{where}': not a plan of mixerzoo ({error!r})") from None
    _demand_plugins(path, plugins)
    model = _create(path, architecture, host_name, content) if model is None else copy.deepcopy(model)
    _put(model, plan, sites)
    file = path if single else path / WEIGHTS_FILE
    try:
        weights = load_file(file)
    except (SafetensorError, OSError) as error:
        raise MixerzooError(f"'{file}': not readable ({error})") from None
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        first = str(error).splitlines()[1:2] or [str(error)]
        raise MixerzooError(
            f"'{file}' does not fit its plan ({first[0].strip()}){_other_versions(plugins)}"
        ) from None
    return Student(plan=plan, model=model.eval())


def load(path: str | Path, *, model: nn.Module | None = None) -> nn.Module:
    """Return the student in a folder such as `runs/x/best`, in eval mode: images (B, C, H, W) to its output.

    Args:
        path: the folder, the run directory that holds it, or a file of `mixerzoo export --format safetensors`.
        model: an instance of the teacher's architecture, for teachers that cannot be built by name.

    Raises:
        MixerzooError: if the folder is not a student, or a plugin it needs is missing.
    """
    folder = Path(path)
    if not (folder / PLAN_FILE).exists() and (folder / "best" / PLAN_FILE).exists():
        folder = folder / "best"
    return load_student(folder, model=model).model


def _host_plugin(name: str) -> str | None:
    hosts = get_registry().hosts
    return str(hosts.origin(name)) if name in hosts else None


def _demand_plugins(path: Path, plugins: Mapping[str, str]) -> None:
    """Raise MixerzooError if a mixer is missing; one whose plugin is there and broken is told from one that is not."""
    registry = get_registry()
    missing = {mixer: origin for mixer, origin in plugins.items() if mixer not in registry.mixers}
    if not missing:
        return
    named = ", ".join(f"mixer '{mixer}' of {origin}" for mixer, origin in missing.items())
    names = {str(origin).rpartition(" ")[0] for origin in missing.values()}
    broken = [plugin for plugin in registry.broken if plugin.origin.distribution in names]
    if broken:
        way_out = f"plugin {broken[0].origin} is there and does not load: {broken[0].error}"
    else:
        way_out = "install that distribution" if len(names) == 1 else "install those distributions"
    raise MixerzooError(f"'{path}' needs {named}; {way_out}")


def _create(
    path: Path, architecture: Mapping[str, Any] | None, host_name: str, content: Mapping[str, Any]
) -> nn.Module:
    """Build the untrained teacher."""
    if architecture is None:
        raise MixerzooError(
            f"'{path}': its teacher '{content.get('teacher')}' cannot be built by name; "
            "pass an instance of it: mixerzoo.load(folder, model=...)"
        )
    registry, plugin = get_registry(), content.get("host_plugin")
    if plugin is not None and host_name not in registry.hosts:
        raise MixerzooError(
            f"unknown host '{host_name}': '{path}' needs it of {plugin}; install that distribution"
        )
    host: Host = registry.hosts.get(host_name)
    try:
        return host.create(architecture)
    except MixerzooError:
        raise
    except Exception as error:  # the file's words go to the model's library, which may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise MixerzooError(
            f"'{path}': its teacher cannot be rebuilt ({reason}); "
            "pass an instance of it: mixerzoo.load(folder, model=...)"
        ) from None


def _other_versions(plugins: Mapping[str, str]) -> str:
    """Return, for weights that do not fit, which plugins are not those that the student was made with."""
    mixers = get_registry().mixers
    here = {mixer: str(mixers.origin(mixer)) for mixer in plugins}
    others = sorted(
        {f"{there}, here is {here[mixer]}" for mixer, there in plugins.items() if there != here[mixer]}
    )
    return f"; it was made with {'; '.join(others)}" if others else ""


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
