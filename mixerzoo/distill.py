"""Distil one candidate at one site, teacher-forced: inherit, solve the readout, then gradient steps on the rest.

The error is NMSE = sum |f(x) - y|^2 / sum |y - mean(y)|^2 over held-out calibration images: 0 is perfect, 1 is a
constant. The mean is over images and tokens, one a channel.
"""

from __future__ import annotations

import copy
import hashlib
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Protocol

import torch
from torch import nn

from mixerzoo.capture import SiteCapture
from mixerzoo.errors import MixerzooError
from mixerzoo.hosts import count_params
from mixerzoo.ridge import Gram, solve
from mixerzoo.spec import MixerSpec, Site

BATCH = 32  # images at a time, in every pass over the captured activations
HELD_OUT = 0.2  # of the calibration images
SEEN_TOKENS = 131_072  # that a mixer is run on for its readout to be solved
SOLVE_TOKENS = (
    32_768  # of these, drawn at random, that it is solved on: tokens of one image have much in common
)
PATIENCE = 2  # checks without a better held-out error before the steps stop
CHECKS = 5  # checks of the held-out error in a full run of steps


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a candidate is distilled; part of its library key.

    Attributes:
        steps: gradient steps after the closed form; 0 for none.
        lr: peak of the one-cycle schedule of AdamW.
        seed: of the initialisation and the order of the batches.
    """

    steps: int = 0
    lr: float = 1e-3
    seed: int = 0

    def to_json(self) -> dict[str, float]:
        """Return the recipe as JSON-ready data."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Distilled:
    """A distilled candidate, or the reason why there is none.

    Attributes:
        state: state dict of the mixer; empty if it failed.
        nmse: held-out error; inf if it failed.
        nmse_start: as inherited or initialised.
        nmse_solved: after the closed form; NaN without a readout.
        steps: gradient steps taken.
        params: parameters of the mixer.
        seconds: wall time.
        failed: reason, or empty.
    """

    state: dict[str, torch.Tensor]
    nmse: float
    nmse_start: float
    nmse_solved: float
    steps: int
    params: int
    seconds: float
    failed: str = ""


class Pairs(Protocol):
    """Inputs x and wanted outputs y of a mixer, (n, N, D) each, over n images; `SiteCapture` is one."""

    @property
    def x(self) -> torch.Tensor:
        """What the mixer is given."""

    @property
    def y(self) -> torch.Tensor:
        """What it should make of it."""


def held_out_rows(images: int) -> tuple[slice, slice]:
    """Return the training and the held-out rows of the captured images."""
    first = images - max(1, round(images * HELD_OUT))
    return slice(0, first), slice(first, images)


def distill(
    spec: MixerSpec,
    width: float,
    site: Site,
    captured: SiteCapture,
    recipe: Recipe,
    *,
    start: dict[str, torch.Tensor] | None = None,
) -> Distilled:
    """Distil `spec` at `width` for `site`; never raises for what a mixer does wrong, but records it.

    Args:
        spec: the mixer.
        width: its width.
        site: where it shall stand.
        captured: the teacher's inputs and outputs there.
        recipe: how far to go.
        start: state of the same candidate after a shorter recipe; skips inheritance and closed form.
    """
    began = time.perf_counter()
    nmse_start = nmse_solved = math.nan
    steps = params = 0
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_seed(spec, width, site, recipe.seed))
            mixer = spec.make(site, width)
            params = count_params(mixer)
            if start is not None:
                mixer.load_state_dict(start)
            elif spec.inherit is not None:
                with torch.no_grad():
                    spec.inherit(mixer, captured.view)
            mixer.eval()
            if spec.readout is not None and start is None:
                nmse_start, nmse_solved = solve_readout(mixer, spec.readout, captured)
                nmse = _lower(nmse_start, nmse_solved)
            else:
                nmse = nmse_start = evaluate(mixer, captured)
            if recipe.steps and params:
                nmse, steps = take_steps(mixer, captured, recipe, nmse, readout=spec.readout)
        if not math.isfinite(nmse):
            raise MixerzooError(f"its held-out error is {nmse}")
        state = {name: tensor.detach().contiguous() for name, tensor in mixer.state_dict().items()}
    except Exception as error:  # a plugin's mixer may raise anything; it costs no other candidate
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return Distilled(
            state={},
            nmse=math.inf,
            nmse_start=nmse_start,
            nmse_solved=nmse_solved,
            steps=steps,
            params=params,
            seconds=time.perf_counter() - began,
            failed=reason,
        )
    return Distilled(
        state=state,
        nmse=nmse,
        nmse_start=nmse_start,
        nmse_solved=nmse_solved,
        steps=steps,
        params=params,
        seconds=time.perf_counter() - began,
    )


@torch.inference_mode()
def evaluate(mixer: nn.Module, captured: Pairs) -> float:
    """Return the held-out NMSE."""
    _, held_out = held_out_rows(len(captured.x))
    error = 0.0
    for x, y in _batches(captured, held_out):
        error += float((_forward(mixer, x) - y).double().square().sum())
    return error / _spread(captured.y[held_out])


@torch.inference_mode()
def solve_readout(
    mixer: nn.Module, readout: str, captured: Pairs, *, anchored: bool = False
) -> tuple[float, float]:
    """Solve the mixer's last linear layer by ridge regression, if that makes it better.

    The penalty is on the layer's weights; `anchored`, on their change. One pass is enough: what the Gram matrices
    hold tells the held-out NMSE of any readout. Returns that of the readout as it was and of the solved one; NaN
    where there was no solution.
    """
    layer = mixer.get_submodule(readout)
    if not isinstance(layer, nn.Linear):
        raise MixerzooError(f"readout '{readout}' is a {type(layer).__name__}, not a linear layer")
    train, held_out = held_out_rows(len(captured.x))
    enough = max(1, SEEN_TOKENS // captured.x.shape[1])
    generator = torch.Generator().manual_seed(0)
    grams = []
    with FeatureTap(layer) as tap:
        for rows in (slice(0, min(train.stop, enough)), held_out):
            gram = Gram(layer.in_features, layer.out_features)
            share = SOLVE_TOKENS / captured.x[rows, :, 0].numel()
            for x, y in _batches(captured, rows):
                out = _forward(mixer, x)
                features, target = tap.features(), y.reshape(-1, layer.out_features)
                if share < 1 and len(features) == len(x) * x.shape[1]:
                    drawn = torch.randperm(len(features), generator=generator)[: round(share * len(features))]
                    features, target = features[drawn], target[drawn]
                gram.update(features, target)
            grams.append(gram)
        if not torch.allclose(layer(tap.features()).reshape(out.shape), out, rtol=1e-3, atol=1e-4):
            raise MixerzooError(f"its output is not that of its readout '{readout}'")
    # A readout may have more outputs than the D channels that the error is about.
    kept = grams[1].rows * layer.out_features / captured.y[held_out].numel()
    spread = kept * _spread(captured.y[held_out])
    bias = torch.zeros(layer.out_features) if layer.bias is None else layer.bias
    now = torch.cat([layer.weight.T, bias[None]]).double()
    before = grams[1].error(now) / spread
    found = solve(*grams, bias=layer.bias is not None, start=now if anchored else None)
    if found is None:
        return before, math.nan
    solved = found.nmse * grams[1].spread() / spread
    if not solved > before:
        set_linear(layer, found.weight, found.bias)
    return before, solved


def _lower(before: float, solved: float) -> float:
    """Return the error that `solve_readout` leaves a mixer with, from what it returned."""
    return solved if solved <= before else before  # also without a solution


def _spread(y: torch.Tensor) -> float:
    """Return sum |y - mean(y)|^2 of outputs (n, N, D), the mean a channel's."""
    y = y.float()
    return max(float((y - y.mean((0, 1))).double().square().sum()), 1e-30)


def _forward(mixer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = mixer(x)
    if out.shape != x.shape:  # some wrong shapes would broadcast
        raise MixerzooError(f"it maps {tuple(x.shape)} to {tuple(out.shape)}, not (B, N, D) to (B, N, D)")
    return out


class FeatureTap:
    """Records the input of a linear layer during a `with` block."""

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer
        self._seen: torch.Tensor | None = None

    def __enter__(self) -> FeatureTap:
        self._handle = self.layer.register_forward_pre_hook(self._record)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    def _record(self, _module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        self._seen = args[0]

    def features(self) -> torch.Tensor:
        """Return the last input as rows (rows, F)."""
        if self._seen is None:
            raise MixerzooError("the readout was not called")
        return self._seen.reshape(-1, self.layer.in_features)


@torch.no_grad()
def set_linear(layer: nn.Linear, weight: torch.Tensor, bias: torch.Tensor) -> None:
    """Write a solution into a linear layer."""
    layer.weight.copy_(weight)
    if layer.bias is not None:
        layer.bias.copy_(bias)


def take_steps(
    mixer: nn.Module,
    captured: Pairs,
    recipe: Recipe,
    nmse: float,
    *,
    readout: str | None,
    anchored: bool = False,
) -> tuple[float, int]:
    """Take AdamW steps on the NMSE; leave the mixer at its best held-out state. Returns that error and the steps.

    A readout stays at its closed-form optimum and is solved again at every check (`anchored` or not): the steps
    are for what lies before it (variable projection). Steps on a solved readout would first undo the solution.
    """
    train, _ = held_out_rows(len(captured.x))
    y_train = captured.y[train].float()
    spread = float((y_train - y_train.mean((0, 1))).square().mean())
    solved = set() if readout is None else set(mixer.get_submodule(readout).parameters())
    parameters = [p.requires_grad_() for p in mixer.parameters() if p not in solved]
    if not parameters:
        return nmse, 0
    optimizer = torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=recipe.lr,
        total_steps=recipe.steps,
        pct_start=0.2 if recipe.steps > 5 else 0.1,  # it divides by zero where the rise takes just one step
    )
    best, best_state, stale, step = nmse, copy.deepcopy(mixer.state_dict()), 0, 0
    every = max(1, recipe.steps // CHECKS)
    mixer.train()
    while step < recipe.steps and stale < PATIENCE:
        rows = torch.randint(len(y_train), (BATCH,))
        loss = (mixer(captured.x[rows].float()) - captured.y[rows].float()).square().mean() / spread
        if not torch.isfinite(loss):
            break  # the best state so far is kept
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        step += 1
        if step % every == 0 or step == recipe.steps:
            mixer.eval()
            if readout:
                now = _lower(*solve_readout(mixer, readout, captured, anchored=anchored))
            else:
                now = evaluate(mixer, captured)
            mixer.train()
            stale = 0 if now < best else stale + 1
            if now < best:
                best, best_state = now, copy.deepcopy(mixer.state_dict())
    mixer.load_state_dict(best_state)
    mixer.eval()
    return best, step


def _batches(captured: Pairs, rows: slice) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for first in range(rows.start, rows.stop, BATCH):
        part = slice(first, min(first + BATCH, rows.stop))
        yield captured.x[part].float(), captured.y[part].float()


def _seed(spec: MixerSpec, width: float, site: Site, seed: int) -> int:
    text = f"{spec.name}@{width:g} {site.name} {seed}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])
