"""mixerzoo's own plugin: the timm host, the kinds of data, the runtimes."""

from __future__ import annotations

from collections.abc import Callable

from mixerzoo.data import BUILTIN_DATASETS, DatasetSpec
from mixerzoo.hookspecs import hookimpl
from mixerzoo.hosts import Host
from mixerzoo.hosts.timm_vit import TimmVitHost
from mixerzoo.runtimes import BUILTIN_RUNTIMES
from mixerzoo.spec import RuntimeSpec


@hookimpl
def register_hosts(register: Callable[[Host], None]) -> None:
    """Register the timm host."""
    register(TimmVitHost())


@hookimpl
def register_datasets(register: Callable[[DatasetSpec], None]) -> None:
    """Register digits, .npz files and folders."""
    for spec in BUILTIN_DATASETS:
        register(spec)


@hookimpl
def register_runtimes(register: Callable[[RuntimeSpec], None]) -> None:
    """Register eager, inductor and onnxruntime."""
    for spec in BUILTIN_RUNTIMES:
        register(spec)
