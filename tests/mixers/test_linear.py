"""Linear attention of several features: against softmax attention, the feature maps' limits, other people's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mixerzoo import MixerzooError
from mixerzoo_mixers import linear

from . import SPECS, attention_view, site

NAMES = ["linear_attention", "relu_attention", "softmax_linear"]
DIM, HEADS, TOKENS = 12, 3, 9


def make(name: str, width: float = 1.0, **changes: object) -> linear.FeatureAttention:
    spec = SPECS[name]
    mixer = spec.make(site(spec, **{"dim": DIM, "heads": HEADS, "tokens": TOKENS, **changes}), width).double()
    assert isinstance(mixer, linear.FeatureAttention)
    return mixer


def heads(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight, bias).unflatten(-1, (HEADS, -1)).transpose(1, 2)  # (B, H, N, K)


def hedgehog(u: Tensor) -> Tensor:
    return torch.cat((u, -u), dim=-1).softmax(dim=-1)


FEATURES = {
    "linear_attention": lambda u: F.elu(u) + 1,
    "relu_attention": F.relu,
    "softmax_linear": lambda u: hedgehog(1.5 * u),
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_starts_with_the_teachers_projections(name: str, causal: bool) -> None:
    view = attention_view(DIM, HEADS, TOKENS)
    mixer = make(name, causal=causal)
    inherit = SPECS[name].inherit
    assert inherit is not None
    with torch.no_grad():
        inherit(mixer, view)
    x = torch.randn(2, TOKENS, DIM, dtype=torch.double)
    q, k, v = (
        heads(x, w, b)
        for w, b in ((view.q_weight, view.q_bias), (view.k_weight, view.k_bias), (view.v_weight, view.v_bias))
    )
    maps = FEATURES[name](q) @ FEATURES[name](k).mT
    maps = maps.tril() if causal else maps
    norm = maps.sum(dim=-1, keepdim=True)
    # The teacher's value bias comes in full, even where the maps' rows fall short of 1 by the 1e-6 in the denominator.
    v = v - view.v_bias.view(HEADS, 1, -1)
    mixed = (maps @ v / (norm + 1e-6)).transpose(1, 2).flatten(2)
    expected = F.linear(mixed + view.v_bias, view.out_weight, view.out_bias)
    torch.testing.assert_close(mixer(x), expected)


@pytest.mark.parametrize("name", NAMES)
def test_equal_keys_give_the_mean_value(name: str) -> None:
    mixer = make(name)
    with torch.no_grad():
        mixer.qkv.weight[DIM : 2 * DIM] = 0
        mixer.qkv.bias[: 2 * DIM] = 1
        mixer.qkv.weight[:DIM] *= 0.1  # so that no query is without a positive entry
    x = torch.randn(2, TOKENS, DIM, dtype=torch.double)
    mean = mixer.qkv(x)[..., 2 * DIM :].mean(dim=1, keepdim=True).expand(-1, TOKENS, -1)
    expected = mixer.readout(torch.cat((mean, x), dim=-1))
    torch.testing.assert_close(mixer(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_causal_mixer_ends_as_the_other_one(name: str) -> None:
    """The last token sees all: across several chunks, it gets what it gets without the causal order."""
    causal, both = make(name, causal=True, tokens=200), make(name, tokens=200)
    both.load_state_dict(causal.state_dict())
    x = torch.randn(2, 200, DIM, dtype=torch.double)
    torch.testing.assert_close(causal(x)[:, -1], both(x)[:, -1])


@pytest.mark.parametrize("name", NAMES)
def test_long_sequences_in_half_precision_do_not_overflow(name: str) -> None:
    """A sum of 16,384 products leaves the range of float16, which ends at 65,504."""
    mixer = make(name).half()
    x = torch.randn(1, 16384, DIM).half()
    with torch.no_grad():
        torch.testing.assert_close(mixer(x).float(), mixer.float()(x.float()), rtol=0.01, atol=0.01)


def test_elu_features() -> None:
    u = torch.tensor([-40.0, -1, 0, 2], requires_grad=True)
    got = make("linear_attention").features(u)
    torch.testing.assert_close(got[1:], (F.elu(u) + 1)[1:])
    assert got[0] > 0  # where F.elu(u) + 1 has nothing left
    (slope,) = torch.autograd.grad(got.sum(), u)
    torch.testing.assert_close(slope[1:], torch.tensor([torch.e**-1, 1, 1]))


def test_a_query_without_a_positive_entry_attends_to_nothing() -> None:
    mixer = make("relu_attention")
    with torch.no_grad():
        mixer.qkv.weight[:DIM] = 0
        mixer.qkv.bias[:DIM] = -1
    x = torch.randn(2, TOKENS, DIM, dtype=torch.double)
    expected = mixer.readout(torch.cat((torch.zeros_like(x), x), dim=-1))
    torch.testing.assert_close(mixer(x), expected)


def test_softmax_features_with_a_map_of_their_own() -> None:
    """Hedgehog's learnt map after the projection is one projection."""
    mixer, plain = make("softmax_linear"), make("softmax_linear")
    maps = torch.randn(2 * HEADS, DIM // HEADS, DIM // HEADS, dtype=torch.double)
    bias = torch.randn(2 * HEADS, DIM // HEADS, dtype=torch.double)
    x = torch.randn(2, TOKENS, DIM, dtype=torch.double)
    q, k = (
        hedgehog(torch.einsum("hij,bnhj->bhni", m, u) + b[:, None])
        for m, b, u in zip(
            maps.chunk(2),
            bias.chunk(2),
            plain.qkv(x)[..., : 2 * DIM].unflatten(-1, (2, HEADS, -1)).unbind(2),
            strict=True,
        )
    )
    v = plain.qkv(x)[..., 2 * DIM :].unflatten(-1, (HEADS, -1)).transpose(1, 2)
    weights = q @ k.mT
    mixed = (weights @ v / (weights.sum(dim=-1, keepdim=True) + 1e-6)).transpose(1, 2).flatten(2)
    expected = plain.readout(torch.cat((mixed, x), dim=-1))
    with torch.no_grad():
        mixer.load_state_dict(plain.state_dict())
        for tensor in (mixer.qkv.weight, mixer.qkv.bias):
            rows = tensor[: 2 * DIM].view(2 * HEADS, DIM // HEADS, -1)
            rows.copy_(maps @ rows)
        mixer.qkv.bias[: 2 * DIM] += bias.flatten()
    torch.testing.assert_close(mixer(x), expected)


def test_softmax_features_are_nearer_to_softmax_attention() -> None:
    """On tokens whose attention is neither flat nor pointed, and with nothing learnt yet."""
    width = 32
    q, k = torch.randn(2, 4, 100, width)
    exact = (q @ k.mT / width**0.5).softmax(dim=-1)
    gaps = {}
    for name, features in FEATURES.items():
        weights = features(q) @ features(k).mT
        gaps[name] = float((weights / weights.sum(dim=-1, keepdim=True) - exact).abs().sum())
    assert gaps["softmax_linear"] < gaps["relu_attention"] < gaps["linear_attention"]


@pytest.mark.parametrize("name", NAMES[1:])
@pytest.mark.parametrize("masked", [False, True])
def test_padding_and_chunks_in_long_sequences(name: str, masked: bool) -> None:
    from .test_values import agree

    for causal in (False, True):
        agree(SPECS[name], site(SPECS[name], dim=2, heads=1, tokens=131, causal=causal), 0.5, masked, 0)


@pytest.mark.parametrize("name", NAMES)
def test_heads_must_divide_the_width(name: str) -> None:
    with pytest.raises(MixerzooError, match="model width 12 cannot be split over 5 heads"):
        make(name, heads=5)
