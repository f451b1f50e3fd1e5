"""Conformance: what every mixer must do, and what it must do once it claims it.

Each check is a plain function of a mixer's spec and a site, and raises ConformanceError on the first thing
that is not as promised. A plugin's test file needs two lines::

    @parametrize_with_checks("shift")
    def test_conformance(check):
        check()

pytest is imported only by `parametrize_with_checks`. Shapes: B batch, N tokens, D model width.
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial, wraps
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mixerzoo.errors import MixerzooError
from mixerzoo.plan import Candidate
from mixerzoo.pruning import checked, largest, shrink, silence
from mixerzoo.registry import get_registry
from mixerzoo.spec import AttentionView, MixerSpec, MlpView, Site, View

if TYPE_CHECKING:
    import pytest

# Two ways of computing the same thing may differ by rounding, even where a mixer works in float32 inside.
SAME = 1e-5
# What must not be seen at all may only leak as much as an FFT does in float64, or in float32 inside.
LEAK = 1e-6
# What must be seen has to stand out from that rounding in float64.
SEEN = 1e-9

LENGTHS = (1, 5, 17, 33)

ATTENTION_SITE = Site(
    name="blocks.0.attn",
    kind="attention",
    index=0,
    stage=0,
    dim=12,
    heads=3,
    tokens=17,
    prefix=1,
    grid=(4, 4),
)
MLP_SITE = Site(
    name="blocks.0.mlp",
    kind="mlp",
    index=1,
    stage=0,
    dim=12,
    heads=1,
    tokens=17,
    prefix=1,
    grid=(4, 4),
    hidden=24,
    activation="gelu",
)
GATED_SITE = replace(MLP_SITE, activation="silu", gated=True)


class ConformanceError(AssertionError):
    """A mixer does not do what it must: one line with mixer, width, what was expected and what was found."""


class _Mismatch(Exception):
    """What a check found, before the mixer and the width are put in front of it."""


def _demand(condition: bool, expected: str, found: str) -> None:
    if not condition:
        raise _Mismatch(f"expected {expected}, found {found}")


OneWidth = Callable[[MixerSpec, Site, float], None]
AllWidths = Callable[[MixerSpec, Site], None]


def _check(*, only: Callable[[tuple[float, ...]], float] | None = None) -> Callable[[OneWidth], AllWidths]:
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
                except _Mismatch as mismatch:
                    raise ConformanceError(f"{where}: {mismatch}") from None
                except Exception as error:
                    said = " ".join(f"{type(error).__name__}: {error}".split())
                    said = said if len(said) <= 400 else said[:400] + "..."
                    raise ConformanceError(f"{where}: expected it to work, found {said}") from error

        return check

    return decorate


# -- material --


def default_sites(spec: MixerSpec) -> tuple[Site, ...]:
    """Return the small sites that a mixer is checked on: one for each of its kinds, and a gated MLP if it asks."""
    sites = tuple(site for site in (ATTENTION_SITE, MLP_SITE) if site.kind in spec.kinds)
    return (*sites, GATED_SITE) if MLP_SITE in sites and "gated" in spec.asks else sites


def random_view(site: Site, seed: int = 0) -> View:
    """Return what `inherit` may be given at `site`, with random weights and random attention maps.

    The statistics are left empty: a mixer may use them, but has to do without.
    """
    generator = torch.Generator().manual_seed(seed)

    def weight(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) / math.sqrt(columns)

    def bias(size: int) -> torch.Tensor:
        return 0.1 * torch.randn(size, generator=generator)

    dim = site.dim
    if site.kind == "mlp":
        hidden = 4 * dim if site.hidden is None else site.hidden
        return MlpView(
            in_weight=weight(hidden, dim),
            in_bias=bias(hidden),
            out_weight=weight(dim, hidden),
            out_bias=bias(dim),
            importance=torch.rand(hidden, generator=generator),
            gate_weight=weight(hidden, dim) if site.gated else None,
            gate_bias=bias(hidden) if site.gated else None,
        )
    logits = 2 * torch.randn(site.heads, site.tokens, site.tokens, generator=generator)
    if site.causal:
        future = torch.ones(site.tokens, site.tokens, dtype=torch.bool).triu(1)
        logits = logits.masked_fill(future, float("-inf"))
    return AttentionView(
        q_weight=weight(dim, dim),
        q_bias=bias(dim),
        k_weight=weight(dim, dim),
        k_bias=bias(dim),
        v_weight=weight(dim, dim),
        v_bias=bias(dim),
        out_weight=weight(dim, dim),
        out_bias=bias(dim),
        mean_attention=logits.softmax(-1),
    )


def _made(spec: MixerSpec, site: Site, width: float, seed: int = 0) -> nn.Module:
    """Return the mixer exactly as it is built, in eval mode."""
    torch.manual_seed(seed)
    mixer: object = spec.make(site, width)
    if not isinstance(mixer, nn.Module):
        raise _Mismatch(f"expected build to return an nn.Module, found {type(mixer).__name__}")
    return mixer.eval()


def _shaken(spec: MixerSpec, site: Site, width: float, *, causal: bool = False) -> nn.Module:
    """Return the mixer in float64 and eval mode, with noise added to its weights.

    A mixer may well start from zeros (a gate that is shut, a readout that is silent). That must not hide what
    it does later, nor count against it.
    """
    mixer = _made(spec, replace(site, causal=causal), width).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, dtype=parameter.dtype, generator=generator))
    return mixer


def _input(
    site: Site,
    *,
    batch: int = 2,
    tokens: int | None = None,
    dtype: torch.dtype = torch.float64,
    seed: int = 2,
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    length = site.tokens if tokens is None else tokens
    return torch.randn(batch, length, site.dim, dtype=torch.float64, generator=generator).to(dtype)


def _gap(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the greatest difference, in units of the greatest value of `other` (or of 1 if that is less)."""
    if one.shape != other.shape:
        raise _Mismatch(f"expected shape {tuple(other.shape)}, found {tuple(one.shape)}")
    if not one.numel():
        return 0.0
    return float((one - other).abs().max() / other.abs().max().clamp(min=1))


def _demand_same(one: torch.Tensor, other: torch.Tensor, expected: str, tolerance: float = SAME) -> None:
    gap = _gap(one, other)
    # Written so that NaN is a mismatch too.
    _demand(gap <= tolerance, expected, f"a relative difference of {gap:.2g}")


def _demand_same_state(one: nn.Module, other: nn.Module, expected: str) -> None:
    first, second = one.state_dict(), other.state_dict()
    _demand(first.keys() == second.keys(), expected, "other names in the state dict")
    for name, tensor in first.items():
        equal = tensor.shape == second[name].shape and bool(torch.equal(tensor, second[name]))
        _demand(equal, expected, f"another '{name}'")


def _touched(mixer: nn.Module, site: Site) -> torch.Tensor:
    """Return (N, N): how much output token `column` changes, relatively, when input token `row` does."""
    n = site.tokens
    x = _input(site, batch=1).repeat(n + 1, 1, 1)
    x[torch.arange(n), torch.arange(n)] += _input(site, batch=1, seed=3)[0]
    with torch.no_grad():
        out: torch.Tensor = mixer(x)
    return (out[:n] - out[n:]).abs().amax(-1) / out.abs().max().clamp(min=1e-30)


def _gradients(mixer: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor | None]:
    """Return the gradient of every trainable parameter; None where the loss does not depend on it."""
    named = {name: p for name, p in mixer.named_parameters() if p.requires_grad}
    if not named:
        return {}
    if not loss.requires_grad:
        return dict.fromkeys(named)
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True, retain_graph=True)
    return dict(zip(named, found, strict=True))


# -- what every mixer must do --


@_check()
def check_shape(spec: MixerSpec, site: Site, width: float) -> None:
    """(B, N, D) in, (B, N, D) out, same dtype, at every width."""
    mixer = _made(spec, site, width)
    for batch in (1, 2):
        x = _input(site, batch=batch, dtype=torch.float32)
        with torch.no_grad():
            out = mixer(x)
        _demand(isinstance(out, torch.Tensor), "forward to return a tensor", type(out).__name__)
        _demand(out.shape == x.shape, f"shape {tuple(x.shape)}", f"{tuple(out.shape)}")
        _demand(out.dtype == x.dtype, str(x.dtype), str(out.dtype))
        _demand(bool(out.isfinite().all()), "finite output", "NaN or infinity")


@_check()
def check_oblong_grid(spec: MixerSpec, site: Site, width: float) -> None:
    """A grid that is not square, and more prefix tokens: handled, or refused with a MixerzooError."""
    # Neither 20, 19 nor 18 is a square, so that no root of the length works by luck.
    oblong = replace(site, tokens=20, prefix=2, grid=(3, 6))
    try:
        mixer = _made(spec, oblong, width)
    except MixerzooError as error:
        if error.__cause__ is None:  # said by `build` itself, not something that went wrong in it
            return
        raise
    x = _input(oblong, dtype=torch.float32)
    with torch.no_grad():
        out = mixer(x)
    _demand(out.shape == x.shape, f"shape {tuple(x.shape)} on a 3x6 grid", f"{tuple(out.shape)}")


@_check()
def check_deterministic(spec: MixerSpec, site: Site, width: float) -> None:
    """In eval mode, the same input gives the same output."""
    mixer = _shaken(spec, site, width)
    x = _input(site)
    with torch.no_grad():
        first, second = mixer(x), mixer(x)
    _demand(
        torch.equal(first, second),
        "the same output twice in eval mode",
        f"a gap of {_gap(second, first):.2g}",
    )


@_check()
def check_seeded(spec: MixerSpec, site: Site, width: float) -> None:
    """Built twice under one seed, the weights are the same."""
    one, other = _made(spec, site, width, seed=7), _made(spec, site, width, seed=7)
    _demand_same_state(one, other, "the same weights from the same torch.manual_seed")


@_check()
def check_input_unchanged(spec: MixerSpec, site: Site, width: float) -> None:
    """The input is not modified in place."""
    mixer = _shaken(spec, site, width)
    x = _input(site)
    before = x.clone()
    with torch.no_grad():
        mixer(x)
    _demand(torch.equal(x, before), "the input left as it was", "it was modified in place")


@_check()
def check_batch_independent(spec: MixerSpec, site: Site, width: float) -> None:
    """A sample's output does not depend on the samples beside it."""
    mixer = _shaken(spec, site, width)
    x = _input(site, batch=3)
    with torch.no_grad():
        together = mixer(x)
        alone = torch.cat([mixer(sample[None]) for sample in x])
    _demand_same(together, alone, "each sample's output to be the same alone as in a batch")


@_check()
def check_tokens_mix(spec: MixerSpec, site: Site, width: float) -> None:
    """Most tokens see at least one other token."""
    touched = _touched(_shaken(spec, site, width), site)
    others = touched.masked_fill(torch.eye(site.tokens, dtype=torch.bool), 0)
    seeing = int((others.amax(0) > SEEN).sum())
    _demand(
        2 * seeing >= site.tokens,
        "tokens to mix (or the claim per_token)",
        f"{seeing} of {site.tokens} tokens that see another",
    )


@_check()
def check_per_token(spec: MixerSpec, site: Site, width: float) -> None:
    """With per_token claimed, no token sees another."""
    touched = _touched(_shaken(spec, site, width), site)
    others = touched.masked_fill(torch.eye(site.tokens, dtype=torch.bool), 0)
    # Written so that NaN counts as seen.
    seeing = int((~(others.amax(0) <= LEAK)).sum())
    _demand(
        not seeing,
        "no token to see another, as per_token claims",
        f"{seeing} of {site.tokens} tokens that do",
    )


@_check()
def check_gradients(spec: MixerSpec, site: Site, width: float) -> None:
    """A gradient reaches every trainable parameter."""
    mixer = _shaken(spec, site, width)
    loss = (mixer(_input(site, batch=4)) * _input(site, batch=4, seed=3)).sum()
    for name, gradient in _gradients(mixer, loss).items():
        expected = f"a gradient for '{name}'"
        if gradient is None:
            raise _Mismatch(f"expected {expected}, found none: forward does not use it")
        _demand(bool(gradient.isfinite().all()), f"a finite gradient for '{name}'", "NaN or infinity")
        _demand(bool((gradient != 0).any()), expected, "one that is zero everywhere")


@_check(only=min)
def check_gradcheck(spec: MixerSpec, site: Site, width: float) -> None:
    """In float64 the gradients of input and parameters agree with finite differences."""
    mixer = _shaken(spec, site, width)
    names = [name for name, p in mixer.named_parameters() if p.requires_grad]
    weights = [p.detach().clone().requires_grad_() for p in mixer.parameters() if p.requires_grad]
    x = _input(site).requires_grad_()

    def forward(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        out = torch.func.functional_call(mixer, dict(zip(names, parameters, strict=True)), (x,))
        assert isinstance(out, torch.Tensor)
        return out

    if not forward(x, *weights).requires_grad:
        moved = _gap(forward(2 * x, *weights), forward(x, *weights))
        _demand(moved == 0, "an output that can be differentiated", "one cut off from its input")
        return
    torch.manual_seed(0)
    agree = torch.autograd.gradcheck(forward, (x, *weights), fast_mode=True, raise_exception=False)
    _demand(
        agree,
        "gradients as by finite differences in float64",
        "others (a wrong backward, or float32 inside?)",
    )


@_check(only=max)
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
    _demand(grows, "more parameters at every greater width", listed)


@_check()
def check_state_dict(spec: MixerSpec, site: Site, width: float) -> None:
    """The state dict is all there is: loaded into another build, it gives the same output."""
    mixer, other = _shaken(spec, site, width), _made(spec, site, width, seed=8).double()
    other.load_state_dict(mixer.state_dict())
    x = _input(site)
    with torch.no_grad():
        _demand_same(other(x), mixer(x), "the same output from the same state dict")


@_check()
def check_deepcopy(spec: MixerSpec, site: Site, width: float) -> None:
    """A deep copy gives the same output, and shares nothing with the original."""
    mixer = _shaken(spec, site, width)
    twin = copy.deepcopy(mixer)
    x = _input(site)
    with torch.no_grad():
        before = mixer(x)
        _demand_same(twin(x), before, "the same output from a deep copy")
        for one, other, whose in ((mixer, twin, "its deep copy"), (twin, mixer, "the original")):
            before = other(x)
            for parameter in one.parameters():
                parameter.add_(1)
            _demand_same(other(x), before, f"{whose} not to change with the other's weights")


@_check()
def check_bfloat16(spec: MixerSpec, site: Site, width: float) -> None:
    """In bfloat16, an input thirty times the usual still gives finite numbers."""
    mixer = _made(spec, site, width)
    for name, parameter in mixer.named_parameters():
        # A cast of the module would silently drop the imaginary part.
        _demand(
            not parameter.is_complex(), f"'{name}' to be real (see torch.view_as_complex)", "a complex one"
        )
    x = 30 * _input(site, dtype=torch.bfloat16)
    with torch.no_grad():
        out = mixer.to(torch.bfloat16)(x)
    _demand(out.dtype == x.dtype, str(x.dtype), str(out.dtype))
    _demand(bool(out.isfinite().all()), "finite output in bfloat16 at 30 times the input", "NaN or infinity")


@_check()
def check_noncontiguous(spec: MixerSpec, site: Site, width: float) -> None:
    """Strides do not matter."""
    mixer = _shaken(spec, site, width)
    x = _input(site)
    transposed = x.transpose(1, 2).contiguous().transpose(1, 2)
    strided = x.repeat_interleave(2, dim=-1)[..., ::2]
    expanded = x[:1].expand_as(x)
    with torch.no_grad():
        for one in (transposed, strided, expanded):
            _demand_same(
                mixer(one), mixer(one.contiguous()), "a non-contiguous input to give what its copy gives"
            )


# -- what a mixer must do once it says so --


@_check()
def check_any_length(spec: MixerSpec, site: Site, width: float) -> None:
    """With any_length claimed, the same weights work for 1, 5, 17 and 33 tokens."""
    mixer = _shaken(spec, site, width)
    for tokens in LENGTHS:
        x = _input(site, tokens=tokens)
        try:
            with torch.no_grad():
                out = mixer(x)
        except Exception as error:
            raise _Mismatch(
                f"expected {tokens} tokens to work with any_length, found {type(error).__name__}: {error}"
            ) from error
        _demand(out.shape == x.shape, f"shape {tuple(x.shape)} for {tokens} tokens", f"{tuple(out.shape)}")
        _demand(bool(out.isfinite().all()), f"finite output for {tokens} tokens", "NaN or infinity")


@_check()
def check_causal(spec: MixerSpec, site: Site, width: float) -> None:
    """With causal claimed, and built with causal=True, a token never sees a later one: value and gradient.

    A causal site is one of a language model: it has neither prefix nor grid.
    """
    text = replace(site, prefix=0, grid=None)
    mixer = _shaken(spec, text, width, causal=True)
    # Row: the token that changed; column: an earlier one, which must not notice.
    ahead = _touched(mixer, text).tril(-1)
    worst = float(ahead.max())
    _demand(worst <= LEAK, "no token to see a later one", f"an earlier output that changed by {worst:.2g}")
    x = _input(text, batch=1).requires_grad_()
    out = mixer(x)
    if not out.requires_grad:
        return
    for token in (0, text.tokens // 2, text.tokens - 2):
        loss = (out[:, : token + 1] * _input(text, batch=1, seed=3)[:, : token + 1]).sum()
        (gradient,) = torch.autograd.grad(loss, x, retain_graph=True, allow_unused=True)
        worst = 0.0 if gradient is None else float(gradient[:, token + 1 :].abs().max())
        _demand(worst <= LEAK, "no gradient from a later token", f"{worst:.2g} after token {token}")


@_check()
def check_masks(spec: MixerSpec, site: Site, width: float) -> None:
    """With masks claimed, padding (right, left or between) changes nothing: value and gradient."""
    mixer = _shaken(spec, site, width)
    n, real = site.tokens, site.tokens * 2 // 3
    mask = torch.ones(4, n, dtype=torch.bool)
    mask[1, real:] = False
    mask[2, : n - real] = False
    mask[3, 2:6] = False
    x = _input(site, batch=4)
    noise = _input(site, batch=4, seed=3)
    loud = torch.where(mask[..., None], x, 1e4 * noise)
    with torch.no_grad():
        _demand_same(mixer(x[:1], mask=mask[:1]), mixer(x[:1]), "an all-true mask to change nothing")

    def run(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, dict[str, torch.Tensor | None]]:
        x = x.clone().requires_grad_()
        out = mixer(x, mask=mask)
        kept = out[mask]
        if not out.requires_grad:
            return kept, None, {}
        loss = (kept * noise[mask]).sum()
        (gradient,) = torch.autograd.grad(loss, x, retain_graph=True, allow_unused=True)
        return kept.detach(), gradient, _gradients(mixer, loss)

    quiet_out, _, quiet_gradients = run(x)
    loud_out, input_gradient, loud_gradients = run(loud)
    _demand_same(loud_out, quiet_out, "real tokens not to depend on padding", LEAK)
    if input_gradient is not None:
        worst = float(input_gradient[~mask].abs().max())
        _demand(worst <= LEAK, "no gradient at padding", f"{worst:.2g}")
    for name, quiet in quiet_gradients.items():
        noisy = loud_gradients[name]
        if quiet is not None and noisy is not None:
            _demand_same(noisy, quiet, f"the gradient of '{name}' not to depend on padding", LEAK)
    if spec.caps.any_length:
        with torch.no_grad():
            padded, short = mixer(loud[1:2], mask=mask[1:2])[:, :real], mixer(x[1:2, :real])
        _demand_same(padded, short, "a padded sequence to give what the shorter one gives")


@_check(only=max)
def check_export(spec: MixerSpec, site: Site, width: float) -> None:
    """With exportable claimed, torch.export works with a dynamic batch (and length) and computes the same."""
    mixer = _made(spec, site, width)
    dynamic: dict[int, Any] = {0: torch.export.Dim.DYNAMIC}
    sizes = [(1, site.tokens), (5, site.tokens)]
    if spec.caps.any_length:
        dynamic[1] = torch.export.Dim.DYNAMIC
        sizes = [(1, site.tokens), (5, site.tokens - 6)]
    x = _input(site, batch=2, dtype=torch.float32)
    # Whatever torch.export warns about on its own account is not the mixer's doing.
    with warnings.catch_warnings(), torch.no_grad():  # as students are exported
        warnings.simplefilter("ignore")
        program = torch.export.export(mixer, (x,), dynamic_shapes=(dynamic,)).module()
        for batch, tokens in sizes:
            other = _input(site, batch=batch, tokens=tokens, dtype=torch.float32, seed=4)
            exported, eager = program(other), mixer(other)
            _demand_same(exported, eager, f"the exported mixer to compute the same at batch {batch}", 1e-4)


@_check()
def check_inherit(spec: MixerSpec, site: Site, width: float) -> None:
    """`inherit` takes the site's view, gives finite parameters, repeats itself, and leaves the view alone."""
    assert spec.inherit is not None
    states: list[nn.Module] = []
    for _ in range(2):
        mixer = _made(spec, site, width)
        view = random_view(site)
        with torch.no_grad():
            spec.inherit(mixer, view)
        for name, parameter in mixer.named_parameters():
            _demand(bool(parameter.isfinite().all()), f"finite '{name}' after inherit", "NaN or infinity")
        states.append(copy.deepcopy(mixer))
        with torch.no_grad():
            out = mixer(_input(site, dtype=torch.float32))
            _demand(bool(out.isfinite().all()), "finite output after inherit", "NaN or infinity")
            # Training must not change the teacher's weights either: a parameter may not be a view of them.
            for parameter in mixer.parameters():
                parameter.add_(1)
        untouched = random_view(site)
        for field in fields(view):
            mine, given = getattr(untouched, field.name), getattr(view, field.name)
            same = torch.equal(mine, given) if isinstance(mine, torch.Tensor) else mine == given
            _demand(
                same,
                f"view.{field.name} left as it was",
                "it was changed, or shares its memory with the mixer",
            )
    _demand_same_state(states[0], states[1], "inherit to give the same weights again")


@_check()
def check_readout(spec: MixerSpec, site: Site, width: float) -> None:
    """`readout` names an nn.Linear that is called once and whose output is the mixer's, up to a reshape."""
    assert spec.readout is not None
    mixer = _shaken(spec, site, width)
    known = dict(mixer.named_modules())
    linear = known.get(spec.readout)
    found = "no such module" if linear is None else f"a {type(linear).__name__}"
    _demand(isinstance(linear, nn.Linear), f"readout '{spec.readout}' to name an nn.Linear", found)
    assert linear is not None
    outputs: list[torch.Tensor] = []
    linear.register_forward_hook(lambda _module, _args, out: outputs.append(out.clone()))
    with torch.no_grad():
        out = mixer(_input(site))
    expected = f"the output of readout '{spec.readout}' to be the mixer's, up to a reshape"
    _demand(len(outputs) == 1, f"readout '{spec.readout}' to be called once", f"{len(outputs)} calls")
    _demand(outputs[0].numel() == out.numel(), expected, f"shape {tuple(outputs[0].shape)}")
    _demand_same(outputs[0].reshape(out.shape), out, expected)


@_check()
def check_units(spec: MixerSpec, site: Site, width: float) -> None:
    """A pruned mixer, built smaller from its sizes, computes what the whole one does with those units silent."""
    assert spec.units is not None
    mixer = _shaken(spec, site, width)
    kinds = checked(spec.units(mixer), mixer, "its units")
    _demand(bool(kinds), "units that can be pruned", "none")
    x = _input(site)
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
            _demand_same(small(x), whole(x), f"the same with half of its '{kind}' cut as with them silent")
            _demand(
                _gap(mixer(x), whole(x)) > SEEN, f"its '{kind}' to matter", "the same output without them"
            )
        counts = [sum(p.numel() for p in m.parameters()) for m in (small, mixer)]
        _demand(
            counts[0] < counts[1],
            f"fewer parameters with half of its '{kind}'",
            f"{counts[0]} of {counts[1]}",
        )


def _given(kept: torch.Tensor, _sizes: torch.Tensor, _count: int) -> torch.Tensor:
    return kept


# -- running them --


@dataclass(frozen=True)
class Check:
    """One check, and when it applies.

    Attributes:
        name: short, as it is shown.
        function: raises ConformanceError unless the mixer passes at the site.
        needs: what a mixer must claim (a field of Caps) or give (a field of MixerSpec) for it to apply.
        unless: the claim that takes its place.
    """

    name: str
    function: AllWidths
    needs: str = ""
    unless: str = ""

    @property
    def summary(self) -> str:
        """One line: what is demanded."""
        return (self.function.__doc__ or "").partition("\n")[0]

    def reason_to_skip(self, spec: MixerSpec) -> str:
        """Return why the check does not apply to `spec`; empty if it does."""
        if self.unless and getattr(spec.caps, self.unless):
            return f"{self.unless} is claimed"
        if hasattr(spec.caps, self.needs):
            return "" if getattr(spec.caps, self.needs) else f"{self.needs} is not claimed"
        if self.needs and not getattr(spec, self.needs):
            return f"no {self.needs} is given"
        return ""

    def __call__(self, spec: MixerSpec) -> None:
        """Run the check on the default sites.

        Raises:
            ConformanceError: if the mixer does not pass.
        """
        for site in default_sites(spec):
            self.function(spec, site)


CHECKS: tuple[Check, ...] = (
    Check("shape", check_shape),
    Check("oblong_grid", check_oblong_grid),
    Check("deterministic", check_deterministic),
    Check("seeded", check_seeded),
    Check("input_unchanged", check_input_unchanged),
    Check("batch_independent", check_batch_independent),
    Check("tokens_mix", check_tokens_mix, unless="per_token"),
    Check("per_token", check_per_token, needs="per_token"),
    Check("gradients", check_gradients),
    Check("gradcheck", check_gradcheck),
    Check("width_grows", check_width_grows),
    Check("state_dict", check_state_dict),
    Check("deepcopy", check_deepcopy),
    Check("bfloat16", check_bfloat16),
    Check("noncontiguous", check_noncontiguous),
    Check("any_length", check_any_length, needs="any_length"),
    Check("causal", check_causal, needs="causal"),
    Check("masks", check_masks, needs="masks"),
    Check("export", check_export, needs="exportable"),
    Check("inherit", check_inherit, needs="inherit"),
    Check("readout", check_readout, needs="readout"),
    Check("units", check_units, needs="units"),
)


@dataclass(frozen=True)
class CheckResult:
    """The outcome of one check.

    Attributes:
        name: of the check.
        passed: whether it was run and passed.
        skipped: whether it does not apply; `message` says why.
        message: one line; empty for a pass.
        seconds: how long it took.
    """

    name: str
    passed: bool
    skipped: bool
    message: str
    seconds: float

    @property
    def failed(self) -> bool:
        """Whether it was run and did not pass."""
        return not (self.passed or self.skipped)


def checks_for(spec: MixerSpec) -> tuple[Check, ...]:
    """Return the checks that apply to a mixer: those for all, and those for what it claims."""
    return tuple(check for check in CHECKS if not check.reason_to_skip(spec))


def run_checks(spec: MixerSpec) -> list[CheckResult]:
    """Run every check on a mixer and return one result each, never raising for a mixer that fails."""
    results = []
    for check in CHECKS:
        reason = check.reason_to_skip(spec)
        if reason:
            results.append(CheckResult(check.name, False, True, reason, 0.0))
            continue
        started = time.perf_counter()
        try:
            check(spec)
            message = ""
        except ConformanceError as error:
            message = str(error)
        results.append(CheckResult(check.name, not message, False, message, time.perf_counter() - started))
    return results


def parametrize_with_checks(*names: str) -> pytest.MarkDecorator:
    """Parametrise a test with every check that applies to the named mixers; it calls its argument `check`.

    Raises:
        MixerzooError: if no installed plugin offers a mixer of that name.
    """
    import pytest

    cases = [
        pytest.param(lambda check=check, spec=spec: check(spec), id=f"{spec.name}-{check.name}")
        for spec in map(_registered, names)
        for check in checks_for(spec)
    ]
    return pytest.mark.parametrize("check", cases)


def _registered(name: str) -> MixerSpec:
    registry = get_registry()
    try:
        return registry.mixers.get(name)
    except MixerzooError as error:
        # The usual reason for a plugin's own mixer to be missing is that the plugin did not load.
        broken = "; ".join(f"plugin {plugin.origin} is broken: {plugin.error}" for plugin in registry.broken)
        raise MixerzooError(f"{error} {broken}".strip()) from None
