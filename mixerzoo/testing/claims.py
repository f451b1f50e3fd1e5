"""What a mixer must do once it says so: its claims, and what it gives besides `build`."""

from __future__ import annotations

import copy
import warnings
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from mixerzoo.plan import Candidate
from mixerzoo.shrink import checked, largest, shrink, silence
from mixerzoo.spec import MixerSpec, Site
from mixerzoo.testing.demands import (
    LEAK,
    SEEN,
    Mismatch,
    demand,
    demand_same,
    demand_same_state,
    difference,
    for_each_width,
)
from mixerzoo.testing.material import (
    LENGTHS,
    gradients_of,
    influence,
    made,
    random_input,
    random_view,
    shaken,
)


@for_each_width()
def check_any_length(spec: MixerSpec, site: Site, width: float) -> None:
    """With any_length claimed, the same weights work for 1, 5, 17 and 33 tokens."""
    mixer = shaken(spec, site, width)
    for tokens in LENGTHS:
        x = random_input(site, tokens=tokens)
        try:
            with torch.no_grad():
                out = mixer(x)
        except Exception as error:
            raise Mismatch(
                f"expected {tokens} tokens to work with any_length, found {type(error).__name__}: {error}"
            ) from error
        demand(out.shape == x.shape, f"shape {tuple(x.shape)} for {tokens} tokens", f"{tuple(out.shape)}")
        demand(bool(out.isfinite().all()), f"finite output for {tokens} tokens", "NaN or infinity")


@for_each_width()
def check_causal(spec: MixerSpec, site: Site, width: float) -> None:
    """With causal claimed, and built with causal=True, a token never sees a later one: value and gradient.

    A causal site is one of a language model: it has neither prefix nor grid.
    """
    text = replace(site, prefix=0, grid=None)
    mixer = shaken(spec, text, width, causal=True)
    # Row: the token that changed; column: an earlier one, which must not notice.
    ahead = influence(mixer, text).tril(-1)
    worst = float(ahead.max())
    demand(worst <= LEAK, "no token to see a later one", f"an earlier output that changed by {worst:.2g}")
    x = random_input(text, batch=1).requires_grad_()
    out = mixer(x)
    if not out.requires_grad:
        return
    for token in (0, text.tokens // 2, text.tokens - 2):
        loss = (out[:, : token + 1] * random_input(text, batch=1, seed=3)[:, : token + 1]).sum()
        (gradient,) = torch.autograd.grad(loss, x, retain_graph=True, allow_unused=True)
        worst = 0.0 if gradient is None else float(gradient[:, token + 1 :].abs().max())
        demand(worst <= LEAK, "no gradient from a later token", f"{worst:.2g} after token {token}")


@for_each_width()
def check_masks(spec: MixerSpec, site: Site, width: float) -> None:
    """With masks claimed, padding (right, left or between) changes nothing: value and gradient."""
    mixer = shaken(spec, site, width)
    n, real = site.tokens, site.tokens * 2 // 3
    mask = torch.ones(4, n, dtype=torch.bool)
    mask[1, real:] = False
    mask[2, : n - real] = False
    mask[3, 2:6] = False
    x = random_input(site, batch=4)
    noise = random_input(site, batch=4, seed=3)
    loud = torch.where(mask[..., None], x, 1e4 * noise)
    with torch.no_grad():
        demand_same(mixer(x[:1], mask=mask[:1]), mixer(x[:1]), "an all-true mask to change nothing")

    def run(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, dict[str, torch.Tensor | None]]:
        x = x.clone().requires_grad_()
        out = mixer(x, mask=mask)
        kept = out[mask]
        if not out.requires_grad:
            return kept, None, {}
        loss = (kept * noise[mask]).sum()
        (gradient,) = torch.autograd.grad(loss, x, retain_graph=True, allow_unused=True)
        return kept.detach(), gradient, gradients_of(mixer, loss)

    quiet_out, _, quiet_gradients = run(x)
    loud_out, input_gradient, loud_gradients = run(loud)
    demand_same(loud_out, quiet_out, "real tokens not to depend on padding", LEAK)
    if input_gradient is not None:
        worst = float(input_gradient[~mask].abs().max())
        demand(worst <= LEAK, "no gradient at padding", f"{worst:.2g}")
    for name, quiet in quiet_gradients.items():
        noisy = loud_gradients[name]
        if quiet is not None and noisy is not None:
            demand_same(noisy, quiet, f"the gradient of '{name}' not to depend on padding", LEAK)
    if spec.caps.any_length:
        with torch.no_grad():
            padded, short = mixer(loud[1:2], mask=mask[1:2])[:, :real], mixer(x[1:2, :real])
        demand_same(padded, short, "a padded sequence to give what the shorter one gives")


@for_each_width(only=max)
def check_export(spec: MixerSpec, site: Site, width: float) -> None:
    """With exportable claimed, torch.export works with a dynamic batch (and length) and computes the same."""
    mixer = made(spec, site, width)
    dynamic: dict[int, Any] = {0: torch.export.Dim.DYNAMIC}
    sizes = [(1, site.tokens), (5, site.tokens)]
    if spec.caps.any_length:
        dynamic[1] = torch.export.Dim.DYNAMIC
        sizes = [(1, site.tokens), (5, site.tokens - 6)]
    x = random_input(site, batch=2, dtype=torch.float32)
    # Whatever torch.export warns about on its own account is not the mixer's doing.
    with warnings.catch_warnings(), torch.no_grad():  # as students are exported
        warnings.simplefilter("ignore")
        program = torch.export.export(mixer, (x,), dynamic_shapes=(dynamic,)).module()
        for batch, tokens in sizes:
            other = random_input(site, batch=batch, tokens=tokens, dtype=torch.float32, seed=4)
            exported, eager = program(other), mixer(other)
            demand_same(exported, eager, f"the exported mixer to compute the same at batch {batch}", 1e-4)


@for_each_width()
def check_inherit(spec: MixerSpec, site: Site, width: float) -> None:
    """`inherit` takes the site's view, gives finite parameters, repeats itself, and leaves the view alone."""
    assert spec.inherit is not None
    states: list[nn.Module] = []
    for _ in range(2):
        mixer = made(spec, site, width)
        view = random_view(site)
        with torch.no_grad():
            spec.inherit(mixer, view)
        for name, parameter in mixer.named_parameters():
            demand(bool(parameter.isfinite().all()), f"finite '{name}' after inherit", "NaN or infinity")
        states.append(copy.deepcopy(mixer))
        with torch.no_grad():
            out = mixer(random_input(site, dtype=torch.float32))
            demand(bool(out.isfinite().all()), "finite output after inherit", "NaN or infinity")
            # Training must not change the teacher's weights either: a parameter may not be a view of them.
            for parameter in mixer.parameters():
                parameter.add_(1)
        untouched = random_view(site)
        for field in fields(view):
            mine, given = getattr(untouched, field.name), getattr(view, field.name)
            same = torch.equal(mine, given) if isinstance(mine, torch.Tensor) else mine == given
            demand(
                same,
                f"view.{field.name} left as it was",
                "it was changed, or shares its memory with the mixer",
            )
    demand_same_state(states[0], states[1], "inherit to give the same weights again")


@for_each_width()
def check_readout(spec: MixerSpec, site: Site, width: float) -> None:
    """`readout` names an nn.Linear that is called once and whose output is the mixer's, up to a reshape."""
    assert spec.readout is not None
    mixer = shaken(spec, site, width)
    known = dict(mixer.named_modules())
    linear = known.get(spec.readout)
    found = "no such module" if linear is None else f"a {type(linear).__name__}"
    demand(isinstance(linear, nn.Linear), f"readout '{spec.readout}' to name an nn.Linear", found)
    assert linear is not None
    outputs: list[torch.Tensor] = []
    linear.register_forward_hook(lambda _module, _args, out: outputs.append(out.clone()))
    with torch.no_grad():
        out = mixer(random_input(site))
    expected = f"the output of readout '{spec.readout}' to be the mixer's, up to a reshape"
    demand(len(outputs) == 1, f"readout '{spec.readout}' to be called once", f"{len(outputs)} calls")
    demand(outputs[0].numel() == out.numel(), expected, f"shape {tuple(outputs[0].shape)}")
    demand_same(outputs[0].reshape(out.shape), out, expected)


@for_each_width()
def check_units(spec: MixerSpec, site: Site, width: float) -> None:
    """A pruned mixer, built smaller from its sizes, computes what the whole one does with those units silent."""
    assert spec.units is not None
    mixer = shaken(spec, site, width)
    kinds = checked(spec.units(mixer), mixer, "its units")
    demand(bool(kinds), "units that can be pruned", "none")
    x = random_input(site)
    for kind, units in kinds.items():
        if units.size == 1:
            continue
        generator = torch.Generator().manual_seed(5)
        kept = largest(torch.rand(len(units.rows), units.size, generator=generator), units.size // 2)
        # Other units in every row, so that rows cannot be mistaken for each other.
        half = {kind: units.size // 2}
        candidate = Candidate(spec.name, width)
        _, small = shrink(spec, site, candidate, mixer, half, choose=partial(_given, kept))
        whole = copy.deepcopy(mixer)
        silence(whole, units, kept)
        with torch.no_grad():
            demand_same(small(x), whole(x), f"the same with half of its '{kind}' cut as with them silent")
            demand(
                difference(mixer(x), whole(x)) > SEEN,
                f"its '{kind}' to matter",
                "the same output without them",
            )
        counts = [sum(p.numel() for p in m.parameters()) for m in (small, mixer)]
        demand(
            counts[0] < counts[1],
            f"fewer parameters with half of its '{kind}'",
            f"{counts[0]} of {counts[1]}",
        )


def _given(kept: torch.Tensor, _sizes: torch.Tensor, _count: int) -> torch.Tensor:
    return kept
