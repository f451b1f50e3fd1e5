"""Mixers with a matrix for a state: against matrices, loops and other people's; their limits, their start."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mixerzoo.compat import guard_torchvision
from mixerzoo_mixers import mamba2, matrix_state, naive
from mixerzoo_mixers._chunked import SPAN, WHOLE, carry, chunk_size, kept, mean_rates
from mixerzoo_mixers._parts import depthwise
from mixerzoo_mixers.mamba2 import Mamba2
from mixerzoo_mixers.matrix_state import GatedDelta

from . import SPECS, attention_view, site
from .test_values import agree

NAMES = ["retention", "gated_delta", "mamba2"]
DIM, HEADS, TOKENS = 12, 3, 9
LENGTHS = [1, 2, 63, 65, WHOLE, WHOLE + 1, 300]
BOTH = pytest.mark.parametrize("causal", [False, True])


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.double)


def rand(*shape: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.double)


def made(name: str, width: float = 1.0, **changes: object) -> Any:
    where = site(SPECS[name], **{"dim": DIM, "heads": HEADS, "tokens": TOKENS, **changes})
    return SPECS[name].make(where, width).double()


def inherited(name: str, view: object, width: float = 1.0, **changes: object) -> Any:
    mixer, inherit = made(name, width, **changes), SPECS[name].inherit
    assert inherit is not None
    with torch.no_grad():
        inherit(mixer, view)
    return mixer


def heads(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight, bias).unflatten(-1, (HEADS, -1)).transpose(1, 2)  # (B, H, N, K)


def gap(tokens: int) -> Tensor:
    """The matrix of n - m, (N, N)."""
    place = torch.arange(tokens, dtype=torch.double)
    return place.unsqueeze(-1) - place


def uncut(y: Tensor, tokens: int, dim: int) -> Tensor:
    """Put chunks, dimensions `dim` and the next, together again."""
    return y.flatten(dim, dim + 1).narrow(dim, 0, tokens)


def from_file(package: str, path: str) -> ModuleType:
    """A module of an installed package that cannot be imported on a CPU, from its file."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{package} is not installed")
    alone = importlib.util.spec_from_file_location("alone", Path(spec.submodule_search_locations[0]) / path)
    assert alone is not None
    assert alone.loader is not None
    module = importlib.util.module_from_spec(alone)
    alone.loader.exec_module(module)
    return module


# -- chunks --


@pytest.mark.parametrize("count", [1, 2, SPAN, SPAN + 1, 3 * SPAN, SPAN**2 + 5])
@pytest.mark.parametrize("back", [False, True])
def test_states_are_carried_past_every_chunk(count: int, back: bool) -> None:
    ends, decay = randn(2, count, 3), -(rand(2, count) ** 4)
    state, expected = torch.zeros(2, 3, dtype=torch.double), [torch.empty(0)] * count
    for i in reversed(range(count)) if back else range(count):
        expected[i] = state
        state = decay[:, i, None].exp() * state + ends[:, i]
    torch.testing.assert_close(carry(ends, decay, back), torch.stack(expected, dim=1))


def test_chunks_leave_little_to_fill_up() -> None:
    for tokens in range(1, 2000):
        size = chunk_size(tokens)
        assert size <= WHOLE
        assert -tokens % size < -(-tokens // size)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("masked", [False, True])
def test_long_sequences_cross_chunks(name: str, masked: bool) -> None:
    for causal in (False, True):
        where = site(SPECS[name], dim=2, heads=1, tokens=WHOLE + 3, causal=causal)
        agree(SPECS[name], where, SPECS[name].widths[0], masked, 0)


@pytest.mark.parametrize("name", NAMES)
def test_a_causal_mixer_sees_the_past_as_the_other_one_does(name: str) -> None:
    """Nothing comes after the last token: there, one direction is all."""
    causal, both = made(name, causal=True), made(name)
    x = randn(2, 200, DIM)
    with torch.no_grad():
        for tensor, other in zip(causal.parameters(), both.parameters(), strict=True):
            if tensor.shape == other.shape:
                tensor.copy_(other)
    if name == "retention":
        torch.testing.assert_close(causal(x)[:, -1], both(x)[:, -1])
        return
    # Of a head's two directions, the first.
    parts = {
        key: (t.unflatten(0, (2 if key.startswith("gates") else 1, HEADS, 2, -1))[:, :, 0].flatten(0, 2))
        for key, t in both.state_dict().items()
        if key in {"gates.weight", "gates.bias", "dt_bias", "A_log", "D", "norm.weight"}
    }
    if name == "gated_delta":
        parts["gates.weight"] = parts["gates.weight"].reshape(-1, DIM)
    else:
        rows = both.in_proj.weight
        steps = rows[-2 * HEADS :][::2]
        parts["in_proj.weight"] = torch.cat((rows[: -2 * HEADS], steps))
        with torch.no_grad():
            both.conv1d.weight[..., 4:] = 0
        parts["conv1d.weight"] = both.conv1d.weight[..., :4]
    own = both.readout.weight[:, :-DIM].unflatten(1, (HEADS, 2, -1))
    with torch.no_grad():
        own[:, :, 1] = 0
    parts["readout.weight"] = torch.cat((own[:, :, 0].flatten(1), both.readout.weight[:, -DIM:]), dim=1)
    causal.load_state_dict({**causal.state_dict(), **parts})
    torch.testing.assert_close(causal(x), both(x))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16])
def test_long_sequences_in_half_precision(name: str, dtype: torch.dtype) -> None:
    mixer = made(name, 0.5).to(dtype)
    x = torch.randn(1, 5000, DIM).to(dtype)
    with torch.no_grad():
        y = mixer(x).float()
        torch.testing.assert_close(y, mixer.float()(x.float()), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("causal", [False, True])
def test_rates_of_maps_that_decay_are_found(causal: bool) -> None:
    rates = torch.tensor([0.003, 0.05, 1.0], dtype=torch.double)
    maps = (-rates.view(-1, 1, 1) * gap(40).abs()).exp()
    maps = maps.tril() if causal else maps
    found = mean_rates(maps / maps.sum(dim=-1, keepdim=True), causal)
    torch.testing.assert_close(found, rates)


def test_rates_are_bounded() -> None:
    """Where maps see nothing but the token itself, or more of what is far than of what is near."""
    far = gap(40).abs().softmax(dim=-1)
    rates = mean_rates(torch.stack((torch.eye(40), far)), causal=False)
    torch.testing.assert_close(rates, torch.tensor([5.0, 1e-6], dtype=torch.double))


# -- retention --


@BOTH
@pytest.mark.parametrize("tokens", LENGTHS)
def test_retain_is_a_product_with_a_matrix(tokens: int, causal: bool) -> None:
    q, k, v, rate = randn(2, 3, tokens, 4), randn(2, 3, tokens, 4), randn(2, 3, tokens, 5), rand(3) / 10
    weights = q @ k.mT * (-rate.view(-1, 1, 1) * gap(tokens).abs()).exp()
    expected = (weights.tril() if causal else weights) @ v
    torch.testing.assert_close(uncut(matrix_state.retain(q, k, v, rate, causal), tokens, 2), expected)


@pytest.mark.parametrize("tokens", [1, 65, 300])
def test_causal_retention_agrees_with_fla(tokens: int) -> None:
    """The reference of fla has the paper's decays, in single precision."""
    theirs = from_file("fla", "ops/retention/naive.py").naive_retention
    q, k, v = torch.randn(3, 2, HEADS, tokens, 4)
    rate = made("retention", causal=True).float().log_rate.exp()
    got = matrix_state.retain(q / 2, k, v, rate, causal=True)
    torch.testing.assert_close(uncut(got, tokens, 2), theirs(q, k, v), rtol=1e-4, atol=1e-4)


@BOTH
@pytest.mark.parametrize("scores", ["none", "those of the teacher"])
def test_retention_starts_with_the_teachers_projections(scores: str, causal: bool) -> None:
    view = attention_view(DIM, HEADS, TOKENS, causal=causal)
    if scores == "none":
        view.q_weight.zero_()
        view.q_bias.zero_()
    x = randn(2, TOKENS, DIM)
    q, k, v = (
        heads(x, w, b)
        for w, b in (
            (view.q_weight, view.q_bias),
            (view.k_weight, view.k_bias),
            (view.v_weight, 0 * view.v_bias),
        )
    )
    mixer = inherited("retention", view, causal=causal)
    near = (-mean_rates(view.mean_attention, causal).view(-1, 1, 1) * gap(TOKENS).abs()).exp()
    near = near.tril() if causal else near
    long, far = ((t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
    maps = near * (1 + q @ k.mT / 2) / (near * (1 + long @ far.mT / 2)).sum(dim=-1, keepdim=True)
    mixed = (maps @ v).transpose(1, 2).flatten(2)
    expected = F.linear(mixed + view.v_bias, view.out_weight, view.out_bias)
    torch.testing.assert_close(mixer(x), expected)
    assert (maps.abs().sum(dim=-1) <= 1).all()
    if scores == "none":  # attention with maps that only decay
        flat = (near / near.sum(dim=-1, keepdim=True)).expand_as(maps)
        torch.testing.assert_close(maps, flat, rtol=0.01, atol=0.01)


def test_retention_without_decay_and_scores_gives_the_mean_value() -> None:
    mixer = made("retention")
    with torch.no_grad():
        mixer.qkv.weight[: 2 * DIM] = 0
        mixer.qkv.bias[: 2 * DIM] = 0
        mixer.log_rate.fill_(-50)
    x = randn(2, TOKENS, DIM)
    mean = mixer.qkv(x)[..., 2 * DIM :].mean(dim=1, keepdim=True).expand(-1, TOKENS, -1)
    expected = mixer.readout(torch.cat((mean, x), dim=-1))
    torch.testing.assert_close(mixer(x), expected, rtol=1e-5, atol=1e-5)


def test_retention_starts_with_the_decays_of_the_paper() -> None:
    mixer = made("retention", dim=64, heads=16)
    expected = 1 - 2.0 ** (-5 - torch.arange(16, dtype=torch.double))
    torch.testing.assert_close((-mixer.log_rate.exp()).exp(), expected)
    assert (mixer.log_rate.diff() < 0).all()


@BOTH
def test_padding_keeps_its_place_in_retention(causal: bool) -> None:
    """What lies between is not passed over: the tokens around are as far from each other as they were."""
    mixer = made("retention", causal=causal)
    x = randn(1, 200, DIM)
    mask = torch.ones(1, 200, dtype=torch.bool)
    mask[:, 1:199] = False
    with torch.no_grad():
        mixer.log_rate.fill_(0)
        y = mixer(x, mask=mask)
        for n in (0, 199):
            torch.testing.assert_close(y[:, n], mixer(x[:, n : n + 1])[:, 0])


# -- the gated delta rule --


def delta_inputs(tokens: int, width: int = 4) -> list[Tensor]:
    q, k = (F.normalize(randn(2, 3, tokens, width), dim=-1) for _ in range(2))
    return [q, k, randn(2, 3, tokens, width), rand(2, 3, 2, tokens), -rand(2, 3, 2, tokens) / 5]


@pytest.mark.parametrize("tokens", LENGTHS)
def test_delta_rule_agrees_with_fla(tokens: int) -> None:
    """The reference of fla works in single precision, has one direction and the tokens before the heads."""
    theirs = from_file("fla", "ops/gated_delta_rule/naive.py").naive_recurrent_gated_delta_rule
    q, k, v, beta, decay = delta_inputs(tokens)
    got = uncut(matrix_state.delta_rule(q, k, v, beta, decay), tokens, 3)
    for way, turn in enumerate((lambda t: t, lambda t: t.flip(2))):
        inputs = (turn(t).transpose(1, 2) for t in (q, k, v, beta[:, :, way], decay[:, :, way]))
        expected, _ = theirs(*inputs, scale=1.0)
        torch.testing.assert_close(
            got[:, :, way], turn(expected.transpose(1, 2)).double(), rtol=1e-5, atol=1e-5
        )


def test_delta_rule_remembers_the_last_value_of_each_key() -> None:
    """With keys at right angles, nothing forgotten and all written: asked for a key, it answers what came last."""
    width, tokens = 4, 200
    keys = torch.randint(width, (tokens,))
    asked = torch.randint(width, (tokens,))
    k, q = (torch.eye(width, dtype=torch.double)[t][None, None] for t in (keys, asked))
    v = randn(1, 1, tokens, width)
    beta, decay = torch.ones(1, 1, 1, tokens).double(), torch.zeros(1, 1, 1, tokens).double()
    got = uncut(matrix_state.delta_rule(q, k, v, beta, decay), tokens, 3)[0, 0, 0]
    for n in range(tokens):
        seen = [m for m in range(n + 1) if keys[m] == asked[n]]
        expected = v[0, 0, seen[-1]] if seen else torch.zeros(width).double()
        torch.testing.assert_close(got[n], expected, rtol=1e-9, atol=1e-9)


def test_delta_rule_of_equal_keys_in_single_precision() -> None:
    """The triangular systems are then as near to singular as they get."""
    q = k = F.normalize(torch.ones(1, 1, 500, 8), dim=-1)
    v, beta, decay = torch.randn(1, 1, 500, 8), torch.full((1, 1, 2, 500), 0.999), torch.zeros(1, 1, 2, 500)
    got = matrix_state.delta_rule(q, k, v, beta, decay)
    exact = matrix_state.delta_rule(*(t.double() for t in (q, k, v, beta, decay)))
    torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("causal", [False, True])
def test_gated_delta_that_hardly_writes_is_linear_attention(causal: bool) -> None:
    """To the first order in beta, with nothing forgotten: o_n = beta sum_m (q_n . k_m) v_m."""
    q, k, v, _, _ = delta_inputs(200)
    ways, beta = 1 if causal else 2, 1e-7
    writes = torch.full((2, 3, ways, 200), beta, dtype=torch.double)
    got = uncut(matrix_state.delta_rule(q, k, v, writes, 0 * writes), 200, 3) / beta
    scores = q @ k.mT
    torch.testing.assert_close(got[:, :, 0], scores.tril() @ v, rtol=1e-3, atol=1e-3)
    if not causal:
        torch.testing.assert_close(got[:, :, 1], scores.triu() @ v, rtol=1e-3, atol=1e-3)


@BOTH
def test_gated_delta_starts_with_the_teachers_projections(causal: bool) -> None:
    """Both directions on the average, through the teacher's output projection; the rates are those of its maps."""
    view = attention_view(DIM, HEADS, TOKENS, causal=causal)
    mixer: GatedDelta = inherited("gated_delta", view, causal=causal)
    x = randn(2, TOKENS, DIM)
    q, k, v = (
        heads(x, w, b)
        for w, b in (
            (view.q_weight, view.q_bias),
            (view.k_weight, view.k_bias),
            (view.v_weight, 0 * view.v_bias),
        )
    )
    q, k = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
    left = (-mean_rates(view.mean_attention, causal)).exp().view(-1, 1, 1)
    beta = torch.sigmoid(torch.tensor(-4.0).double())
    outs = []
    for order in [range(TOKENS), range(TOKENS)[::-1]][: 1 if causal else 2]:
        state, out = torch.zeros(2, HEADS, 4, 4).double(), torch.zeros_like(v)
        for n in order:
            state = left * state
            error = v[:, :, n] - (state.mT @ k[:, :, n, :, None])[..., 0]
            state = state + beta * k[:, :, n, :, None] * error[:, :, None]
            out[:, :, n] = (state.mT @ q[:, :, n, :, None])[..., 0]
        outs.append(out)
    mixed = torch.stack(outs).mean(dim=0).transpose(1, 2).flatten(2)
    expected = F.linear(mixed + view.v_bias, view.out_weight, view.out_bias)
    torch.testing.assert_close(mixer(x), expected)


# -- Mamba-2 --


def ssd_inputs(tokens: int, ways: int = 2, steps: float = 1.0) -> list[Tensor]:
    step = steps * rand(2, 3, ways, tokens)
    q, k, v = (randn(2, 3, tokens, width) for width in (5, 5, 4))
    return [q, k, v, step, -rand(3, ways, 1) * step]


@pytest.mark.parametrize("tokens", LENGTHS)
def test_ssd_is_a_product_with_a_matrix(tokens: int) -> None:
    """Y = (L o C B^T) X, L_nm the decays from m to n: those after m on the way to n, n's own among them."""
    q, k, v, step, decay = ssd_inputs(tokens)
    got = uncut(mamba2.ssd(q, k, v, step, decay).transpose(2, 3), tokens, 3)
    for way in range(2):
        total = kept(decay[:, :, way], back=bool(way))
        lasting = (total.unsqueeze(-1) - total.unsqueeze(-2)).exp()
        lasting = lasting.triu() if way else lasting.tril()
        expected = (lasting * (q @ k.mT)) @ (step[:, :, way].unsqueeze(-1) * v)
        torch.testing.assert_close(got[:, :, way], expected)


@pytest.mark.parametrize("tokens", [1, 65, WHOLE + 1])
def test_ssd_agrees_with_the_recurrence(tokens: int) -> None:
    inputs = [t.requires_grad_() for t in ssd_inputs(tokens)]
    got = uncut(mamba2.ssd(*inputs).transpose(2, 3), tokens, 3)
    expected = torch.zeros_like(got)
    turns: tuple[Callable[[Tensor], Tensor], ...] = (lambda t: t, lambda t: t.flip(0))
    for b in range(2):
        for h in range(3):
            for way, turn in enumerate(turns):
                q, k, v = (turn(t[b, h]) for t in inputs[:3])
                step, decay = (turn(t[b, h, way]) for t in inputs[3:])
                expected[b, h, way] = turn(naive.mamba2.ssd(q, k, v, step, decay))
    torch.testing.assert_close(got, expected)
    weights = torch.randn_like(got)
    found, wanted = (torch.autograd.grad((weights * y).sum(), inputs) for y in (got, expected))
    for pair in zip(found, wanted, strict=True):
        torch.testing.assert_close(*pair)


@pytest.mark.parametrize("tokens", [64, 256])
def test_ssd_agrees_with_mamba_ssm(tokens: int) -> None:
    """Their minimal form, read from its file; it has the steps in X and A, and the tokens before the heads."""
    spec = importlib.util.find_spec("mamba_ssm")
    if spec is None or spec.origin is None:
        pytest.skip("mamba-ssm is not installed (MAMBA_SKIP_CUDA_BUILD=TRUE pip install --no-deps mamba-ssm)")
    source = Path(spec.origin).parent / "modules" / "ssd_minimal.py"
    tree = ast.parse(source.read_text())
    wanted = {"segsum", "ssd_minimal_discrete"}
    functions = [f for f in tree.body if isinstance(f, ast.FunctionDef) and f.name in wanted]
    from einops import rearrange, repeat

    scope: dict[str, Any] = {"torch": torch, "F": F, "rearrange": rearrange, "repeat": repeat}
    exec(compile(ast.Module(body=functions, type_ignores=[]), str(source), "exec"), scope)
    q, k, v, step, decay = (t.float() for t in ssd_inputs(tokens, ways=1))
    got = uncut(mamba2.ssd(q, k, v, step, decay).transpose(2, 3), tokens, 3)[:, :, 0]
    inputs = (v * step[:, :, 0].unsqueeze(-1), decay[:, :, 0], k, q)
    expected, _ = scope["ssd_minimal_discrete"](*(t.transpose(1, 2) for t in inputs), 16)
    torch.testing.assert_close(got, expected.transpose(1, 2), rtol=1e-4, atol=1e-4)


def test_ssd_is_stable_where_everything_is_forgotten_or_nothing() -> None:
    for steps in (0.0, 1e-8, 1e4):
        inputs = [t.float().requires_grad_() for t in ssd_inputs(200, steps=steps)]
        y = mamba2.ssd(*inputs)
        assert y.isfinite().all()
        for gradient in torch.autograd.grad(y.sum(), inputs):
            assert gradient.isfinite().all()


@pytest.mark.parametrize("tokens", [1, 2, 17, 200])
def test_causal_block_is_that_of_transformers(tokens: int) -> None:
    """With as many groups as heads: state dict and values; what follows the norm is their W_out."""
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    guard_torchvision()
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    inner = 24
    config = Mamba2Config(
        hidden_size=DIM, state_size=4, num_heads=HEADS, head_dim=8, n_groups=HEADS, expand=2, chunk_size=16
    )
    theirs = Mamba2Mixer(config, 0).double()
    ours: Mamba2 = made("mamba2", causal=True)
    state = theirs.state_dict()
    out = state.pop("out_proj.weight")
    assert {k: v.shape for k, v in ours.state_dict().items() if not k.startswith("readout")} == {
        k: v.shape for k, v in state.items()
    }
    with torch.no_grad():
        for name in ("A_log", "D", "dt_bias", "norm.weight"):
            state[name].copy_(rand(*state[name].shape))
        theirs.load_state_dict({**state, "out_proj.weight": out})
        ours.load_state_dict({**ours.state_dict(), **state})
        ours.readout.weight.zero_()
        ours.readout.weight[:, :inner] = out
        ours.readout.bias.zero_()
        x = randn(2, tokens, DIM)
        # Theirs scans in single precision.
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


def features(mixer: Mamba2, x: Tensor) -> Tensor:
    """What goes into the readout, (B, N, H, W, P)."""
    seen: list[Tensor] = []
    handle = mixer.readout.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    mixer(x)
    handle.remove()
    return seen[0][..., :-DIM].unflatten(-1, (mixer.heads, mixer.ways, -1))


@BOTH
@pytest.mark.parametrize("name", ["A_log", "D", "dt_bias", "norm.weight", "in_proj.weight", "conv1d.weight"])
def test_mamba2_heads_stay_apart(name: str, causal: bool) -> None:
    """Whatever changes in one head, or in one direction of it, changes its group of features and no other."""
    mixer: Mamba2 = made("mamba2", causal=causal, tokens=200)
    x = randn(2, 200, DIM)
    ways, head = mixer.ways, 1
    with torch.no_grad():
        before = features(mixer, x)
        parameter = mixer.get_parameter(name)
        if name == "in_proj.weight":  # z, x, B, C and dt
            parts = list(parameter.split((mixer.inner, *mixer.parts, HEADS * ways)))
        elif name == "conv1d.weight":
            parts = list(parameter.split(mixer.parts))
        else:
            parts = [parameter]
        for part in parts:
            own = part.view(HEADS, -1)[head]
            kept_as_it_was = own.clone()
            own += 0.5
            changed = (features(mixer, x) - before).abs().amax(dim=(0, 1, 4)) > 1e-6  # (H, W)
            own.copy_(kept_as_it_was)
            expected = torch.zeros(HEADS, ways, dtype=torch.bool)
            expected[head] = True
            assert torch.equal(changed, expected)
        if name in {"A_log", "D", "dt_bias"} and not causal:
            parameter[head * ways + 1] += 0.5
            changed = (features(mixer, x) - before).abs().amax(dim=(0, 1, 4)) > 1e-6
            assert changed.nonzero().tolist() == [[head, 1]]


def test_mamba2_grouped_projection_sees_one_head() -> None:
    """A grouped convolution over the features, one group a head, mixes its two directions and nothing else."""
    mixer: Mamba2 = made("mamba2")
    x = randn(2, TOKENS, DIM)
    project = torch.nn.Conv1d(mixer.norm.weight.numel(), HEADS * 5, 1, groups=HEADS).double()
    with torch.no_grad():
        before = features(mixer, x)
        mixer.D[2:4] += 1  # both directions of head 1
        mixed = [project(f.flatten(2).mT).unflatten(1, (HEADS, 5)) for f in (before, features(mixer, x))]
    assert ((mixed[0] - mixed[1]).abs().amax(dim=(0, 2, 3)) > 1e-6).tolist() == [False, True, False]


def test_mamba2_sees_both_ways_alike() -> None:
    """Reversing the input, the convolution and the two directions reverses the output."""
    mixer, swapped = made("mamba2"), made("mamba2")

    def exchange(t: Tensor, dim: int = 0) -> Tensor:
        return t.unflatten(dim, (HEADS, 2, -1)).flip(dim + 1).flatten(dim, dim + 2)

    with torch.no_grad():
        state = {k: v.clone() for k, v in mixer.state_dict().items()}
        for name in ("dt_bias", "A_log", "D"):
            mixer.get_parameter(name).add_(rand(2 * HEADS))
            state[name] = exchange(mixer.get_parameter(name))
        state["norm.weight"] = exchange(state["norm.weight"])
        rows = state["in_proj.weight"][-2 * HEADS :]
        rows.copy_(rows.clone().unflatten(0, (HEADS, 2)).flip(1).flatten(0, 1))
        state["conv1d.weight"] = state["conv1d.weight"].flip(-1)
        weight = state["readout.weight"]
        state["readout.weight"] = torch.cat((exchange(weight[:, :-DIM], 1), weight[:, -DIM:]), dim=1)
    swapped.load_state_dict(state)
    x = randn(2, 200, DIM)
    torch.testing.assert_close(swapped(x.flip(1)).flip(1), mixer(x))


@BOTH
@pytest.mark.parametrize("width", [0.5, 1.0])
def test_mamba2_starts_with_the_teachers_q_k_and_v(width: float, causal: bool) -> None:
    """They come out of the convolution, token by token; the decays are those of its maps where dt has no input."""
    view = attention_view(DIM, HEADS, TOKENS, causal=causal)
    mixer: Mamba2 = inherited("mamba2", view, width, causal=causal)
    x = randn(2, TOKENS, DIM)
    u = depthwise(mixer.in_proj(x).split(mixer.sizes, dim=-1)[1], mixer.conv1d)
    v, k, q = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in u.split(mixer.parts, dim=-1))
    torch.testing.assert_close(
        q @ k.mT, heads(x, view.q_weight, view.q_bias) @ heads(x, view.k_weight, view.k_bias).mT / 2
    )
    torch.testing.assert_close(v[..., :4], heads(x, view.v_weight, view.v_bias))
    rates = (mixer.A_log.exp() * F.softplus(mixer.dt_bias)).unflatten(0, (HEADS, -1))
    expected = mean_rates(view.mean_attention, causal).unsqueeze(-1).expand_as(rates)
    torch.testing.assert_close(rates, expected)
