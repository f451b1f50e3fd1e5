"""What a check demands, and how it says what it found instead."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
from torch import nn

from mixerzoo.spec import MixerSpec, Site

# Two ways of computing the same thing may differ by rounding, even where a mixer works in float32 inside.
SAME = 1e-5
# What must not be seen at all may only leak as much as an FFT does in float64, or in float32 inside.
LEAK = 1e-6
# What must be seen has to stand out from that rounding in float64.
SEEN = 1e-9


class ConformanceError(AssertionError):
    """A mixer does not do what it must: one line with mixer, width, what was expected and what was found."""


class Mismatch(Exception):
    """What a check found, before the mixer and the width are put in front of it."""


def demand(condition: bool, expected: str, found: str) -> None:
    """Raise Mismatch with both texts unless `condition` holds."""
    if not condition:
        raise Mismatch(f"expected {expected}, found {found}")


OneWidth = Callable[[MixerSpec, Site, float], None]
AllWidths = Callable[[MixerSpec, Site], None]


def for_each_width(
    *, only: Callable[[tuple[float, ...]], float] | None = None
) -> Callable[[OneWidth], AllWidths]:
    """Turn a check of one width into a check of every width, or of `only` one of them where it is slow."""

    def decorate(function: OneWidth) -> AllWidths:
        @wraps(function)
        def check(spec: MixerSpec, site: Site) -> None:
            for width in spec.widths if only is None else (only(spec.widths),):
                where = f"mixer '{spec.name}' at width {width:g} ({site.kind} site)"
                try:
                    # The caller's random numbers are none of a check's business.
                    with torch.random.fork_rng(devices=[]):
                        function(spec, site, width)
                except Mismatch as mismatch:
                    raise ConformanceError(f"{where}: {mismatch}") from None
                except Exception as error:
                    said = " ".join(f"{type(error).__name__}: {error}".split())
                    said = said if len(said) <= 400 else said[:400] + "..."
                    raise ConformanceError(f"{where}: expected it to work, found {said}") from error

        return check

    return decorate


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the greatest difference, in units of the greatest value of `other` (or of 1 if that is less)."""
    if one.shape != other.shape:
        raise Mismatch(f"expected shape {tuple(other.shape)}, found {tuple(one.shape)}")
    if not one.numel():
        return 0.0
    return float((one - other).abs().max() / other.abs().max().clamp(min=1))


def demand_same(one: torch.Tensor, other: torch.Tensor, expected: str, tolerance: float = SAME) -> None:
    """Raise Mismatch unless both are as good as the same."""
    found = difference(one, other)
    # Written so that NaN is a mismatch too.
    demand(found <= tolerance, expected, f"a relative difference of {found:.2g}")


def demand_same_state(one: nn.Module, other: nn.Module, expected: str) -> None:
    """Raise Mismatch unless the state dicts have the same names and tensors."""
    first, second = one.state_dict(), other.state_dict()
    demand(first.keys() == second.keys(), expected, "other names in the state dict")
    for name, tensor in first.items():
        equal = tensor.shape == second[name].shape and bool(torch.equal(tensor, second[name]))
        demand(equal, expected, f"another '{name}'")
