"""Mixing in the spectrum: the transforms against torch.fft and SciPy, and what the mixers start as."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixerzoo import AttentionView, MixerSpec
from mixerzoo_mixers import spectral
from mixerzoo_mixers.spectral import AFNO, FNET, GLOBAL_FILTER, BlockMlp, Spectrum

from . import attention_view, draw_mask, site

DIM, HEADS = 12, 3
GRIDS = [(1, 1), (1, 2), (2, 1), (1, 7), (6, 1), (3, 4), (4, 3), (5, 5), (14, 14), (16, 9)]


def made(spec: MixerSpec, grid: tuple[int, int], prefix: int = 0, **changes: Any) -> nn.Module:
    where = site(spec, dim=DIM, heads=HEADS, tokens=grid[0] * grid[1] + prefix, grid=grid, prefix=prefix)
    return spec.make(replace(where, **changes), 1.0).double()


def inherited(spec: MixerSpec, view: AttentionView, grid: tuple[int, int], prefix: int = 0) -> nn.Module:
    mixer = made(spec, grid, prefix)
    assert spec.inherit is not None
    with torch.no_grad():
        spec.inherit(mixer, view)
    return mixer


def with_maps(view: AttentionView, x: Tensor, maps: Tensor) -> Tensor:
    """The teacher's attention with the given maps, (H, N, N)."""
    values = F.linear(x, view.v_weight, view.v_bias).unflatten(-1, (HEADS, -1)).transpose(1, 2)
    return F.linear((maps @ values).transpose(1, 2).flatten(2), view.out_weight, view.out_bias)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


# -- the transforms --


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("dtype", [torch.float, torch.double])
def test_spectrum_is_rfft2(grid: tuple[int, int], dtype: torch.dtype) -> None:
    spectrum = Spectrum(grid).to(dtype)
    x = torch.randn(2, grid[0] * grid[1], 3, dtype=dtype)
    y = spectrum(x)
    expected = torch.fft.rfft2(x.unflatten(1, grid), dim=(1, 2), norm="ortho")
    torch.testing.assert_close(torch.complex(y[:, 0], y[:, 1]), expected)
    torch.testing.assert_close(spectrum.inverse(y), x)
    # Not of any real grid: the parts that none has are dropped.
    z = torch.randn_like(y)
    expected = torch.fft.irfft2(torch.complex(z[:, 0], z[:, 1]), s=grid, dim=(1, 2), norm="ortho")
    torch.testing.assert_close(spectrum.inverse(z), expected.flatten(1, 2))


@pytest.mark.parametrize("spec", [GLOBAL_FILTER, AFNO], ids=lambda spec: spec.name)
@pytest.mark.parametrize("grid", [(1, 7), (3, 4), (4, 5)])
def test_ffts_take_over_on_large_grids(
    spec: MixerSpec, grid: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = made(spec, grid, prefix=1)
    monkeypatch.setattr(spectral, "LONGEST", 0)
    large = made(spec, grid, prefix=1)
    large.load_state_dict(small.state_dict())
    x = torch.randn(2, grid[0] * grid[1] + 1, DIM, dtype=torch.double, requires_grad=True)
    ys = [mixer(x) for mixer in (small, large)]
    torch.testing.assert_close(*ys)
    weights = torch.randn_like(x)
    torch.testing.assert_close(*(torch.autograd.grad((weights * y).sum(), x)[0] for y in ys))
    assert large.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_matrices_keep_the_precision_of_the_cast() -> None:
    grid = (9, 14)
    spectrum = Spectrum(grid)
    exact = spectral.grid_matrices(*grid)
    assert not spectrum.state_dict()
    for dtype in (torch.bfloat16, torch.double, torch.float16, torch.float):
        spectrum.to(dtype)
        assert spectrum.dft is not None
        for name, matrix in exact.items():
            kept = torch.promote_types(dtype, torch.float)
            assert torch.equal(spectrum.dft[name], matrix.to(kept))


# -- fnet --


@pytest.mark.parametrize("tokens", [1, 2, 5, 12, 65, 197])
def test_fourier_is_the_real_part_of_both_transforms(tokens: int) -> None:
    """All three ways, against the product with SciPy's complex matrices, as in FNet's own code."""
    for channels in (1, 2, 7, 12):
        v = torch.randn(2, tokens, channels, dtype=torch.double)
        left, right = (torch.from_numpy(scipy.linalg.dft(n, scale="sqrtn")) for n in (tokens, channels))
        expected = (left @ v.to(left.dtype) @ right).real
        matrix = spectral.fnet_matrices(channels)["channels"]
        torch.testing.assert_close(spectral.fourier(v, matrix), expected)
        torch.testing.assert_close(spectral.fourier_of_each(v, torch.tensor([tokens, tokens])), expected)
        torch.testing.assert_close(torch.fft.fft2(v, dim=(1, 2), norm="ortho").real, expected)


def test_transforming_twice_gives_the_sequence_and_its_reverse() -> None:
    """Re F is a symmetric matrix with (Re F)^2 = (1 + flip) / 2, over both axes at once."""
    v = torch.randn(1, 9, 6, dtype=torch.double)
    twice = spectral.fourier_of_each(spectral.fourier_of_each(v, torch.tensor([9])), torch.tensor([9]))
    torch.testing.assert_close(twice, (v + v.flip(1, 2).roll((1, 1), (1, 2))) / 2)


@pytest.mark.parametrize("dtype", [torch.float, torch.double])
def test_padding_counts_for_nothing_at_length(dtype: torch.dtype) -> None:
    mixer = made(FNET, (1, 5)).to(dtype)
    x, mask = torch.randn(3, 700, DIM, dtype=dtype), draw_mask(3, 700)
    y = mixer(x, mask=mask)
    for sample, real, got in zip(x, mask, y, strict=True):
        torch.testing.assert_close(got[real], mixer(sample[real][None])[0])


# -- global_filter --


def test_filter_is_a_circular_convolution() -> None:
    grid = (5, 6)
    mixer: Any = made(GLOBAL_FILTER, grid)
    x = torch.randn(2, 30, DIM, dtype=torch.double)
    v = mixer.value(x).unflatten(1, grid)
    kernel = torch.fft.irfft2(torch.complex(*mixer.filter.detach()), s=grid, dim=(0, 1))
    mixed = sum(kernel[i, j] * v.roll((i, j), dims=(1, 2)) for i in range(grid[0]) for j in range(grid[1]))
    assert isinstance(mixed, Tensor)
    torch.testing.assert_close(mixer(x), mixer.readout(torch.cat((mixed.flatten(1, 2), x), dim=-1)))


def circulant_maps(grid: tuple[int, int]) -> Tensor:
    """Random maps (H, cells, cells) that depend on how far apart two cells are around the edges."""
    kernel = torch.randn(HEADS, *grid, dtype=torch.double).flatten(1).softmax(dim=1).view(HEADS, *grid)
    columns = [kernel.roll((i, j), dims=(1, 2)).flatten(1) for i in range(grid[0]) for j in range(grid[1])]
    return torch.stack(columns, dim=2)


@pytest.mark.parametrize("grid", [(1, 5), (3, 4), (4, 3)])
@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_filter_starts_as_a_circulant_mean_attention(grid: tuple[int, int], prefix: int) -> None:
    """Exact where the map is one: a filter over the grid, and a share for the prefix tokens' mean."""
    cells = grid[0] * grid[1]
    share = torch.rand(HEADS, 1, 1, dtype=torch.double) if prefix else torch.zeros(HEADS, 1, 1).double()
    maps = torch.empty(HEADS, prefix + cells, prefix + cells, dtype=torch.double)
    maps[:, :, :prefix] = share / max(prefix, 1)
    maps[:, :prefix, prefix:] = (1 - share) / cells
    maps[:, prefix:, prefix:] = (1 - share) * circulant_maps(grid)
    view = replace(attention_view(DIM, HEADS, prefix + cells), mean_attention=maps)
    x = torch.randn(2, prefix + cells, DIM, dtype=torch.double)
    torch.testing.assert_close(inherited(GLOBAL_FILTER, view, grid, prefix)(x), with_maps(view, x, maps))


def test_circulant_is_the_nearest() -> None:
    """What is left of a map is orthogonal to every circulant one."""
    grid = (3, 4)
    maps = torch.rand(HEADS, 12, 12, dtype=torch.double)
    kernel = spectral.circulant(maps, grid)
    columns = [kernel.roll((i, j), dims=(1, 2)).flatten(1) for i in range(3) for j in range(4)]
    rest = maps - torch.stack(columns, dim=2)
    assert spectral.circulant(rest, grid).abs().max() < 1e-12
    torch.testing.assert_close(spectral.circulant(circulant_maps(grid), grid).sum(), maps.new_tensor(HEADS))


# -- afno --


@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (1, 6)])
def test_afno_agrees_with_its_definition_in_complex_numbers(grid: tuple[int, int]) -> None:
    mixer: Any = made(AFNO, grid)
    with torch.no_grad():
        for parameter in mixer.mlp.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    x = torch.randn(2, grid[0] * grid[1], DIM, dtype=torch.double)
    z = torch.fft.rfft2(mixer.value(x).unflatten(1, grid), dim=(1, 2), norm="ortho").unflatten(
        -1, (HEADS, -1)
    )

    def affine(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.einsum("...hr,hrs->...hs", z, torch.complex(*weight)) + torch.complex(*bias)

    def parts(function: Any, z: Tensor) -> Tensor:
        return torch.complex(function(z.real), function(z.imag))

    z = parts(F.relu, affine(z, mixer.mlp.weight1, mixer.mlp.bias1))
    z = parts(lambda t: F.softshrink(t, 0.01), affine(z, mixer.mlp.weight2, mixer.mlp.bias2)).flatten(-2)
    mixed = torch.fft.irfft2(z, s=grid, dim=(1, 2), norm="ortho").flatten(1, 2)
    torch.testing.assert_close(mixer(x), mixer.readout(torch.cat((mixed, x), dim=-1)))


def test_block_mlp_of_one_block_is_a_complex_mlp() -> None:
    mlp = BlockMlp(1, 4).double()
    z = np.random.default_rng(0).normal(size=(5, 8))
    one, two, start, end = (
        torch.complex(*w.detach()[:, 0]).numpy() for w in (mlp.weight1, mlp.weight2, mlp.bias1, mlp.bias2)
    )
    hidden = (z[:, :4] + 1j * z[:, 4:]) @ one + start
    out = (np.maximum(hidden.real, 0) + 1j * np.maximum(hidden.imag, 0)) @ two + end
    expected = torch.from_numpy(np.concatenate((out.real, out.imag), axis=1))
    torch.testing.assert_close(mlp(torch.from_numpy(z)[None])[0], expected)


@pytest.mark.parametrize("spec", [FNET, AFNO], ids=lambda spec: spec.name)
@pytest.mark.parametrize("prefix", [0, 2])
def test_starts_as_attention_to_itself(spec: MixerSpec, prefix: int) -> None:
    """What is mixed comes in at a tenth; without it, every token sees itself alone."""
    view = attention_view(DIM, HEADS, 12 + prefix)
    mixer: Any = inherited(spec, view, (3, 4), prefix)
    assert (mixer.readout.weight[:, :DIM] != 0).all()
    with torch.no_grad():
        mixer.readout.weight[:, :DIM] = 0
    x = torch.randn(2, 12 + prefix, DIM, dtype=torch.double)
    torch.testing.assert_close(mixer(x), with_maps(view, x, torch.eye(12 + prefix, dtype=torch.double)))
