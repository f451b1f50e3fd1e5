"""A mixer's last linear layer in closed form: ridge regression from what comes into it to what should come out."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from mixerzoo.errors import MixerzooError
from mixerzoo.pairs import Pairs, forward, held_out_rows, inputs
from mixerzoo.ridge import Gram, ridge, solve
from mixerzoo.significance import is_clear
from mixerzoo.targets import BLOCK, Drawn, Targets

SEEN_TOKENS = 65_536  # that a candidate is run on for its readout to be solved
# Of these, drawn at random, that it is solved on and that choose the penalty: tokens of one image have much in common.
SOLVE_TOKENS, HELD_OUT_TOKENS = 28_672, 8_192
FADE = 0.9  # what a batch counts for, a step later
SOLVED_EVERY = 4  # steps
ENOUGH = 4  # rows a feature
RUNNING_PENALTY = 1e-3
CHECKED = 4  # images on which a mixer's output is compared with its readout's


@torch.inference_mode()
def solve_readout(
    mixer: nn.Module,
    readout: str,
    targets: Targets,
    *,
    anchored: bool = False,
    seen: int | None = SEEN_TOKENS,
    most: int = SOLVE_TOKENS,
) -> tuple[float, float]:
    """Solve the mixer's last linear layer by ridge regression, if that makes it better.

    One pass is enough: what the Gram matrices hold tells the held-out NMSE of any readout.

    Args:
        mixer: the mixer.
        readout: path of the layer.
        targets: of the site, shared by its candidates.
        anchored: whether the penalty is on the change of the layer's weights, not on the weights.
        seen: tokens that the mixer is run on, those of the first images; of all images if None.
        most: of these, drawn at random, that it is solved on.

    Returns:
        The held-out NMSE of the readout as it was, and of the solved one; that is NaN where there was no solution.

    Raises:
        MixerzooError: if it is no linear layer, or the mixer's output is not that of the layer.
    """
    captured = targets.pairs
    layer = mixer.get_submodule(readout)
    if not isinstance(layer, nn.Linear):
        raise MixerzooError(f"readout '{readout}' is a {type(layer).__name__}, not a linear layer")
    train, held_out = held_out_rows(len(captured.x))
    enough = train.stop if seen is None else max(1, seen // captured.x.shape[1])
    grams = []
    with FeatureTap(layer) as tap:
        few = captured.x[held_out][:CHECKED].float()
        out = forward(mixer, few)
        if not torch.allclose(layer(tap.features()).reshape(out.shape), out, rtol=1e-3, atol=1e-4):
            raise MixerzooError(f"its output is not that of its readout '{readout}'")
        for rows, tokens in (
            (slice(0, min(train.stop, enough)), most),
            (held_out, HELD_OUT_TOKENS),
        ):
            drawn = targets.drawn(rows, width=layer.out_features, most=tokens)
            grams.append(_gram(mixer, tap, captured, drawn))
    # A readout may have more outputs than the D channels that the error is about.
    kept = grams[1].rows * layer.out_features / captured.y[held_out].numel()
    energy = kept * targets.spread(held_out)
    bias = torch.zeros(layer.out_features) if layer.bias is None else layer.bias
    now = torch.cat([layer.weight.T, bias[None]]).double()
    before = grams[1].error(now) / energy
    found = solve(*grams, bias=layer.bias is not None, start=now if anchored else None)
    if found is None:
        return before, math.nan
    solved = found.nmse * grams[1].spread() / energy
    if not solved > before:
        set_linear(layer, found.weight, found.bias)
    return before, solved


def _gram(mixer: nn.Module, tap: FeatureTap, captured: Pairs, drawn: Drawn) -> Gram:
    """Return the Gram matrices of the features that a mixer makes of some images, in the rows that were drawn."""
    gram = Gram(tap.layer.in_features, tap.layer.out_features)
    block = torch.empty(BLOCK, tap.layer.in_features)
    blocks, filled = iter(drawn.blocks), 0
    for x, chosen in zip(inputs(captured, drawn.images), drawn.rows, strict=True):
        features = tap.features_of(mixer, x)
        while len(chosen):
            part, chosen = chosen.tensor_split([BLOCK - filled])
            torch.index_select(features, 0, part, out=block[filled : filled + len(part)])
            filled += len(part)
            if filled == BLOCK:
                gram.update(block, *next(blocks))
                filled = 0
    if filled:
        gram.update(block[:filled], *next(blocks))
    return gram


def lower(before: float, solved: float) -> float:
    """Return the error that `solve_readout` leaves a mixer with, from what it returned."""
    return solved if solved <= before else before  # also without a solution


@torch.no_grad()
def solve_classifier(layer: nn.Linear, features: torch.Tensor, logits: torch.Tensor) -> None:
    """Solve a student's classifier for the teacher's logits, if that clearly brings it nearer to held-out ones.

    The penalty is on the change of its weights, as with an anchored readout. There is only one row an image: the mean
    gain on held-out images has to be twice its standard error.

    Args:
        layer: the classifier.
        features: what comes into it (n, D), a row an image.
        logits: the teacher's (n, C).
    """
    grams = []
    for rows in held_out_rows(len(features)):  # the held-out ones last
        grams.append(Gram(layer.in_features, layer.out_features))
        grams[-1].update(features[rows], logits[rows])
    bias = torch.zeros(layer.out_features) if layer.bias is None else layer.bias
    now = torch.cat([layer.weight.T, bias[None]]).double()
    found = solve(*grams, bias=layer.bias is not None, start=now)
    if found is None:
        return
    x, y = features[rows], logits[rows]
    errors = [
        (torch.addmm(b, x, w.T) - y).square().sum(1)
        for w, b in ((layer.weight, bias), (found.weight, found.bias))
    ]
    if is_clear(errors[0] - errors[1]):
        set_linear(layer, found.weight, found.bias)


@torch.no_grad()
def set_linear(layer: nn.Linear, weight: torch.Tensor, bias: torch.Tensor) -> None:
    """Write a solution into a linear layer."""
    layer.weight.copy_(weight)
    if layer.bias is not None:
        layer.bias.copy_(bias)


class _Seen(Exception):
    """Ends a forward pass at the layer whose input was asked for."""


class FeatureTap:
    """Records the input of a linear layer during a `with` block."""

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer
        self._seen: torch.Tensor | None = None
        self._ends = False

    def __enter__(self) -> FeatureTap:
        self._handle = self.layer.register_forward_pre_hook(self._record)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    def _record(self, _module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        self._seen = args[0]
        if self._ends:
            raise _Seen

    def features(self) -> torch.Tensor:
        """Return the last input as rows (rows, F)."""
        if self._seen is None:
            raise MixerzooError("the readout was not called")
        return self._seen.reshape(-1, self.layer.in_features)

    def features_of(self, mixer: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """Return what `mixer` makes of x (B, N, D) before the layer, as rows (rows, F); it runs no further."""
        self._seen = None  # features of an earlier batch must not pass for those of this one
        self._ends = True
        try:
            mixer(x)
        except _Seen:
            pass
        finally:
            self._ends = False
        return self.features()


class RunningReadout:
    """Keeps a readout at its closed-form optimum while gradient steps change what comes before it.

    What it is solved on is the features of the last ten batches or so. By the envelope theorem, the gradient of the
    rest is then that of the error with the best readout (variable projection); with a readout that has fallen
    behind, it leads nowhere.
    """

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer
        self._gram = Gram(layer.in_features, layer.out_features)
        self._updates = 0

    @torch.no_grad()
    def update(self, features: torch.Tensor, y: torch.Tensor) -> None:
        """Take in features (rows, F) and wanted outputs y (B, N, D), and now and then solve the readout again."""
        self._gram.fade(FADE)
        self._gram.update(features, y.reshape(-1, self.layer.out_features))
        self._updates += 1
        if self._updates % SOLVED_EVERY or self._gram.rows < ENOUGH * self.layer.in_features:
            return
        solution = ridge(self._gram, RUNNING_PENALTY, bias=self.layer.bias is not None)
        if solution is not None:
            set_linear(self.layer, solution[:-1].T, solution[-1])
