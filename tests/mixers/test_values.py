"""Values and gradients of every built-in mixer against the slow references of mixerzoo_mixers.naive."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mixerzoo import MixerSpec, MixerzooError, Site
from mixerzoo.export.quiet import quietly
from mixerzoo_mixers import ssm
from mixerzoo_mixers.naive import REFERENCES

from . import SPECS, draw_mask, site

ALL = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def reference(spec: MixerSpec, mixer: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    real = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
    return torch.stack([REFERENCES[spec.name](mixer, v, r) for v, r in zip(x, real, strict=True)])


def gradients(loss: Tensor, x: Tensor, mixer: nn.Module) -> list[Tensor]:
    wanted = [x, *mixer.parameters()]
    found = torch.autograd.grad(loss, wanted, allow_unused=True)
    return [torch.zeros_like(w) if f is None else f for w, f in zip(wanted, found, strict=True)]


def agree(spec: MixerSpec, where: Site, width: float, masked: bool, seed: int) -> None:
    torch.manual_seed(seed)
    mixer = spec.make(where, width).double()
    x = torch.randn(2, where.tokens, where.dim, dtype=torch.double, requires_grad=True)
    mask = draw_mask(2, where.tokens) if masked else None
    weights = torch.randn_like(x)
    if mask is not None:
        weights = weights * mask.unsqueeze(-1)
    got = mixer(x) if mask is None else mixer(x, mask=mask)
    expected = reference(spec, mixer, x, mask)
    losses = [(weights * y).sum() for y in (got, expected)]
    torch.testing.assert_close(losses[0], losses[1])
    if mask is None:
        torch.testing.assert_close(got, expected)
    for found, wanted in zip(*(gradients(loss, x, mixer) for loss in losses), strict=True):
        torch.testing.assert_close(found, wanted)


@ALL
@settings(max_examples=8, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_agrees_with_its_reference(spec: MixerSpec, data: st.DataObject) -> None:
    heads = data.draw(st.integers(1, 3), "heads")
    tokens = data.draw(st.sampled_from([1, 2, 3, 5, 7, 11, 19]), "tokens")
    where = site(
        spec,
        dim=heads * data.draw(st.sampled_from([1, 2, 3, 4]), "head width"),
        heads=heads,
        tokens=tokens,
        prefix=data.draw(st.integers(0, 1), "prefix"),
        causal=spec.caps.causal and data.draw(st.booleans(), "causal"),
        hidden=data.draw(st.sampled_from([3, 8, 21]), "hidden"),
        activation=data.draw(st.sampled_from(["gelu", "gelu_tanh", "relu", "silu", "quick_gelu"]), "act"),
    )
    width = data.draw(st.sampled_from(spec.widths), "width")
    masked = spec.caps.masks and data.draw(st.booleans(), "masked")
    agree(spec, where, width, masked, data.draw(st.integers(0, 99), "seed"))


@ALL
def test_agrees_with_its_reference_in_every_mode(spec: MixerSpec) -> None:
    """What drawing may miss: masked or not, causal or not, prefix or not, at every width."""
    for width in spec.widths:
        for causal in {False, spec.caps.causal}:
            for masked in {False, spec.caps.masks}:
                agree(
                    spec,
                    site(spec, dim=6, heads=3, tokens=7, prefix=width < 1, causal=causal),
                    width,
                    masked,
                    0,
                )


@pytest.mark.parametrize("name", ["linear_attention", "mamba", "pool"])
@pytest.mark.parametrize("masked", [False, True])
def test_long_sequences_cross_chunks(name: str, masked: bool) -> None:
    spec = SPECS[name]
    for causal in (False, True):
        agree(spec, site(spec, dim=2, heads=1, tokens=131, causal=causal), spec.widths[0], masked, 0)


@ALL
def test_one_set_of_weights_serves_every_length(spec: MixerSpec) -> None:
    """Alone, and as the real part of the longest: with padding behind it, a sequence is what it was."""
    if not spec.caps.any_length:
        pytest.skip("has a fixed length")
    torch.manual_seed(0)
    lengths = (1, 65, 257, 1025)
    for causal in {False, spec.caps.causal}:
        mixer = spec.make(site(spec, causal=causal), spec.widths[0]).double().eval()
        x = torch.randn(len(lengths), 1025, 12, dtype=torch.double)
        mask = torch.arange(1025) < torch.tensor(lengths)[:, None]
        with torch.no_grad():
            padded = mixer(x, mask=mask) if spec.caps.masks else None
            for row, length in enumerate(lengths):
                y = mixer(x[row : row + 1, :length])
                assert y.isfinite().all()
                if padded is not None:
                    torch.testing.assert_close(padded[row, :length], y[0])


@ALL
def test_gradcheck(spec: MixerSpec) -> None:
    torch.manual_seed(0)
    for causal in {False, spec.caps.causal}:
        mixer = spec.make(site(spec, dim=4, heads=2, tokens=5, causal=causal), spec.widths[0]).double()
        x = torch.randn(2, 5, 4, dtype=torch.double, requires_grad=True)
        assert torch.autograd.gradcheck(mixer, (x,))


@ALL
def test_nan_in_the_padding_stays_there(spec: MixerSpec) -> None:
    if not spec.caps.masks or spec.caps.per_token:
        pytest.skip("does not mix, or does not take masks")
    torch.manual_seed(0)
    for causal in {False, spec.caps.causal}:
        mixer = spec.make(site(spec, tokens=9, causal=causal), spec.widths[0])
        mask = draw_mask(3, 9)
        clean = torch.randn(3, 9, 12)
        dirty = clean.masked_fill(~mask.unsqueeze(-1), torch.nan).requires_grad_()
        y = mixer(dirty, mask=mask)
        torch.testing.assert_close(y[mask], mixer(clean, mask=mask)[mask])
        for found in gradients(y[mask].sum(), dirty, mixer):
            assert found.isfinite().all()
        assert (torch.autograd.grad(mixer(dirty, mask=mask)[mask].sum(), dirty)[0][~mask] == 0).all()


@ALL
def test_never_looks_ahead(spec: MixerSpec) -> None:
    if not spec.caps.causal:
        pytest.skip("is not causal")
    torch.manual_seed(0)
    mixer = spec.make(site(spec, tokens=70, causal=True), spec.widths[-1]).eval()
    x = torch.randn(2, 70, 12)
    y = mixer(x)
    for place in (1, 17, 64, 69):
        changed = x.clone()
        changed[:, place:] = torch.randn_like(changed[:, place:])
        torch.testing.assert_close(mixer(changed)[:, :place], y[:, :place], rtol=1e-5, atol=1e-6)


@ALL
def test_is_finite_in_bfloat16(spec: MixerSpec) -> None:
    torch.manual_seed(0)
    for causal in {False, spec.caps.causal}:
        for width in spec.widths:
            mixer = spec.make(site(spec, tokens=33, causal=causal), width).bfloat16().eval()
            y = mixer(30 * torch.randn(2, 33, 12, dtype=torch.bfloat16))
            assert y.dtype == torch.bfloat16
            assert y.isfinite().all()


@ALL
def test_takes_views_and_copies(spec: MixerSpec) -> None:
    torch.manual_seed(0)
    where = site(spec, tokens=7)
    for width in spec.widths:
        mixer = spec.make(where, width).eval()
        x = torch.randn(7, 12, 3).permute(2, 0, 1)
        y = mixer(x)
        assert y.shape == x.shape
        torch.testing.assert_close(mixer(x.contiguous()), y)
        torch.testing.assert_close(copy.deepcopy(mixer)(x), y)
        other = spec.make(where, width).eval()
        other.load_state_dict(mixer.state_dict())
        torch.testing.assert_close(other(x), y)


@ALL
def test_random_start_is_sane(spec: MixerSpec) -> None:
    torch.manual_seed(0)
    for width in spec.widths:
        y = spec.make(site(spec, dim=48, tokens=50, hidden=192), width)(torch.randn(8, 50, 48))
        assert spec.name == "none" or 0.03 < y.std() < 3


@ALL
def test_readout_gives_the_output(spec: MixerSpec) -> None:
    if spec.readout is None:
        pytest.skip("has no readout")
    torch.manual_seed(0)
    for causal in {False, spec.caps.causal}:
        mixer = spec.make(site(spec, tokens=7, prefix=1, causal=causal), spec.widths[0]).eval()
        x = torch.randn(2, 7, 12)
        free = mixer(x)
        seen: list[Tensor] = []
        readout = mixer.get_submodule(spec.readout)
        assert type(readout) is nn.Linear
        handle = readout.register_forward_hook(lambda *call, seen=seen: seen.append(call[-1]))
        y = mixer(x)
        handle.remove()
        torch.testing.assert_close(seen[0].reshape(y.shape), y)
        torch.testing.assert_close(free, y)


@ALL
def test_exports(spec: MixerSpec) -> None:
    if not spec.caps.exportable:
        pytest.skip("is not exportable")
    torch.manual_seed(0)
    for causal in {False, spec.caps.causal and not spec.caps.per_token}:
        mixer = spec.make(site(spec, tokens=20, prefix=1, causal=causal), spec.widths[0]).eval()
        dynamic: dict[int, Any] = {0: torch.export.Dim("batch", min=1, max=64)}
        if spec.caps.any_length:
            dynamic[1] = torch.export.Dim("tokens", min=2, max=512)
        with quietly(), torch.no_grad():
            program = torch.export.export(mixer, (torch.randn(2, 20, 12),), dynamic_shapes=(dynamic,))
        for shape in ((1, 20), (5, 20), (3, 77), (1, 2)):
            if shape[1] == 20 or spec.caps.any_length:
                x = torch.randn(*shape, 12)
                torch.testing.assert_close(program.module()(x), mixer(x), rtol=1e-5, atol=1e-5)


@ALL
def test_wrong_length_is_named(spec: MixerSpec) -> None:
    mixer = spec.make(site(spec, tokens=7), spec.widths[0])
    if spec.caps.any_length:
        assert mixer(torch.randn(1, 4, 12)).shape == (1, 4, 12)
    else:
        with pytest.raises(ValueError, match="built for 7 tokens, got 4"):
            mixer(torch.randn(1, 4, 12))


@pytest.mark.parametrize("name", ["static", "glu_mlp", "linear_attention", "multihead_lstm"])
def test_heads_must_divide_the_width(name: str) -> None:
    with pytest.raises(MixerzooError, match="model width 12 cannot be split over 5 heads"):
        SPECS[name].make(site(SPECS[name], heads=5), 1.0)


def test_fused_scan_is_only_looked_for_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssm, "fused_scan", lambda: pytest.fail("asked for on a CPU"))
    SPECS["mamba"].make(site(SPECS["mamba"]), 0.5)(torch.randn(1, 5, 12))
