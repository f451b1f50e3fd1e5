"""The dual-tree complex wavelet transform by itself, and what the mixer on it can be and starts as."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mixerzoo import MixerzooError
from mixerzoo_mixers import wavelet
from mixerzoo_mixers.naive import wavelet as slow
from mixerzoo_mixers.wavelet import SCATTERING, Wavelets

from . import attention_view, site

DIM, HEADS = 12, 3
GRIDS = [(1, 1), (1, 6), (7, 1), (2, 2), (3, 4), (5, 7), (14, 14), (16, 9)]
TOLERANCES = [(torch.float, 1e-6), (torch.double, 1e-12)]


def made(grid: tuple[int, int], prefix: int = 0) -> Any:
    where = site(
        SCATTERING, dim=DIM, heads=HEADS, tokens=grid[0] * grid[1] + prefix, prefix=prefix, grid=grid
    )
    return SCATTERING.make(where, 1.0).double()


def with_maps(view: Any, x: Tensor, maps: Tensor) -> Tensor:
    """The teacher's attention with the given maps, (H, N, N)."""
    values = F.linear(x, view.v_weight, view.v_bias).unflatten(-1, (HEADS, -1)).transpose(1, 2)
    return F.linear((maps @ values).transpose(1, 2).flatten(2), view.out_weight, view.out_bias)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def test_filters_are_biorthogonal() -> None:
    """Exactly, in fractions: low times low plus high times high is one, and nothing of a constant is high."""

    def product(one: list[Any], other: list[Any]) -> list[Any]:
        out = [0] * (len(one) + len(other) - 1)
        for i, a in enumerate(one):
            for j, b in enumerate(other):
                out[i + j] += a * b
        return out

    total = [
        low + high for low, high in zip(product(slow.H0, slow.G0), product(slow.H1, slow.G1), strict=True)
    ]
    assert total == [int(n == 15) for n in range(31)]
    assert [sum(taps) for taps in (slow.H0, slow.G0, slow.H1, slow.G1)] == [1, 1, 0, 0]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
def test_inverse_gives_the_grid_back(grid: tuple[int, int], dtype: torch.dtype, tolerance: float) -> None:
    wavelets = Wavelets(grid, 2).to(dtype)
    x = torch.randn(3, grid[0] * grid[1], 8, dtype=dtype)
    low, high = wavelets(x)
    torch.testing.assert_close(wavelets.inverse(low, high), x, rtol=0, atol=10 * x.std().item() * tolerance)


@pytest.mark.parametrize("size", range(1, 24))
def test_matrices_are_filters_with_mirrored_edges(size: int) -> None:
    """NumPy's symmetric padding and a plain convolution give the same, also where filters are longer than lines."""
    import numpy as np

    analysis, synthesis = wavelet.axis_matrices(size)
    x = np.random.default_rng(size).normal(size=size)
    even = size + size % 2
    padded = np.pad(x, (0, even - size), mode="symmetric")
    expected = [
        np.convolve(np.pad(padded, len(taps) // 2, mode="symmetric"), np.array(taps, dtype=float), "valid")
        for taps in (slow.H0, slow.H1)
    ]
    torch.testing.assert_close(analysis @ torch.from_numpy(x), torch.from_numpy(np.concatenate(expected)))
    torch.testing.assert_close(synthesis @ analysis, torch.eye(size, dtype=torch.double))


@pytest.mark.parametrize(("slope", "orientation"), [(1, 0), (-1, 1)])
def test_a_diagonal_wave_has_one_orientation(slope: int, orientation: int) -> None:
    """In the middle of the band, four cells a period, the other one of the pair sees nothing of it."""
    wavelets = Wavelets((32, 32), 1).double()
    row, column = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    wave = torch.cos(torch.pi / 2 * (row + slope * column).double())
    _, high = wavelets(wave.reshape(1, -1, 1))
    inner = high[0, 2, 0, 5:-5, 5:-5]  # away from the mirrored edges
    energy = (inner**2).sum(dim=(0, 1, 3))
    assert energy[orientation] > 1
    assert energy[1 - orientation] < 1e-12


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("prefix", [0, 1])
def test_can_be_the_identity(grid: tuple[int, int], prefix: int) -> None:
    """Unit weights below; above, an MLP whose units never reach the kink."""
    mixer = made(grid, prefix)
    eye = torch.eye(DIM // HEADS).double()
    with torch.no_grad():
        for weight in (mixer.mlp.weight1, mixer.mlp.weight2):
            weight.zero_()
            weight[0] = eye
        mixer.mlp.bias1.fill_(10)
        mixer.mlp.bias2.fill_(-10)
    x = torch.randn(2, grid[0] * grid[1] + prefix, DIM, dtype=torch.double)
    values = mixer.value(x)[:, prefix:]
    low, high = mixer.wavelets(values)
    torch.testing.assert_close(mixer.mlp(high), high)
    torch.testing.assert_close(mixer.wavelets.inverse(low * mixer.low, mixer.mlp(high)), values)


def test_high_bands_are_rotated_by_complex_weights() -> None:
    """A phase is a complex factor of the high bands, and nothing else."""
    mixer = made((4, 6))
    with torch.no_grad():
        for weight in (mixer.mlp.weight1, mixer.mlp.weight2):
            weight.zero_()
        mixer.mlp.weight1[0] = mixer.mlp.weight2[1] = torch.eye(DIM // HEADS)
        mixer.mlp.bias1.fill_(10)
        mixer.mlp.bias2[0], mixer.mlp.bias2[1] = 10, -10
    _, high = mixer.wavelets(torch.randn(2, 24, DIM, dtype=torch.double))
    real, imag = high.chunk(2, dim=-1)
    torch.testing.assert_close(mixer.mlp(high), torch.cat((-imag, real), dim=-1))


def low_map(weights: Tensor, grid: tuple[int, int]) -> Tensor:
    """The map (H, cells, cells) that weights (E, F, H) of the low band make."""
    heads, cells = weights.shape[-1], grid[0] * grid[1]
    wavelets = Wavelets(grid, heads).double()
    low, high = wavelets(torch.eye(cells, dtype=torch.double).unsqueeze(-1).expand(-1, -1, heads))
    return wavelets.inverse(low * weights, 0 * high).permute(2, 1, 0)


@pytest.mark.parametrize("grid", [(1, 1), (1, 5), (3, 4), (5, 5), (4, 6)])
def test_weights_are_the_best_for_the_mean_map(grid: tuple[int, int]) -> None:
    cells = grid[0] * grid[1]
    maps = torch.rand(HEADS, cells, cells, dtype=torch.double)
    weights = wavelet.weights_for(maps, grid).requires_grad_()
    loss = ((low_map(weights, grid) - maps) ** 2).sum()
    assert torch.autograd.grad(loss, weights)[0].abs().max() < 1e-10


@pytest.mark.parametrize("grid", [(1, 5), (3, 4), (4, 6)])
@pytest.mark.parametrize("prefix", [0, 2])
def test_starts_as_attention_with_a_low_pass_map(grid: tuple[int, int], prefix: int) -> None:
    """Exact for the tokens of the grid where the mean map is one, but for the high bands' faint start."""
    cells = grid[0] * grid[1]
    side = [s + s % 2 for s in grid]
    maps = torch.zeros(HEADS, cells + prefix, cells + prefix, dtype=torch.double)
    maps[:, :, :prefix] = 0.25 / max(prefix, 1)
    maps[:, prefix:, prefix:] = low_map(torch.rand(*side, HEADS, dtype=torch.double), grid)
    view = attention_view(DIM, HEADS, cells + prefix)
    # These rows do not sum to 1, which is what takes the value bias through a map unchanged.
    view = replace(view, mean_attention=maps, v_bias=torch.zeros_like(view.v_bias))
    mixer = made(grid, prefix)
    with torch.no_grad():
        before = mixer.mlp.weight2.clone()
        wavelet.inherit_scattering(mixer, view)
        torch.testing.assert_close(mixer.mlp.weight2, 0.1 * before)
        mixer.mlp.weight2.zero_()
        mixer.mlp.bias2.zero_()
    x = torch.randn(2, cells + prefix, DIM, dtype=torch.double)
    torch.testing.assert_close(mixer(x)[:, prefix:], with_maps(view, x, maps)[:, prefix:])


def test_endless_sides_are_refused() -> None:
    with pytest.raises(MixerzooError, match="takes grids of up to 1024 cells a side, this one has 1 x 1100"):
        made((1, 1100))


def test_narrow_mixers_weigh_all_channels_of_a_head_alike() -> None:
    view = attention_view(DIM, HEADS, 12)
    where = site(SCATTERING, dim=DIM, heads=HEADS, tokens=12, grid=(3, 4))
    narrow: Any = SCATTERING.make(where, 0.5).double()
    with torch.no_grad():
        wavelet.inherit_scattering(narrow, view)
    weights = wavelet.weights_for(view.mean_attention, (3, 4))
    torch.testing.assert_close(
        narrow.low.unflatten(-1, (HEADS, -1)), weights.unsqueeze(-1).expand(4, 4, HEADS, 2)
    )
