"""Linear attention with convolutions: against timm, the limits of the formulae, and the start from a teacher."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixerzoo import AttentionView, MixerzooError
from mixerzoo.compat import guard_torchvision
from mixerzoo_mixers import linear_grid

from . import SPECS, attention_view, site
from .test_values import agree

NAMES = ["focused_linear", "lite_mla", "l2_linear"]
DIM, HEADS, GRID, PREFIX = 12, 3, (6, 7), 2
TOKENS = PREFIX + GRID[0] * GRID[1]


def make(name: str, view: AttentionView | None = None, width: float = 1.0, **changes: object) -> Any:
    spec = SPECS[name]
    fields = {"dim": DIM, "heads": HEADS, "tokens": TOKENS, "prefix": PREFIX, "grid": GRID, **changes}
    mixer = spec.make(site(spec, **fields), width).double()
    if view is not None:
        assert spec.inherit is not None
        with torch.no_grad():
            spec.inherit(mixer, view)
    return mixer


@torch.no_grad()
def set_queries_and_keys(mixer: nn.Module, query: float, key: float) -> None:
    """Make them the same for all tokens."""
    assert isinstance(mixer, linear_grid.QkvOnGrid)
    mixer.qkv.weight[: 2 * mixer.channels] = 0
    mixer.qkv.bias[: mixer.channels] = query
    mixer.qkv.bias[mixer.channels : 2 * mixer.channels] = key


def neighbours(kernels: Tensor) -> Tensor:
    """Maps (H, N, N) that hold kernels (H, S, S) around each cell of the grid, and zeros for the prefix."""
    maps = torch.zeros(len(kernels), TOKENS, TOKENS, dtype=kernels.dtype)
    half = kernels.shape[-1] // 2
    cells = [(i, j) for i in range(GRID[0]) for j in range(GRID[1])]
    for n, (i, j) in enumerate(cells, PREFIX):
        for m, (u, v) in enumerate(cells, PREFIX):
            if abs(u - i) <= half and abs(v - j) <= half:
                maps[:, n, m] = kernels[:, half + u - i, half + v - j]
    return maps


def with_maps(view: AttentionView, x: Tensor, maps: Tensor) -> Tensor:
    """The teacher's attention with the given maps, (H, N, N), and no value bias."""
    values = F.linear(x, view.v_weight).unflatten(-1, (HEADS, -1)).transpose(1, 2)
    return F.linear((maps @ values).transpose(1, 2).flatten(2), view.out_weight, view.out_bias)


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(2, TOKENS, DIM, dtype=torch.double)


def test_lite_mla_agrees_with_timm() -> None:
    """At its own head width and number of heads, with its batch normalisation folded into the readout."""
    guard_torchvision()
    from timm.models.efficientvit_mit import LiteMLA

    rank, channels = DIM // HEADS, DIM
    theirs = LiteMLA(DIM, DIM, heads=HEADS, dim=rank).eval()
    with torch.no_grad():
        for tensor in theirs.state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5) if tensor.dim() == 1 else tensor.normal_(std=0.3)
    ours = make("lite_mla", tokens=42, prefix=0).float()
    state = theirs.state_dict()

    def sorted_rows(weight: Tensor) -> Tensor:
        """From (q, k, v) of each head in turn to all q, all k, all v."""
        return weight.unflatten(0, (HEADS, 3, rank)).transpose(0, 1).flatten(0, 2)

    scale = state["proj.norm.weight"] / (state["proj.norm.running_var"] + theirs.proj.norm.eps).sqrt()
    with torch.no_grad():
        ours.qkv.weight.copy_(sorted_rows(state["qkv.conv.weight"]).flatten(1))
        ours.qkv.bias.zero_()
        ours.near.weight.copy_(sorted_rows(state["aggreg.0.0.weight"]))
        ours.blend.copy_(sorted_rows(state["aggreg.0.1.weight"]).view(3 * HEADS, rank, rank))
        ours.readout.weight.zero_()
        ours.readout.weight[:, : 2 * channels] = scale[:, None] * state["proj.conv.weight"].flatten(1)
        ours.readout.bias.copy_(state["proj.norm.bias"] - scale * state["proj.norm.running_mean"])
        x = torch.randn(2, 42, DIM)
        expected = theirs(x.mT.unflatten(2, GRID)).flatten(2).mT
        # The tolerance is for the 1e-5 in its denominator, which is 1e-6 here.
        torch.testing.assert_close(ours(x), expected, rtol=1e-3, atol=1e-3)


def test_focused_features_keep_the_length_and_sharpen() -> None:
    u = torch.randn(5, 8, dtype=torch.double)
    f = linear_grid.FocusedLinear.features(u)
    torch.testing.assert_close(f.norm(dim=-1), u.relu().norm(dim=-1), rtol=1e-5, atol=1e-5)
    cube = F.normalize(u.relu() ** 3, dim=-1)
    torch.testing.assert_close(F.normalize(f, dim=-1), cube, rtol=1e-5, atol=1e-5)
    assert (f.amax(dim=-1) >= u.amax(dim=-1)).all()


def test_focused_linear_needs_no_scale_of_its_own(x: Tensor) -> None:
    """The paper's softplus(s), by which q and k are divided, is the same as other projections."""
    mixer, scaled = make("focused_linear"), make("focused_linear")
    scaled.load_state_dict(mixer.state_dict())
    scale = F.softplus(torch.randn(DIM, dtype=torch.double))
    with torch.no_grad():
        for tensor in (scaled.qkv.weight, scaled.qkv.bias):
            rows = tensor[: 2 * DIM].view(2, DIM, -1)
            rows /= scale[:, None]
    q, k, v = mixer.qkv(x).chunk(3, dim=-1)
    q, k = (linear_grid.FocusedLinear.features(t.relu() / scale) for t in (q, k))
    local = F.pad(mixer.local(v[:, PREFIX:].mT.unflatten(2, GRID)).flatten(2).mT, (0, 0, PREFIX, 0))
    q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))
    maps = q @ k.mT
    mixed = (maps @ v / (maps.sum(-1, keepdim=True) + 1e-6)).transpose(1, 2).flatten(2) + local
    expected = mixer.readout(torch.cat((mixed, x), dim=-1))
    torch.testing.assert_close(scaled(x), expected, rtol=1e-4, atol=1e-4)


def test_focused_linear_starts_with_what_a_flat_map_lacks(x: Tensor) -> None:
    """Where attention is flat but for the neighbours, and q and k tell nothing apart, the start is the teacher."""
    kernels = torch.randn(HEADS, 5, 5, dtype=torch.double) / 25
    view = attention_view(DIM, HEADS, TOKENS)
    view = replace(view, v_bias=0 * view.v_bias, mean_attention=neighbours(kernels) + 1 / TOKENS)
    mixer = make("focused_linear", view)
    set_queries_and_keys(mixer, 1, 1)
    expected = with_maps(view, x, view.mean_attention)
    torch.testing.assert_close(mixer(x), expected, rtol=1e-5, atol=1e-5)


def test_l2_linear_starts_with_nearly_the_same(x: Tensor) -> None:
    kernels = torch.randn(HEADS, 7, 7, dtype=torch.double) / 49
    view = attention_view(DIM, HEADS, TOKENS)
    view = replace(view, v_bias=0 * view.v_bias, mean_attention=neighbours(kernels) + 1 / TOKENS)
    mixer = make("l2_linear", view)
    set_queries_and_keys(mixer, -1, 1)  # no attention: only the convolutions are left
    expected = with_maps(view, x, neighbours(kernels))
    assert (mixer(x) - expected).norm() < 0.15 * expected.norm()


def test_local_excess_of_offsets_that_a_small_grid_lacks_is_zero() -> None:
    maps = torch.rand(2, 5, 5).softmax(dim=-1)
    kernel = linear_grid.local_excess(maps, (1, 4), 5)
    assert (kernel[:, [0, 1, 3, 4]] == 0).all()
    grid = maps[:, 1:, 1:]
    torch.testing.assert_close(kernel[:, 2, 2], grid.diagonal(dim1=1, dim2=2).mean(-1) - 0.2)
    torch.testing.assert_close(kernel[:, 2, 4], (grid[:, 0, 2] + grid[:, 1, 3]) / 2 - 0.2)


def test_lite_mla_starts_as_relu_attention_and_half_of_it_blurred(x: Tensor) -> None:
    view = attention_view(DIM, HEADS, TOKENS)
    mixer = make("lite_mla", view)
    torch.testing.assert_close(mixer.near.weight.sum(dim=(2, 3)), torch.ones(3 * DIM, 1, dtype=torch.double))
    with torch.no_grad():
        mixer.near.weight.zero_()
        mixer.near.weight[:, :, 2, 2] = 1  # no blur
    torch.testing.assert_close(mixer(x), make("relu_attention", view)(x))


def test_l2_linear_is_normalised_above_its_threshold_only(x: Tensor) -> None:
    mixer = make("l2_linear")
    with torch.no_grad():
        mixer.temperature.fill_(1)
        for parameter in mixer.local.parameters():
            parameter.zero_()
        mixer.readout.weight.copy_(torch.eye(DIM, 2 * DIM))
        mixer.readout.bias.zero_()

    def attention(query: float, key: float) -> Tensor:
        set_queries_and_keys(mixer, query, key)
        found: Tensor = mixer(x)
        return found

    # The sum is tokens * head width * query * key.
    mean = attention(10, 10)
    torch.testing.assert_close(attention(20, 20), mean)
    low = 50 / (TOKENS * DIM // HEADS)
    torch.testing.assert_close(attention(1, low), mean / 2)
    torch.testing.assert_close(attention(1, low / 2), mean / 4)


@pytest.mark.parametrize("name", ["focused_linear", "l2_linear"])
def test_convolutions_are_for_the_grid_and_attention_for_all(name: str, x: Tensor) -> None:
    mixer = make(name)
    moved = torch.cat((x[:, :PREFIX], x[:, PREFIX:].flip(1)), dim=1)
    y, flipped = mixer(x), mixer(moved)
    torch.testing.assert_close(flipped[:, :PREFIX], y[:, :PREFIX])
    assert not torch.allclose(flipped[:, PREFIX:], y[:, PREFIX:].flip(1))
    changed = x.clone()
    changed[:, 0] += 1
    assert ((mixer(changed) - y).abs().amax(dim=(0, 2)) > 0).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("prefix", "grid"), [(0, (3, 3)), (5, (2, 4)), (1, (1, 6)), (2, (1, 1))])
def test_grids_and_prefixes(name: str, prefix: int, grid: tuple[int, int]) -> None:
    spec = SPECS[name]
    tokens = prefix + grid[0] * grid[1]
    agree(spec, site(spec, dim=6, heads=3, tokens=tokens, prefix=prefix, grid=grid), 0.5, False, 0)


@pytest.mark.parametrize("name", NAMES)
def test_samples_are_independent_in_training_too(name: str, x: Tensor) -> None:
    mixer = make(name).train()
    torch.testing.assert_close(mixer(x)[:1], mixer(x[:1]))
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in mixer.modules())


@pytest.mark.parametrize("name", NAMES)
def test_a_grid_is_needed(name: str) -> None:
    with pytest.raises(MixerzooError, match=f"mixer '{name}' needs a grid"):
        make(name, grid=None)
