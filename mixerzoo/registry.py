"""All that plugins offer, loaded one by one so that a broken plugin harms nobody but itself."""

from __future__ import annotations

import importlib
import inspect
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import pluggy

from mixerzoo import hookspecs
from mixerzoo.errors import MixerzooError, did_you_mean
from mixerzoo.spec import MixerSpec

if TYPE_CHECKING:
    import click

    from mixerzoo.data import DatasetSpec
    from mixerzoo.hosts import Host
    from mixerzoo.spec import RuntimeSpec

STRICT_VARIABLE = "MIXERZOO_STRICT"


class Named(Protocol):
    """Anything a plugin can register."""

    @property
    def name(self) -> str:
        """Unique among its kind."""


T = TypeVar("T", bound=Named)


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a registered thing comes from."""

    plugin: str
    distribution: str
    version: str

    def __str__(self) -> str:
        return f"{self.distribution} {self.version}"


@dataclass(frozen=True, kw_only=True)
class BrokenPlugin:
    """A plugin that could not be used, and why, in one line."""

    origin: Origin
    error: str


class Shelf(Generic[T]):
    """Named things of one kind, each with its origin; kept in order of registration."""

    def __init__(self, what: str, of: type | None = None) -> None:
        self.what = what
        self.of = of
        self._items: dict[str, tuple[T, Origin]] = {}

    def add(self, item: T, origin: Origin) -> None:
        """Add an item.

        Raises:
            MixerzooError: if the name is taken; both distributions are named. Also if it is not an item.
        """
        if self.of is not None and not isinstance(item, self.of):
            raise MixerzooError(
                f"{origin} registers {item!r} as a {self.what}: it is not a {self.of.__name__}"
            )
        if item.name in self._items:
            raise MixerzooError(
                f"{self.what} '{item.name}' of {origin} is already registered by {self._items[item.name][1]}; "
                "rename one or uninstall one"
            )
        self._items[item.name] = (item, origin)

    def get(self, name: str) -> T:
        """Return the item called `name`.

        Raises:
            MixerzooError: if there is none, with a suggestion.
        """
        if name not in self._items:
            raise MixerzooError(f"unknown {self.what} '{name}': {did_you_mean(name, self._items)}")
        return self._items[name][0]

    def origin(self, name: str) -> Origin:
        """Return where the item called `name` comes from."""
        self.get(name)
        return self._items[name][1]

    def __contains__(self, name: str) -> bool:
        return name in self._items

    def __iter__(self) -> Iterator[T]:
        return (item for item, _ in self._items.values())

    def __len__(self) -> int:
        return len(self._items)

    def snapshot(self) -> dict[str, tuple[T, Origin]]:
        """Return a copy of the content, to be given back to `restore`."""
        return dict(self._items)

    def restore(self, content: dict[str, tuple[T, Origin]]) -> None:
        """Go back to a snapshot."""
        self._items = dict(content)


@dataclass(kw_only=True)
class Registry:
    """What all plugins registered, and which could not."""

    mixers: Shelf[MixerSpec] = field(default_factory=lambda: Shelf("mixer", MixerSpec))
    hosts: Shelf[Host] = field(default_factory=lambda: Shelf("host"))
    datasets: Shelf[DatasetSpec] = field(default_factory=lambda: Shelf("data set"))
    runtimes: Shelf[RuntimeSpec] = field(default_factory=lambda: Shelf("runtime"))
    broken: list[BrokenPlugin] = field(default_factory=list)
    plugins: list[tuple[Origin, Any]] = field(default_factory=list)

    def load(self, name: str, origin: Origin, module: Callable[[], Any], *, strict: bool) -> None:
        """Load one plugin: import it, check its hooks, call them; all of it or nothing of it.

        Raises:
            Exception: whatever went wrong, if `strict`; otherwise it is listed in `broken`.
        """
        shelves: tuple[Shelf[Any], ...] = (self.mixers, self.hosts, self.datasets, self.runtimes)
        before = [shelf.snapshot() for shelf in shelves]
        manager = pluggy.PluginManager(hookspecs.GROUP)
        manager.add_hookspecs(hookspecs)
        try:
            plugin = module()
            manager.register(plugin, name=name)
            self._refuse_unheard(manager, plugin)
            for shelf, hook in zip(
                shelves,
                (
                    manager.hook.register_mixers,
                    manager.hook.register_hosts,
                    manager.hook.register_datasets,
                    manager.hook.register_runtimes,
                ),
                strict=True,
            ):
                hook(register=lambda item, shelf=shelf: shelf.add(item, origin))
        except (Exception, SystemExit) as error:  # sys.exit() in a plugin is no reason to leave either
            for shelf, content in zip(shelves, before, strict=True):
                shelf.restore(content)
            if strict:
                raise
            self.broken.append(BrokenPlugin(origin=origin, error=_one_line(error)))
            return
        self.plugins.append((origin, plugin))

    @staticmethod
    def _refuse_unheard(manager: pluggy.PluginManager, plugin: Any) -> None:
        """Refuse hooks that would silently never be called: misspelt, or without their decorator."""
        try:
            manager.check_pending()
        except pluggy.PluginValidationError as error:
            raise MixerzooError(str(error)) from None
        hooks = {name for name in dir(hookspecs) if name.startswith("register_")}
        heard = {caller.name for caller in manager.get_hookcallers(plugin) or ()}
        for name, value in inspect.getmembers(plugin, inspect.isroutine):
            imported = inspect.ismodule(plugin) and value.__module__ != plugin.__name__
            if not name.startswith("register_") or name in heard or imported:
                continue
            if name in hooks:
                raise MixerzooError(f"hook '{name}' is never called: decorate it with @mixerzoo.hookimpl")
            raise MixerzooError(f"unknown hook '{name}': {did_you_mean(name, hooks)}")

    def add_commands(self, cli: click.Group, *, strict: bool) -> None:
        """Let every plugin add its commands; a plugin that fails to is listed in `broken`."""
        for origin, plugin in self.plugins:
            manager = pluggy.PluginManager(hookspecs.GROUP)
            manager.add_hookspecs(hookspecs)
            manager.register(plugin)
            before = dict(cli.commands)
            try:
                manager.hook.register_commands(cli=cli)
                taken = [name for name in before if cli.commands.get(name) is not before[name]]
                if taken:
                    raise MixerzooError(f"command '{taken[0]}' exists already; add yours under another name")
            except (Exception, SystemExit) as error:
                cli.commands = before
                if strict:
                    raise
                self.broken.append(BrokenPlugin(origin=origin, error=_one_line(error)))

    def versions(self) -> dict[str, str]:
        """Return distribution -> version of every plugin in use."""
        return {origin.distribution: origin.version for origin, _ in self.plugins}


def _one_line(error: BaseException) -> str:
    # The last frames of an ImportError are those of the import machinery, and tell nobody anything.
    machinery = ("<frozen", os.path.dirname(importlib.__file__), __file__)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(machinery)]
    where = (
        ""
        if not frames or isinstance(error, MixerzooError)
        else f" ({frames[-1].filename}:{frames[-1].lineno})"
    )
    return " ".join(f"{type(error).__name__}: {error}".split()) + where


def _origin(entry: EntryPoint) -> Origin:
    dist = entry.dist
    return Origin(
        plugin=entry.name,
        distribution="unknown" if dist is None else dist.name,
        version="" if dist is None else dist.version,
    )


def is_strict() -> bool:
    """Whether MIXERZOO_STRICT=1 asks for a broken plugin to be an error."""
    return os.environ.get(STRICT_VARIABLE, "") not in ("", "0")


def load_registry(entries: list[EntryPoint] | None = None) -> Registry:
    """Load every installed plugin (or the given entry points) into a fresh registry."""
    found = list(entry_points(group=hookspecs.GROUP)) if entries is None else entries
    # mixerzoo's own come first, so that a clash of names is blamed on the newcomer.
    found.sort(
        key=lambda entry: (_origin(entry).distribution != "mixerzoo", _origin(entry).distribution, entry.name)
    )
    registry = Registry()
    for entry in found:
        registry.load(entry.name, _origin(entry), entry.load, strict=is_strict())
    return registry


@cache
def get_registry() -> Registry:
    """Return the registry of this process, loaded at the first call."""
    return load_registry()


@contextmanager
def temporary_plugin(plugin: Any, *, name: str = "temporary") -> Iterator[Registry]:
    """Register a plugin object for the duration of a `with` block, strictly; meant for tests and notebooks."""
    registry = get_registry()
    shelves: tuple[Shelf[Any], ...] = (registry.mixers, registry.hosts, registry.datasets, registry.runtimes)
    before = [shelf.snapshot() for shelf in shelves]
    plugins = list(registry.plugins)
    origin = Origin(plugin=name, distribution=name, version="0")
    try:
        registry.load(name, origin, lambda: plugin, strict=True)
        yield registry
    finally:
        for shelf, content in zip(shelves, before, strict=True):
            shelf.restore(content)
        registry.plugins[:] = plugins
