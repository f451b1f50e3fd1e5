"""What a mixer is right after it has inherited from the teacher."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixerzoo import AttentionView, MixerSpec
from mixerzoo_mixers._parts import factor

from . import SPECS, attention_view, mlp_view, site

DIM, HEADS, TOKENS = 12, 3, 9


def inherited(name: str, view: object, width: float = 1.0, **changes: object) -> nn.Module:
    spec = SPECS[name]
    fields = {"dim": DIM, "heads": HEADS, "tokens": TOKENS, **changes}
    mixer = spec.make(site(spec, **fields), width).double()
    assert spec.inherit is not None
    with torch.no_grad():
        spec.inherit(mixer, view)
    return mixer


def heads(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight, bias).unflatten(-1, (HEADS, -1)).transpose(1, 2)  # (B, H, N, K)


def with_maps(view: AttentionView, x: Tensor, maps: Tensor) -> Tensor:
    """The teacher's attention with the given maps, (H, N, N) or (B, H, N, N)."""
    mixed = maps @ heads(x, view.v_weight, view.v_bias)
    return F.linear(mixed.transpose(1, 2).flatten(2), view.out_weight, view.out_bias)


def indifferent(view: AttentionView) -> AttentionView:
    """The same without queries, which gates are made of."""
    return replace(view, q_weight=0 * view.q_weight, q_bias=0 * view.q_bias)


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(2, TOKENS, DIM, dtype=torch.double)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", ["static", "glu_mlp"])
def test_fixed_maps_start_as_the_mean_attention(name: str, causal: bool, x: Tensor) -> None:
    view = indifferent(attention_view(DIM, HEADS, TOKENS, causal=causal))
    mixer = inherited(name, view, causal=causal)
    torch.testing.assert_close(mixer(x), with_maps(view, x, view.mean_attention))


@pytest.mark.parametrize("causal", [False, True])
def test_linear_attention_starts_with_the_teachers_projections(causal: bool, x: Tensor) -> None:
    view = attention_view(DIM, HEADS, TOKENS)
    q, k = (
        F.elu(heads(x, w, b)) + 1 for w, b in ((view.q_weight, view.q_bias), (view.k_weight, view.k_bias))
    )
    maps = q @ k.mT
    maps = maps.tril() if causal else maps
    expected = with_maps(view, x, maps / maps.sum(dim=-1, keepdim=True))
    # The tolerance is for the 1e-6 in the denominator.
    torch.testing.assert_close(
        inherited("linear_attention", view, causal=causal)(x), expected, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("name", ["static", "glu_mlp", "linear_attention"])
def test_narrow_mixers_keep_what_a_low_rank_teacher_does(name: str, x: Tensor) -> None:
    """A teacher whose heads only use half their width loses nothing at half the width."""
    view = attention_view(DIM, HEADS, TOKENS)
    low = view.v_weight.view(HEADS, DIM // HEADS, DIM).clone()
    low[:, 2:] = low[:, :2]
    view = replace(view, v_weight=low.view(DIM, DIM))
    if name == "linear_attention":
        full, half = (inherited(name, view, width) for width in (1.0, 0.5))
        values = [m.qkv.weight[-m.qkv.out_features // 3 :] for m in (full, half)]
        products = [
            torch.einsum(
                "dhr,hre->hde",
                m.readout.weight[:, :-DIM].unflatten(1, (HEADS, -1)),
                v.unflatten(0, (HEADS, -1)),
            )
            for m, v in zip((full, half), values, strict=True)
        ]
        torch.testing.assert_close(products[0], products[1])
    else:
        expected = with_maps(view, x, view.mean_attention)
        torch.testing.assert_close(inherited(name, indifferent(view), 0.5)(x), expected)


@pytest.mark.parametrize("name", ["static", "glu_mlp", "linear_attention"])
def test_a_wider_mixer_than_the_teacher_starts_the_same(name: str, x: Tensor) -> None:
    view = attention_view(DIM, HEADS, TOKENS)
    if name == "linear_attention":
        assert inherited(name, view, 2.0)(x).isfinite().all()
    else:
        torch.testing.assert_close(inherited(name, view, 2.0)(x), inherited(name, view)(x))


def test_factor_is_the_best_approximation() -> None:
    torch.manual_seed(0)
    left, right = torch.randn(2, 7, 4, dtype=torch.double), torch.randn(2, 4, 6, dtype=torch.double)
    a, b = factor(left, right, 2)
    assert a.shape == (2, 7, 2)
    assert b.shape == (2, 2, 6)
    u, s, vh = torch.linalg.svd(left @ right, full_matrices=False)
    torch.testing.assert_close(a @ b, u[..., :2] @ torch.diag_embed(s[..., :2]) @ vh[..., :2, :])


def test_linear_starts_as_attention_to_itself(x: Tensor) -> None:
    view = attention_view(DIM, HEADS, TOKENS)
    expected = with_maps(view, x, torch.eye(TOKENS, dtype=torch.double))
    torch.testing.assert_close(inherited("linear", view)(x), expected)


@pytest.mark.parametrize(("prefix", "causal"), [(0, False), (1, False), (0, True)])
def test_pool_starts_as_attention_to_itself_the_first_and_the_mean(
    prefix: int, causal: bool, x: Tensor
) -> None:
    """The shares are read off the mean map: its diagonal, its first column, and the rest for the mean."""
    own, first, rest = torch.rand(3, HEADS, 1, 1, dtype=torch.double)
    first = first if prefix or causal else torch.zeros_like(first)
    eye, column = torch.eye(TOKENS, dtype=torch.double), torch.zeros(TOKENS, TOKENS, dtype=torch.double)
    column[:, 0] = 1
    mean = torch.ones(TOKENS, TOKENS, dtype=torch.double)
    mean = mean.tril() if causal else mean
    mean = mean / mean.sum(dim=1, keepdim=True)
    total = own + first + rest
    maps = (own * eye + first * column + rest * mean) / total
    view = replace(attention_view(DIM, HEADS, TOKENS), mean_attention=maps)
    mixer = inherited("pool", view, prefix=prefix, causal=causal)
    shares_own = maps.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None]
    shares_first = maps[:, 1:, 0].mean(dim=1)[:, None, None] * (1 if prefix or causal else 0)
    spread = shares_own * eye + shares_first * column + (1 - shares_own - shares_first) * mean
    torch.testing.assert_close(mixer(x), with_maps(view, x, spread))


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "silu", "quick_gelu"])
def test_whole_mlp_slice_is_the_teachers_mlp(activation: str, x: Tensor) -> None:
    view = mlp_view(DIM, 40)
    act = {
        "gelu": nn.GELU(),
        "gelu_tanh": nn.GELU(approximate="tanh"),
        "relu": nn.ReLU(),
        "silu": nn.SiLU(),
        "quick_gelu": lambda v: v * torch.sigmoid(1.702 * v),
    }[activation]
    expected = F.linear(act(F.linear(x, view.in_weight, view.in_bias)), view.out_weight, view.out_bias)
    torch.testing.assert_close(inherited("mlp_slice", view, 1.0, activation=activation)(x), expected)


def test_mlp_slice_keeps_the_most_important(x: Tensor) -> None:
    view = mlp_view(DIM, 40)
    dead = torch.randperm(40)[:20]
    importance, out = view.importance.clone() + 1, view.out_weight.clone()
    importance[dead], out[:, dead] = 0, 0
    view = replace(view, importance=importance, out_weight=out)
    narrow = inherited("mlp_slice", view, 0.6)  # 24 units
    assert narrow.fc1.out_features == 24
    torch.testing.assert_close(narrow(x), inherited("mlp_slice", view, 1.0)(x))


def test_unknown_activation_is_named() -> None:
    with pytest.raises(ValueError, match="unknown activation 'mish'; known: gelu, gelu_tanh, relu"):
        SPECS["mlp_slice"].build(dim=4, hidden=8, activation="mish", width=1.0)


def test_lstm_takes_the_output_projection() -> None:
    view = attention_view(DIM, HEADS, TOKENS)
    mixer = inherited("multihead_lstm", view, 0.5)
    torch.testing.assert_close(mixer.post_proj.weight.data, view.out_weight)
    torch.testing.assert_close(mixer.post_proj.bias.data, view.out_bias)


@pytest.mark.parametrize("causal", [False, True])
def test_lstm_units_remember_from_one_token_to_all(causal: bool) -> None:
    tokens = 200
    view = attention_view(32, 2, tokens, causal=causal)
    mixer = inherited("multihead_lstm", view, dim=32, heads=2, tokens=tokens, causal=causal)
    for lstm in mixer.lstm:
        for suffix in ("",) if causal else ("", "_reverse"):
            told, own = (getattr(lstm, f"bias_{kind}_l0{suffix}").detach() for kind in ("ih", "hh"))
            enter, forget = (told + own).split(lstm.hidden_size)[:2]
            memory = 1 / (1 - torch.sigmoid(forget))  # tokens after which a third is left
            assert memory.min() < 3
            assert tokens / 4 < memory.max() <= tokens + 1
            torch.testing.assert_close(enter, -forget)


@pytest.mark.parametrize("spec", [s for s in SPECS.values() if s.inherit], ids=lambda spec: spec.name)
def test_inheriting_works_at_every_width_and_trains(spec: MixerSpec) -> None:
    torch.manual_seed(0)
    for causal in {False, spec.caps.causal}:
        for width in spec.widths:
            where = site(spec, dim=DIM, heads=HEADS, tokens=TOKENS, prefix=1, causal=causal, hidden=40)
            mixer = spec.make(where, width).double()
            view = (
                mlp_view(DIM, 40)
                if spec.kinds == {"mlp"}
                else attention_view(DIM, HEADS, TOKENS, causal=causal)
            )
            assert spec.inherit is not None
            with torch.no_grad():
                spec.inherit(mixer, view)
            y = mixer(torch.randn(2, TOKENS, DIM, dtype=torch.double))
            (y**2).sum().backward()
            for name, parameter in mixer.named_parameters():
                assert parameter.isfinite().all()
                assert parameter.grad is not None, name
                assert parameter.grad.abs().sum() > 0, name
