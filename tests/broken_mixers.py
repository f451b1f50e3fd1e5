"""A mixer that is right, and, for every conformance check, mixers that are wrong in the way it looks for.

Each broken mixer is the good one with one mistake of the kind people make.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from mixerzoo import AttentionView, Caps, MixerSpec
from mixerzoo.units import Share, Units, places, sized

CAPS = Caps(any_length=True, causal=True, masks=True, exportable=True)


class Good(nn.Module):
    """The mean of all (or all earlier) values, gated by each token."""

    def __init__(self, dim: int, width: float, causal: bool) -> None:
        super().__init__()
        inner = max(1, round(dim * width))
        self.causal = causal
        self.value = nn.Linear(dim, inner)
        self.gate = nn.Linear(dim, inner)
        self.readout = nn.Linear(inner, dim)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        value = self.value(x)
        real = torch.ones_like(x[..., :1]) if mask is None else mask[..., None].to(x.dtype)
        value = value * real
        if self.causal:
            total, count = value.cumsum(1), real.cumsum(1)
        else:
            total, count = value.sum(1, keepdim=True), real.sum(1, keepdim=True)
        return self.readout(torch.sigmoid(self.gate(x)) * total / count.clamp(min=1))


def inherit(mixer: Any, view: AttentionView) -> None:
    inner = mixer.value.out_features
    mixer.value.weight.copy_(view.v_weight[:inner])
    mixer.value.bias.copy_(view.v_bias[:inner])
    mixer.readout.weight.copy_(view.out_weight[:, :inner])
    mixer.readout.bias.copy_(view.out_bias)


def spec_of(build: Callable[..., Any], *, caps: Caps = CAPS, **fields: Any) -> MixerSpec:
    fields = {"name": "subject", "summary": "a test subject", "widths": (0.5, 1.0)} | fields
    return MixerSpec(build=build, caps=caps, **fields)


GOOD = spec_of(Good, inherit=inherit, readout="readout")


class WrongShape(Good):
    def forward(self, x, mask=None):
        return super().forward(x, mask).mean(1)


class WrongDtype(Good):
    def forward(self, x, mask=None):
        return super().forward(x, mask).double()


class Tuple(Good):
    def forward(self, x, mask=None):
        return super().forward(x, mask), None, None


class Square(nn.Module):
    """Takes what comes after the class token for a square image."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x):
        side = math.isqrt(x.shape[1] - 1)
        image = x[:, 1:].transpose(1, 2).reshape(len(x), -1, side, side)
        return torch.cat([x[:, :1], self.conv(image).flatten(2).transpose(1, 2)], 1)


class Dropout(Good):
    def forward(self, x, mask=None):
        return F.dropout(super().forward(x, mask), 0.1)  # forgets training=self.training


class OwnRandomness(Good):
    def __init__(self, dim: int, width: float, causal: bool) -> None:
        super().__init__(dim, width, causal)
        nn.init.normal_(self.value.weight, generator=torch.Generator().manual_seed(next(_COUNTER)))


_COUNTER: Iterator[int] = itertools.count()


class InPlace(Good):
    def forward(self, x, mask=None):
        return super().forward(x.mul_(2), mask)


class BatchStatistics(Good):
    def forward(self, x, mask=None):
        return super().forward(x - x.mean((0, 1)), mask)


class PerToken(Good):
    def forward(self, x, mask=None):
        return self.readout(torch.sigmoid(self.gate(x)) * self.value(x))


class Unused(Good):
    def __init__(self, dim: int, width: float, causal: bool) -> None:
        super().__init__(dim, width, causal)
        self.scale = nn.Parameter(torch.ones(dim))


class Cut(nn.Linear):
    def forward(self, x):
        return super().forward(x).detach()


class Detached(Good):
    def __init__(self, dim: int, width: float, causal: bool) -> None:
        super().__init__(dim, width, causal)
        self.gate = Cut(dim, round(dim * width))


class DeadUnits(Good):
    def __init__(self, dim: int, width: float, causal: bool) -> None:
        super().__init__(dim, width, causal)
        self.extra = nn.Parameter(torch.zeros(dim))

    def forward(self, x, mask=None):
        return super().forward(x, mask) + 0 * self.extra


class HalfGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * x  # a factor of two is missing


class WrongBackward(Good):
    def forward(self, x, mask=None):
        return super().forward(HalfGradient.apply(x), mask)


class NotFloat64(Good):
    def forward(self, x, mask=None):
        return super().forward(x.float().to(x.dtype), mask)


class IgnoresWidth(Good):
    def __init__(self, dim: int, causal: bool) -> None:
        super().__init__(dim, 1.0, causal)


class HiddenState(Good):
    """Keeps a random projection where the state dict does not see it."""

    def __init__(self, dim: int, width: float, causal: bool) -> None:
        super().__init__(dim, width, causal)
        self.projection = [torch.randn(dim, dim, dtype=torch.float64)]

    def forward(self, x, mask=None):
        return super().forward(x @ self.projection[0].to(x.dtype), mask)


class Closure(Good):
    """Holds on to its own weight in a closure, so that a copy goes on using the original's."""

    def __init__(self, dim: int, width: float, causal: bool) -> None:
        super().__init__(dim, width, causal)
        weight = self.value.weight
        self.project = lambda x: x @ weight.T

    def forward(self, x, mask=None):
        return super().forward(x, mask) + self.project(x).mean()


class Overflow(Good):
    """A softmax that does not subtract the maximum."""

    def forward(self, x, mask=None):
        weight = self.gate(8 * x).exp()
        return super().forward(x, mask) + (weight / weight.sum(1, True)).mean()


class ComplexWeight(nn.Module):
    def __init__(self, dim: int, tokens: int) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(tokens // 2 + 1, dim, dtype=torch.complex64))

    def forward(self, x):
        n = x.shape[1]
        return torch.fft.irfft(torch.fft.rfft(x, dim=1) * self.filter, n=n, dim=1).to(x.dtype)


class AssumesStrides(Good):
    def forward(self, x, mask=None):
        b, n, d = x.shape
        return super().forward(torch.as_strided(x, (b, n, d), (n * d, d, 1)), mask)


class ViewsInput(Good):
    def forward(self, x, mask=None):
        return super().forward(x.view(-1).view(x.shape), mask)


class FixedLength(nn.Module):
    def __init__(self, dim: int, tokens: int) -> None:
        super().__init__()
        self.mix = nn.Linear(tokens, tokens)
        self.readout = nn.Linear(dim, dim)

    def forward(self, x):
        return self.readout(self.mix(x.transpose(1, 2)).transpose(1, 2))


class DividesByNeighbours(Good):
    """Divides by the number of other tokens: with one token there are none."""

    def forward(self, x, mask=None):
        out = super().forward(x, mask)
        others = (x.sum(1, keepdim=True) - x) / torch.tensor(x.shape[1] - 1)
        return out + others.mean(-1, keepdim=True)


class LooksAhead(Good):
    """Normalises over all tokens, which is easy to overlook."""

    def forward(self, x, mask=None):
        return super().forward(x / x.std(1, keepdim=True), mask)


class GradientAhead(Good):
    """The value is hidden behind a detach that cancels it, the gradient is not."""

    def forward(self, x, mask=None):
        future = x.sum(1, keepdim=True)
        return super().forward(x + future - future.detach(), mask)


class DropsMask(Good):
    def forward(self, x, mask=None):
        return super().forward(x)


class CountsPadding(Good):
    """Silences padding but goes on dividing by the padded length."""

    def forward(self, x, mask=None):
        real = 1.0 if mask is None else mask[..., None].to(x.dtype)
        value = (self.value(x) * real).mean(1, keepdim=True)
        return self.readout(torch.sigmoid(self.gate(x)) * value)


class MasksDiffer(Good):
    def forward(self, x, mask=None):
        return super().forward(x, mask) + (0 if mask is None else 1)


class GradientAtPadding(Good):
    def forward(self, x, mask=None):
        total = x.sum(1, keepdim=True)
        return super().forward(x + total - total.detach(), mask)


class DataDependent(Good):
    def forward(self, x, mask=None):
        if x.abs().max().item() > 100:
            x = x / 2
        return super().forward(x, mask)


class BranchesOnBatch(Good):
    """Goes through great batches piece by piece; the exported program knows only one of the two ways."""

    def forward(self, x, mask=None):
        if len(x) <= 3:
            return super().forward(x, mask)
        return torch.cat([self(part, mask) for part in x.split(3)])


def inherits_nan(mixer: Any, view: AttentionView) -> None:
    inherit(mixer, view)
    mixer.value.weight.div_(0 * view.v_weight[0, 0])


def inherits_memory(mixer: Any, view: AttentionView) -> None:
    inherit(mixer, view)
    mixer.readout.bias = nn.Parameter(view.out_bias)


def inherits_by_chance(mixer: Any, view: AttentionView) -> None:
    inherit(mixer, view)
    mixer.value.bias.add_(next(_COUNTER))


def inherits_full_width_only(mixer: Any, view: AttentionView) -> None:
    mixer.value.weight.copy_(view.v_weight)


def inherits_in_place_on_view(mixer: Any, view: AttentionView) -> None:
    view.v_weight.mul_(0.5)
    inherit(mixer, view)


class ReadoutThenMore(Good):
    def forward(self, x, mask=None):
        return 2 * super().forward(x, mask)


class ReadoutTwice(Good):
    def forward(self, x, mask=None):
        super().forward(x, mask)
        return super().forward(x, mask)


class Wrapped(Good):
    def __init__(self, dim: int, width: float, causal: bool) -> None:
        super().__init__(dim, width, causal)
        self.inner = nn.Sequential(nn.Identity())


class Prunable(nn.Module):
    """The good mixer, which can be built with fewer inner units."""

    def __init__(self, dim: int, width: float, sizes: dict[str, int]) -> None:
        super().__init__()
        inner = sized(sizes, "inner", round(dim * width))
        self.value, self.gate = nn.Linear(dim, inner), nn.Linear(dim, inner)
        self.readout = nn.Linear(inner, dim)

    def inner(self, x):
        return torch.sigmoid(self.gate(x)) * self.value(x).mean(1, keepdim=True)

    def forward(self, x):
        return self.readout(self.inner(x))


def inner_units(
    mixer: Any, *, parts=("value.weight", "value.bias", "gate.weight", "gate.bias"), turned: int = 0
) -> dict[str, Units]:
    (own,) = places(mixer.readout.in_features, units=0)
    shares = [Share(parameter=name, dim=0, places=own) for name in parts]
    out = Share(parameter="readout.weight", dim=1, places=own.roll(turned, 0))
    return {"inner": Units(rows=((*shares, out),))}


class IgnoresSizes(Prunable):
    def __init__(self, dim: int, width: float, sizes: dict[str, int]) -> None:
        super().__init__(dim, width, {})


class NeverSilent(Prunable):
    """A unit without weights still says something."""

    def inner(self, x):
        return torch.exp(self.value(x).mean(1, keepdim=True)) * torch.sigmoid(self.gate(x)) + 1


class SharedStatistics(Prunable):
    """What a unit says depends on how many others there are."""

    def inner(self, x):
        inner = super().inner(x)
        return inner - inner.mean(-1, keepdim=True)


def never_silent_units(mixer: Any) -> dict[str, Units]:
    return {"inner": Units(rows=(inner_units(mixer)["inner"].rows[0][:-1],))}


PRUNABLE = spec_of(
    Prunable, caps=Caps(any_length=True, exportable=True), readout="readout", units=inner_units
)

PLAIN = Caps()

# Check -> the broken mixers it must catch, by what is wrong with them.
BROKEN: dict[str, dict[str, MixerSpec]] = {
    "shape": {
        "shape": spec_of(WrongShape),
        "dtype": spec_of(WrongDtype),
        "tuple": spec_of(Tuple),
        "no module": spec_of(lambda dim: "a string"),
        "build raises": spec_of(lambda dim: nn.Linear(dim, dim, bias=1 / 0)),
    },
    "oblong_grid": {"square": spec_of(Square, caps=PLAIN)},
    "deterministic": {"dropout": spec_of(Dropout)},
    "seeded": {"own randomness": spec_of(OwnRandomness)},
    "input_unchanged": {"in place": spec_of(InPlace)},
    "batch_independent": {"batch statistics": spec_of(BatchStatistics)},
    "tokens_mix": {"per token": spec_of(PerToken)},
    "per_token": {"mixes": spec_of(Good, caps=Caps(per_token=True))},
    "gradients": {
        "unused": spec_of(Unused),
        "detached": spec_of(Detached),
        "zero": spec_of(DeadUnits),
    },
    "gradcheck": {"wrong backward": spec_of(WrongBackward), "float32 inside": spec_of(NotFloat64)},
    "width_grows": {"ignored": spec_of(IgnoresWidth)},
    "state_dict": {"hidden state": spec_of(HiddenState)},
    "deepcopy": {"closure": spec_of(Closure)},
    "bfloat16": {"overflow": spec_of(Overflow), "complex": spec_of(ComplexWeight, caps=PLAIN)},
    "noncontiguous": {"strides": spec_of(AssumesStrides), "view": spec_of(ViewsInput)},
    "any_length": {
        "fixed": spec_of(FixedLength, caps=Caps(any_length=True)),
        "one token": spec_of(DividesByNeighbours),
    },
    "causal": {"value": spec_of(LooksAhead), "gradient": spec_of(GradientAhead)},
    "masks": {
        "dropped": spec_of(DropsMask),
        "counted": spec_of(CountsPadding),
        "all true": spec_of(MasksDiffer),
        "gradient": spec_of(GradientAtPadding),
        "no argument": spec_of(FixedLength, caps=Caps(masks=True)),
    },
    "export": {"data dependent": spec_of(DataDependent), "branch": spec_of(BranchesOnBatch)},
    "inherit": {
        "nan": spec_of(Good, inherit=inherits_nan),
        "memory": spec_of(Good, inherit=inherits_memory),
        "chance": spec_of(Good, inherit=inherits_by_chance),
        "width": spec_of(Good, inherit=inherits_full_width_only),
        "view changed": spec_of(Good, inherit=inherits_in_place_on_view),
    },
    "readout": {
        "unknown": spec_of(Good, readout="head"),
        "not linear": spec_of(Wrapped, readout="inner"),
        "not last": spec_of(ReadoutThenMore, readout="readout"),
        "twice": spec_of(ReadoutTwice, readout="readout"),
        "inner": spec_of(Good, readout="value"),
    },
    "units": {
        "sizes ignored": spec_of(IgnoresSizes, units=inner_units),
        "others' statistics": spec_of(SharedStatistics, units=inner_units),
        "readout forgotten": spec_of(NeverSilent, units=never_silent_units),
        "bias forgotten": spec_of(
            Prunable, units=lambda m: inner_units(m, parts=("value.weight", "value.bias", "gate.weight"))
        ),
        "not the same units": spec_of(Prunable, units=lambda m: inner_units(m, turned=1)),
        "no such parameter": spec_of(Prunable, units=lambda m: inner_units(m, parts=("values",))),
        "none": spec_of(Prunable, units=lambda m: {}),
    },
}
