"""What mixers.py times: shapes, modules built for them, their runs, and the limits of what is run at all."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mixerzoo.compat import guard_torchvision
from mixerzoo.errors import MixerzooError
from mixerzoo.latency import REFERENCE, Rounds, Run, Timing, measure
from mixerzoo.registry import get_registry
from mixerzoo.spec import MixerSpec, Site

MAX_WEIGHTS = 1 << 30  # bytes
MAX_FORWARD_S = 3.0
MAX_TRAINING_S = 10.0  # forward and backward
MIN_ROUNDS = 3
PATIENCE_S = 60.0  # of one measurement: it gets fewer rounds where that is not enough for all


class Skipped(Exception):
    """Why something is not measured, in one line."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a mixer is measured on: B x N x D / heads. The first `prefix` tokens are not part of the grid."""

    batch: int
    tokens: int
    dim: int
    heads: int
    prefix: int = 0
    grid: tuple[int, int] | None = None
    causal: bool = False

    def __str__(self) -> str:
        return f"{self.batch} x {self.tokens} x {self.dim} / {self.heads}{' causal' * self.causal}"

    def site(self, kind: str) -> Site:
        """Return a site of this shape; the MLP of an mlp site has 4 D hidden units."""
        mlp = kind == "mlp"
        return Site(
            name="site",
            kind="mlp" if mlp else "attention",
            index=0,
            stage=0,
            dim=self.dim,
            heads=1 if mlp else self.heads,
            tokens=self.tokens,
            prefix=self.prefix,
            grid=self.grid,
            causal=self.causal,
            hidden=4 * self.dim if mlp else None,
            activation="gelu" if mlp else None,
        )

    def without_prefix(self) -> Shape:
        """Return the same grid without prefix tokens."""
        return replace(self, tokens=self.tokens - self.prefix, prefix=0)

    def example(self) -> Tensor:
        """Return an input, the same at each call: (B, N, D), unit-normal."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(self.batch, self.tokens, self.dim, generator=generator)


def builtin_mixers() -> list[MixerSpec]:
    """Return the mixers that come with mixerzoo."""
    mixers = get_registry().mixers
    return [spec for spec in mixers if mixers.origin(spec.name).distribution == "mixerzoo"]


def kind_of(spec: MixerSpec) -> str:
    """Return the kind of site the mixer is measured at."""
    return "attention" if "attention" in spec.kinds else "mlp"


def full_width(spec: MixerSpec) -> float:
    """Return the mixer's width that is nearest to the natural size."""
    return min(spec.widths, key=lambda width: abs(width - 1))


def build(spec: MixerSpec, shape: Shape) -> nn.Module:
    """Build the mixer at its full width, with weights that nothing cancels in.

    Raises:
        Skipped: if it refuses the shape, or has too many weights there.
    """
    site, width = shape.site(kind_of(spec)), full_width(spec)
    try:
        size = weight_bytes(spec.outline(site, width))
    except MixerzooError as error:
        raise Skipped(str(error)) from None
    if size > MAX_WEIGHTS:
        raise Skipped(f"too many weights: {size / 2**30:.1f} GiB")
    torch.manual_seed(0)
    mixer = spec.make(site, width)
    stir(mixer)
    return mixer


def stir(module: nn.Module) -> None:
    """Move every parameter off its start: a zero there would hide a difference between two implementations."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)


def weight_bytes(module: nn.Module) -> int:
    """Return the bytes of all parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))


def reference_for(spec: MixerSpec, shape: Shape) -> nn.Module:
    """Return what the mixer stands in for, as timm has it: attention, or an MLP at an mlp site."""
    guard_torchvision()
    from timm.layers import Attention, Mlp

    torch.manual_seed(0)
    if kind_of(spec) == "mlp":
        mlp: nn.Module = Mlp(shape.dim, 4 * shape.dim)
        return mlp
    attention: nn.Module = Attention(shape.dim, shape.heads, qkv_bias=True)
    return attention


def forward_run(module: nn.Module, x: Tensor) -> Run:
    """Return a forward pass without gradients."""

    def run() -> object:
        with torch.no_grad():
            return module(x)

    return run


def training_run(module: nn.Module, x: Tensor) -> Run:
    """Return a forward and a backward pass, to the input and to every parameter."""
    x = x.clone().requires_grad_()
    wanted = (x, *(p for p in module.parameters() if p.requires_grad))
    ahead = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))

    def run() -> object:
        return torch.autograd.grad(module(x), wanted, ahead, allow_unused=True)

    return run


MODES: Mapping[str, tuple[Callable[[nn.Module, Tensor], Run], bool, float]] = {
    "forward": (forward_run, False, MAX_FORWARD_S),
    "training": (training_run, True, MAX_TRAINING_S),
}


def prepare(mode: str, module: nn.Module, x: Tensor, patience: float = 1.0) -> tuple[Run, float]:
    """Return a run of `forward` or `training`, and about how many seconds it takes.

    Raises:
        Skipped: if it would take more than `patience` times the limit, to judge by the first sample alone.
    """
    make, train, limit = MODES[mode]
    module.train(train)
    seconds = 0.0
    for sample in (x[:1], x) if len(x) > 1 else (x,):
        try:
            seconds = _seconds(make(module, sample))
        except (RuntimeError, MemoryError) as error:  # such as an input that its kernel cannot take
            raise Skipped(f"{type(error).__name__}: {str(error).splitlines()[0][:100]}") from None
        whole = seconds * len(x) / len(sample)
        if whole > limit * patience:
            raise Skipped(f"too slow: about {whole:.0f} s")
    return make(module, x), seconds


def _seconds(run: Run) -> float:
    began = time.perf_counter()
    run()
    first = time.perf_counter() - began
    if first > 0.5:
        return first
    began = time.perf_counter()  # without what only the first one has to do
    run()
    return time.perf_counter() - began


def compare(
    reference: tuple[Run, float], others: Mapping[str, tuple[Run, float]], rounds: int
) -> dict[str, Timing]:
    """Time runs beside a reference in interleaved rounds; the result has `teacher`, the reference, in it."""
    runs = {REFERENCE: reference[0]} | {name: run for name, (run, _) in others.items()}
    once = reference[1] * (1 + -(-len(others) // 3)) + sum(seconds for _, seconds in others.values())
    return measure(runs, rounds=fitting_rounds(rounds, once))


def fitting_rounds(rounds: int, seconds: float) -> Rounds:
    """Return `rounds`, and up to twice as many on a machine that is not quiet, but fewer of `seconds` each if long."""
    fitting = max(MIN_ROUNDS, int(PATIENCE_S / max(seconds, 1e-6)) - 3)  # it warms up three times
    return Rounds(least=min(rounds, fitting), most=min(2 * rounds, fitting), settle_ms=0)


def timing_json(timing: Timing, base: Timing) -> dict[str, Any]:
    """Return a timing with its ratio to `base`: median and quartiles."""
    names = {"median": "median_ms", "low": "low_ms", "high": "high_ms"}
    figures = {names[key]: value for key, value in asdict(timing).items() if key in names}
    spread = {"ratio_low": timing.low / base.median, "ratio_high": timing.high / base.median}
    return figures | {"ratio": timing.ratio, "error": timing.error} | spread
