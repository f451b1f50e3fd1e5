"""Attention statistics: maps whose figures are known by heart, and bounds for any map."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mixerzoo.spec import Site
from mixerzoo.statistics import ATTENTION_STATISTICS, RANKED_IMAGES, ROW_IMAGES, AttentionStatistics

PREFIX, GRID = 1, (3, 4)
N = PREFIX + GRID[0] * GRID[1]
HEADS = 2


def site(grid=GRID, prefix=PREFIX, tokens=N, heads=HEADS):
    return Site(
        name="s",
        kind="attention",
        index=0,
        stage=0,
        dim=8,
        heads=heads,
        tokens=tokens,
        prefix=prefix,
        grid=grid,
    )


def result(maps, **options):
    statistics = AttentionStatistics(site(**options))
    for part in maps.split(3):
        statistics.update(part)
    return statistics.result()


def everywhere(matrix, images=5):
    return matrix.expand(images, HEADS, N, N).contiguous()


def grid_distances():
    places = [(y, x) for y in range(GRID[0]) for x in range(GRID[1])]
    return torch.tensor([[math.dist(a, b) for b in places] for a in places])


def test_uniform_maps():
    found = result(everywhere(torch.full((N, N), 1 / N)))
    longest = math.hypot(GRID[0] - 1, GRID[1] - 1)
    assert found == pytest.approx(
        {
            "entropy": 1,
            "tokens_90": math.ceil(0.9 * N) / N,
            "gini": 0,
            "sink": 1 / N,
            "locality": 1 - float(grid_distances().mean()) / longest,
            "input_dependence": 0,
            "effective_rank": 1 / N,
        },
        abs=1e-4,
    )


def test_identity_maps():
    found = result(everywhere(torch.eye(N)))
    assert found == pytest.approx(
        {
            "entropy": 0,
            "tokens_90": 1 / N,
            "gini": 1 - 1 / N,
            "sink": 1 / N,
            "locality": 1,
            "input_dependence": 0,
            "effective_rank": 1,
        },
        abs=1e-5,
    )


def test_maps_with_one_sink():
    one = torch.zeros(N, N)
    one[:, PREFIX] = 1  # every token looks at the first of the grid
    found = result(everywhere(one))
    longest = math.hypot(GRID[0] - 1, GRID[1] - 1)
    assert found == pytest.approx(
        {
            "entropy": 0,
            "tokens_90": 1 / N,
            "gini": 1 - 1 / N,
            "sink": 1,
            "locality": 1 - float(grid_distances()[:, 0].mean()) / longest,
            "input_dependence": 0,
            "effective_rank": 1 / N,
        },
        abs=1e-5,
    )


def test_the_sink_is_of_each_head():
    maps = torch.zeros(4, HEADS, N, N)
    maps[:, 0, :, 0] = 1
    maps[:, 1] = torch.eye(N)
    assert result(maps)["sink"] == pytest.approx((1 + 1 / N) / 2)


def test_maps_that_differ_completely_depend_on_the_input():
    maps = torch.zeros(4, HEADS, N, N)
    for image in range(4):
        maps[image, :, :, image] = 1
    assert result(maps)["input_dependence"] == pytest.approx(3 / 4)


def test_tokens_are_counted_until_ninety_percent_are_held():
    row = torch.zeros(N)
    row[:4] = torch.tensor([0.5, 0.3, 0.15, 0.05])
    assert result(everywhere(row.expand(N, N)))["tokens_90"] == pytest.approx(3 / N)


def test_gini_by_its_definition():
    row = torch.rand(N, dtype=torch.float64)
    row /= row.sum()
    pairs = float((row[:, None] - row[None]).abs().sum())
    assert result(everywhere(row.float().expand(N, N)))["gini"] == pytest.approx(pairs / (2 * N), abs=1e-5)


def test_without_a_grid_there_is_no_locality():
    assert math.isnan(result(everywhere(torch.eye(N)), grid=None)["locality"])


def test_attention_to_the_prefix_does_not_count_for_locality():
    half = torch.eye(N) / 2
    half[:, 0] += 0.5
    assert result(everywhere(half))["locality"] == pytest.approx(1, abs=1e-6)


def test_the_mean_map_is_the_mean():
    maps = torch.rand(7, HEADS, N, N).softmax(-1)
    statistics = AttentionStatistics(site())
    for part in maps.split(2):
        statistics.update(part)
    assert statistics.images == 7
    torch.testing.assert_close(statistics.mean, maps.mean(0))


def test_slow_figures_come_from_the_first_images_only():
    first = torch.eye(N).expand(ROW_IMAGES, HEADS, N, N)
    later = torch.full((5, HEADS, N, N), 1 / N)
    found = result(torch.cat([first, later]))
    assert found["entropy"] == pytest.approx(0, abs=1e-6)
    assert found["effective_rank"] == pytest.approx(1, abs=1e-5)
    assert found["input_dependence"] > 0.05  # this one is over all of them
    assert RANKED_IMAGES <= ROW_IMAGES


def test_the_list_of_names_is_what_comes_out():
    found = result(everywhere(torch.eye(N)))
    assert [*found, "contribution"] == list(ATTENTION_STATISTICS)


@given(
    seed=st.integers(0, 2**31),
    heads=st.integers(1, 3),
    rows=st.integers(1, 3),
    columns=st.integers(1, 4),
    prefix=st.integers(0, 2),
    images=st.integers(1, 4),
    sharpness=st.floats(0, 60),
)
def test_every_figure_is_a_share(seed, heads, rows, columns, prefix, images, sharpness):
    tokens = rows * columns + prefix
    generator = torch.Generator().manual_seed(seed)
    maps = (sharpness * torch.randn(images, heads, tokens, tokens, generator=generator)).softmax(-1)
    found = result(maps, grid=(rows, columns), prefix=prefix, tokens=tokens, heads=heads)
    for name, value in found.items():
        assert -1e-4 <= value <= 1 + 1e-4, f"{name} is {value}"
    assert found["sink"] >= 1 / tokens - 1e-4
    assert found["tokens_90"] >= 1 / tokens - 1e-6
    assert found["effective_rank"] >= 1 / tokens - 1e-4


@given(seed=st.integers(0, 2**31), images=st.integers(1, 5))
def test_one_map_for_all_images_does_not_depend_on_the_input(seed, images):
    generator = torch.Generator().manual_seed(seed)
    one = torch.randn(1, HEADS, N, N, generator=generator).softmax(-1)
    found = result(one.expand(images, HEADS, N, N).contiguous())
    assert found["input_dependence"] == pytest.approx(0, abs=1e-5)
