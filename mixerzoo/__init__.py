"""Fit a pretrained transformer to a latency budget by replacing attention with distilled mixers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mixerzoo.errors import BudgetOutOfReachError, MixerzooError
from mixerzoo.hookspecs import hookimpl
from mixerzoo.spec import AttentionView, Caps, MixerSpec, MlpView, Site

if TYPE_CHECKING:
    from mixerzoo.student import load

__version__ = "0.1.0"

__all__ = [
    "AttentionView",
    "BudgetOutOfReachError",
    "Caps",
    "MixerSpec",
    "MixerzooError",
    "MlpView",
    "Site",
    "hookimpl",
    "load",
]


def __getattr__(name: str) -> Any:
    # `load` needs torch and the hosts; everything else here is light.
    if name == "load":
        from mixerzoo.student import load

        return load
    raise AttributeError(f"module 'mixerzoo' has no attribute '{name}'")
