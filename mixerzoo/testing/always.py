"""What every mixer must do. Each check is a plain function of a mixer's spec and a site."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise

import torch

from mixerzoo.errors import MixerzooError
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
from mixerzoo.testing.material import gradients_of, influence, made, random_input, shaken


@for_each_width()
def check_shape(spec: MixerSpec, site: Site, width: float) -> None:
    """(B, N, D) in, (B, N, D) out, same dtype, at every width."""
    mixer = made(spec, site, width)
    for batch in (1, 2):
        x = random_input(site, batch=batch, dtype=torch.float32)
        with torch.no_grad():
            out = mixer(x)
        demand(isinstance(out, torch.Tensor), "forward to return a tensor", type(out).__name__)
        demand(out.shape == x.shape, f"shape {tuple(x.shape)}", f"{tuple(out.shape)}")
        demand(out.dtype == x.dtype, str(x.dtype), str(out.dtype))
        demand(bool(out.isfinite().all()), "finite output", "NaN or infinity")


@for_each_width()
def check_oblong_grid(spec: MixerSpec, site: Site, width: float) -> None:
    """A grid that is not square, and more prefix tokens: handled, or refused with a MixerzooError."""
    # Neither 20, 19 nor 18 is a square, so that no root of the length works by luck.
    oblong = replace(site, tokens=20, prefix=2, grid=(3, 6))
    try:
        mixer = made(spec, oblong, width)
    except MixerzooError as error:
        if error.__cause__ is None:  # said by `build` itself, not something that went wrong in it
            return
        raise
    x = random_input(oblong, dtype=torch.float32)
    with torch.no_grad():
        out = mixer(x)
    demand(out.shape == x.shape, f"shape {tuple(x.shape)} on a 3x6 grid", f"{tuple(out.shape)}")


@for_each_width()
def check_deterministic(spec: MixerSpec, site: Site, width: float) -> None:
    """In eval mode, the same input gives the same output."""
    mixer = shaken(spec, site, width)
    x = random_input(site)
    with torch.no_grad():
        first, second = mixer(x), mixer(x)
    demand(
        torch.equal(first, second),
        "the same output twice in eval mode",
        f"a gap of {difference(second, first):.2g}",
    )


@for_each_width()
def check_seeded(spec: MixerSpec, site: Site, width: float) -> None:
    """Built twice under one seed, the weights are the same."""
    one, other = made(spec, site, width, seed=7), made(spec, site, width, seed=7)
    demand_same_state(one, other, "the same weights from the same torch.manual_seed")


@for_each_width()
def check_input_unchanged(spec: MixerSpec, site: Site, width: float) -> None:
    """The input is not modified in place."""
    mixer = shaken(spec, site, width)
    x = random_input(site)
    before = x.clone()
    with torch.no_grad():
        mixer(x)
    demand(torch.equal(x, before), "the input left as it was", "it was modified in place")


@for_each_width()
def check_batch_independent(spec: MixerSpec, site: Site, width: float) -> None:
    """A sample's output does not depend on the samples beside it."""
    mixer = shaken(spec, site, width)
    x = random_input(site, batch=3)
    with torch.no_grad():
        together = mixer(x)
        alone = torch.cat([mixer(sample[None]) for sample in x])
    demand_same(together, alone, "each sample's output to be the same alone as in a batch")


@for_each_width()
def check_tokens_mix(spec: MixerSpec, site: Site, width: float) -> None:
    """Most tokens see at least one other token."""
    touched = influence(shaken(spec, site, width), site)
    others = touched.masked_fill(torch.eye(site.tokens, dtype=torch.bool), 0)
    seeing = int((others.amax(0) > SEEN).sum())
    demand(
        2 * seeing >= site.tokens,
        "tokens to mix (or the claim per_token)",
        f"{seeing} of {site.tokens} tokens that see another",
    )


@for_each_width()
def check_per_token(spec: MixerSpec, site: Site, width: float) -> None:
    """With per_token claimed, no token sees another."""
    touched = influence(shaken(spec, site, width), site)
    others = touched.masked_fill(torch.eye(site.tokens, dtype=torch.bool), 0)
    # Written so that NaN counts as seen.
    seeing = int((~(others.amax(0) <= LEAK)).sum())
    demand(
        not seeing,
        "no token to see another, as per_token claims",
        f"{seeing} of {site.tokens} tokens that do",
    )


@for_each_width()
def check_gradients(spec: MixerSpec, site: Site, width: float) -> None:
    """A gradient reaches every trainable parameter."""
    mixer = shaken(spec, site, width)
    loss = (mixer(random_input(site, batch=4)) * random_input(site, batch=4, seed=3)).sum()
    for name, gradient in gradients_of(mixer, loss).items():
        expected = f"a gradient for '{name}'"
        if gradient is None:
            raise Mismatch(f"expected {expected}, found none: forward does not use it")
        demand(bool(gradient.isfinite().all()), f"a finite gradient for '{name}'", "NaN or infinity")
        demand(bool((gradient != 0).any()), expected, "one that is zero everywhere")


@for_each_width(only=min)
def check_gradcheck(spec: MixerSpec, site: Site, width: float) -> None:
    """In float64 the gradients of input and parameters agree with finite differences."""
    mixer = shaken(spec, site, width)
    names = [name for name, p in mixer.named_parameters() if p.requires_grad]
    weights = [p.detach().clone().requires_grad_() for p in mixer.parameters() if p.requires_grad]
    x = random_input(site).requires_grad_()

    def forward(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        out = torch.func.functional_call(mixer, dict(zip(names, parameters, strict=True)), (x,))
        assert isinstance(out, torch.Tensor)
        return out

    if not forward(x, *weights).requires_grad:
        moved = difference(forward(2 * x, *weights), forward(x, *weights))
        demand(moved == 0, "an output that can be differentiated", "one cut off from its input")
        return
    torch.manual_seed(0)
    agree = torch.autograd.gradcheck(forward, (x, *weights), fast_mode=True, raise_exception=False)
    demand(
        agree,
        "gradients as by finite differences in float64",
        "others (a wrong backward, or float32 inside?)",
    )


@for_each_width(only=max)
def check_width_grows(spec: MixerSpec, site: Site, width: float) -> None:
    """A greater width has more parameters."""
    # At a teacher's size: rounding to whole heads or multiples of eight must not swallow the difference.
    natural = replace(site, dim=16 * site.dim, hidden=None if site.hidden is None else 16 * site.hidden)
    widths = sorted(spec.widths)
    counts = [sum(p.numel() for p in spec.make(natural, w).parameters()) for w in widths]
    if not any(counts):
        return
    grows = all(fewer < more for fewer, more in pairwise(counts))
    listed = ", ".join(f"{count} at {w:g}" for w, count in zip(widths, counts, strict=True))
    demand(grows, "more parameters at every greater width", listed)


@for_each_width()
def check_state_dict(spec: MixerSpec, site: Site, width: float) -> None:
    """The state dict is all there is: loaded into another build, it gives the same output."""
    mixer, other = shaken(spec, site, width), made(spec, site, width, seed=8).double()
    other.load_state_dict(mixer.state_dict())
    x = random_input(site)
    with torch.no_grad():
        demand_same(other(x), mixer(x), "the same output from the same state dict")


@for_each_width()
def check_deepcopy(spec: MixerSpec, site: Site, width: float) -> None:
    """A deep copy gives the same output, and shares nothing with the original."""
    mixer = shaken(spec, site, width)
    twin = copy.deepcopy(mixer)
    x = random_input(site)
    with torch.no_grad():
        before = mixer(x)
        demand_same(twin(x), before, "the same output from a deep copy")
        for one, other, whose in ((mixer, twin, "its deep copy"), (twin, mixer, "the original")):
            before = other(x)
            for parameter in one.parameters():
                parameter.add_(1)
            demand_same(other(x), before, f"{whose} not to change with the other's weights")


@for_each_width()
def check_bfloat16(spec: MixerSpec, site: Site, width: float) -> None:
    """In bfloat16, an input thirty times the usual still gives finite numbers."""
    mixer = made(spec, site, width)
    for name, parameter in mixer.named_parameters():
        # A cast of the module would silently drop the imaginary part.
        demand(
            not parameter.is_complex(), f"'{name}' to be real (see torch.view_as_complex)", "a complex one"
        )
    x = 30 * random_input(site, dtype=torch.bfloat16)
    with torch.no_grad():
        out = mixer.to(torch.bfloat16)(x)
    demand(out.dtype == x.dtype, str(x.dtype), str(out.dtype))
    demand(bool(out.isfinite().all()), "finite output in bfloat16 at 30 times the input", "NaN or infinity")


@for_each_width()
def check_noncontiguous(spec: MixerSpec, site: Site, width: float) -> None:
    """Strides do not matter."""
    mixer = shaken(spec, site, width)
    x = random_input(site)
    transposed = x.transpose(1, 2).contiguous().transpose(1, 2)
    strided = x.repeat_interleave(2, dim=-1)[..., ::2]
    expanded = x[:1].expand_as(x)
    with torch.no_grad():
        for one in (transposed, strided, expanded):
            demand_same(
                mixer(one), mixer(one.contiguous()), "a non-contiguous input to give what its copy gives"
            )
