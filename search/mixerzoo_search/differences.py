"""What makes two searches different ones, in a few words: arguments, plugins, candidates, machines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

NAMED = 3  # plugins or candidates that are named; the others are counted


def difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> str | None:
    """Return in what the identities of two searches differ, None if they are the same search.

    Where only plugins or candidates differ, all of both is told; else the first argument that differs.
    """
    names = [name for name in dict.fromkeys([*here, *there]) if there.get(name) != here.get(name)]
    if not names:
        return None
    others = [name for name in names if name not in ("plugins", "space")]
    if others:
        name = others[0]
        return f"{name} is {_short(there.get(name))} there, {_short(here.get(name))} here"
    told = []
    for name, tell in (("plugins", plugins), ("space", space)):
        if name in names:
            told.append(f"{name}: {tell(there.get(name) or {}, here.get(name) or {})}")
    return "; ".join(told)


def plugins(there: Mapping[str, str], here: Mapping[str, str]) -> str:
    """Return which plugins (distribution -> version) were added, removed or changed."""
    added = [f"{name} {here[name]}" for name in sorted(set(here) - set(there))]
    removed = [f"{name} {there[name]}" for name in sorted(set(there) - set(here))]
    changed = [
        f"{name} was {there[name]}, is {here[name]}"
        for name in sorted(set(there) & set(here))
        if there[name] != here[name]
    ]
    return ", ".join([*_verb(added, "added"), *_verb(removed, "removed"), *_some(changed)])


def space(there: Mapping[str, Sequence[str]], here: Mapping[str, Sequence[str]]) -> str:
    """Return which candidates (site -> candidates) were added or removed, or which sites."""
    told = []
    for verb, old, new in (("added", there, here), ("removed", here, there)):
        sites = sorted(set(new) - set(old))
        told += _verb([f"site {site}" for site in sites], verb)
        where: dict[str, int] = {}
        for site in [site for site in new if site in old]:
            for candidate in new[site]:
                if candidate not in old[site]:
                    where[candidate] = where.get(candidate, 0) + 1
        told += _verb([f"{candidate} at {_sites(count)}" for candidate, count in where.items()], verb)
    return ", ".join(told) or "the same candidates in another order"


def machines(there: Mapping[str, Any], here: Mapping[str, Any]) -> str | None:
    """Return in what two environments of measurements differ, None where their latencies can be compared."""
    for name in ("device", "device_name", "system", "threads", "dtype", "batch_size", "runtime"):
        if there.get(name) != here.get(name):
            return f"{name.replace('_', ' ')} {_short(there.get(name))} there, {_short(here.get(name))} here"
    old, new = there.get("versions") or {}, here.get("versions") or {}
    unrelated = ("optuna", "mlflow", "scipy")  # these run no student
    for name in [name for name in new if name not in unrelated]:
        if old.get(name) != new[name]:
            return f"{name} {old.get(name)} there, {new[name]} here"
    return None


def _sites(count: int) -> str:
    return "1 site" if count == 1 else f"{count} sites"


def _verb(names: list[str], verb: str) -> list[str]:
    return [f"{', '.join(_some(names))} {verb}"] if names else []


def _some(names: list[str]) -> list[str]:
    return names if len(names) <= NAMED else [*names[:NAMED], f"{len(names) - NAMED} more"]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
