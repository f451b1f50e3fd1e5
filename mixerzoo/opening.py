"""From what the user says to what it names: `--model` and `--data`, opened by whatever plugin knows them."""

from __future__ import annotations

import copy
from pathlib import Path

from torch import nn

from mixerzoo.data import Dataset
from mixerzoo.errors import MixerzooError, did_you_mean
from mixerzoo.hosts import Teacher, as_teacher
from mixerzoo.registry import get_registry


def open_teacher(name: str, checkpoint: Path | None = None) -> Teacher:
    """Load the teacher called `name`, with the weights of a local file if one is given.

    Raises:
        MixerzooError: for an unknown name (with a suggestion), weights that do not fit, or no sites.
    """
    hosts = list(get_registry().hosts)
    for host in hosts:
        if name in host.model_names() or name.split(".")[0] in host.model_names():
            return as_teacher(host.load(name, checkpoint), host, name=name)
    known = [known for host in hosts for known in host.model_names()]
    raise MixerzooError(f"unknown model '{name}': {did_you_mean(name, known)}")


def adopt_teacher(model: nn.Module) -> Teacher:
    """Describe a model object; a copy is frozen, the object itself is left as it is.

    Raises:
        MixerzooError: if no host knows its family, or it has no sites.
    """
    hosts = list(get_registry().hosts)
    for host in hosts:
        if host.accepts(model):
            return as_teacher(copy.deepcopy(model), host, name=type(model).__name__)
    raise MixerzooError(
        f"model of class {type(model).__name__}: no host knows it (hosts: {', '.join(h.name for h in hosts)}); "
        "see register_hosts"
    )


def open_data(source: str) -> Dataset:
    """Open a `--data` value with the last registered kind of data that accepts it.

    Raises:
        MixerzooError: if it is not there, empty, or not what it looks like.
    """
    spec = next(spec for spec in reversed(list(get_registry().datasets)) if spec.accepts(source))
    return spec.open(source)
