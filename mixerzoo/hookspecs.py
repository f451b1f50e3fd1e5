"""The hooks a plugin may implement. Each is called once, when the registry is loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    import click

    from mixerzoo.data import DatasetSpec
    from mixerzoo.hosts import Host
    from mixerzoo.spec import MixerSpec, RuntimeSpec

GROUP = "mixerzoo"

hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)


@hookspec
def register_mixers(register: Callable[[MixerSpec], None]) -> None:
    """Register mixers: call `register(MixerSpec(...))` once for each."""


@hookspec
def register_hosts(register: Callable[[Host], None]) -> None:
    """Register adapters for model families: call `register(host)` once for each."""


@hookspec
def register_datasets(register: Callable[[DatasetSpec], None]) -> None:
    """Register kinds of `--data`: call `register(DatasetSpec(...))` once for each."""


@hookspec
def register_runtimes(register: Callable[[RuntimeSpec], None]) -> None:
    """Register what runs a student when it is timed: call `register(RuntimeSpec(...))` once for each."""


@hookspec
def register_commands(cli: click.Group) -> None:
    """Add commands to the `mixerzoo` command line, as with any Click group."""
