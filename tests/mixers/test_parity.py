"""The built-in mixers against other people's implementations of the same thing."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixerzoo_mixers import naive, ssm
from mixerzoo_mixers.recurrent import MultiheadLstm


@pytest.fixture
def selective_scan_ref() -> Callable[..., Tensor]:
    """mamba_ssm's own reference; the package cannot be imported on a CPU, so the function is read from its file."""
    spec = importlib.util.find_spec("mamba_ssm")
    if spec is None or spec.origin is None:
        pytest.skip("mamba-ssm is not installed (MAMBA_SKIP_CUDA_BUILD=TRUE pip install --no-deps mamba-ssm)")
    source = Path(spec.origin).parent / "ops" / "selective_scan_interface.py"
    tree = ast.parse(source.read_text())
    wanted = [f for f in tree.body if isinstance(f, ast.FunctionDef) and f.name == "selective_scan_ref"]
    from einops import rearrange, repeat

    scope: dict[str, Any] = {"torch": torch, "F": F, "rearrange": rearrange, "repeat": repeat}
    exec(compile(ast.Module(body=wanted, type_ignores=[]), str(source), "exec"), scope)
    function: Callable[..., Tensor] = scope["selective_scan_ref"]
    return function


def scan_inputs(tokens: int, dtype: torch.dtype, steps: float = 1.0) -> list[Tensor]:
    torch.manual_seed(tokens)
    batch, inner, states = 2, 6, 4
    return [
        torch.randn(batch, tokens, inner, dtype=dtype),
        steps * torch.rand(batch, tokens, inner, dtype=dtype),
        -torch.rand(inner, states, dtype=dtype) * 4,
        torch.randn(batch, tokens, states, dtype=dtype),
        torch.randn(batch, tokens, states, dtype=dtype),
    ]


@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 33, 257])
def test_scan_agrees_with_mamba_ssm(tokens: int, selective_scan_ref: Callable[..., Tensor]) -> None:
    # The reference works in single precision, whatever it is given.
    u, delta, a, b, c = inputs = scan_inputs(tokens, torch.float)
    expected = selective_scan_ref(u.mT, delta.mT, a, b.mT, c.mT).mT
    torch.testing.assert_close(ssm.selective_scan(*inputs), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ssm.scan_with(selective_scan_ref, *inputs), expected)


@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 33, 257])
def test_scan_agrees_with_the_recurrence(tokens: int) -> None:
    u, delta, a, b, c = (t.requires_grad_() for t in scan_inputs(tokens, torch.double))
    got = ssm.selective_scan(u, delta, a, b, c)
    expected = torch.stack([naive.ssm.selective_scan(u[i], delta[i], a, b[i], c[i]) for i in range(2)])
    torch.testing.assert_close(got, expected)
    weights = torch.randn_like(got)
    for pair in zip(
        *(torch.autograd.grad((weights * y).sum(), (u, delta, a, b, c)) for y in (got, expected)), strict=True
    ):
        torch.testing.assert_close(*pair)


def test_scan_is_stable_where_everything_is_forgotten_or_nothing() -> None:
    for steps in (0.0, 1e-8, 1e4):
        inputs = [t.requires_grad_() for t in scan_inputs(100, torch.float, steps)]
        y = ssm.selective_scan(*inputs)
        assert y.isfinite().all()
        for gradient in torch.autograd.grad(y.sum(), inputs):
            assert gradient.isfinite().all()


@pytest.mark.parametrize("tokens", [1, 2, 17, 41])
@pytest.mark.parametrize("expansion", [1, 2])
def test_block_agrees_with_mambapy(tokens: int, expansion: int) -> None:
    mambapy = pytest.importorskip("mambapy.mamba", reason="mambapy is not installed")
    torch.manual_seed(0)
    config = mambapy.MambaConfig(d_model=24, n_layers=1, expand_factor=expansion, pscan=False)
    theirs = mambapy.MambaBlock(config).double()
    ours = ssm.SelectiveSsm(24, 24 * expansion).double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, tokens, 24, dtype=torch.double)
    torch.testing.assert_close(ours(x), theirs(x))


def test_state_dict_is_that_of_mamba_ssm() -> None:
    dim, inner, rank = 40, 80, 3
    expected = {
        "in_proj.weight": (2 * inner, dim),
        "conv1d.weight": (inner, 1, 4),
        "conv1d.bias": (inner,),
        "x_proj.weight": (rank + 32, inner),
        "dt_proj.weight": (inner, rank),
        "dt_proj.bias": (inner,),
        "A_log": (inner, 16),
        "D": (inner,),
        "out_proj.weight": (dim, inner),
    }
    assert {k: tuple(v.shape) for k, v in ssm.SelectiveSsm(dim, inner).state_dict().items()} == expected


def test_mamba_sees_both_ways_alike() -> None:
    """Reversing the input and swapping the two directions reverses the output."""
    torch.manual_seed(0)
    mixer = ssm.Mamba(dim=8, width=0.5, causal=False).double()
    swapped = ssm.Mamba(dim=8, width=0.5, causal=False).double()
    assert mixer.back is not None
    assert swapped.back is not None
    swapped.ahead.load_state_dict(mixer.back.state_dict())
    swapped.back.load_state_dict(mixer.ahead.state_dict())
    first, second, own = mixer.readout.weight.detach().chunk(3, dim=1)
    swapped.readout.load_state_dict(
        {"weight": torch.cat((second, first, own), dim=1), "bias": mixer.readout.bias.detach()}
    )
    x = torch.randn(2, 21, 8, dtype=torch.double)
    torch.testing.assert_close(swapped(x.flip(1)).flip(1), mixer(x))


@pytest.mark.parametrize("width", [0.25, 0.5, 1.0])
def test_lstm_equals_the_block_masked_dense_form(width: float) -> None:
    """FAR trains one LSTM over all heads whose weights are masked to blocks: the same values."""
    torch.manual_seed(0)
    dim, heads = 12, 3
    mixer = MultiheadLstm(dim, heads, width, causal=False).double()
    hidden = mixer.lstm[0].hidden_size
    dense = nn.LSTM(dim, heads * hidden, batch_first=True, bidirectional=True).double()
    head_proj = nn.Linear(2 * heads * hidden, dim).double()
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            # Rows are ordered by gate, then head; each head's weights are one block of each gate.
            parts = [getattr(lstm, name).unflatten(0, (4, hidden)) for lstm in mixer.lstm]
            if name.startswith("bias"):
                parameter.copy_(torch.stack(parts, dim=1).flatten())
            else:
                parameter.copy_(torch.cat([torch.block_diag(*gate) for gate in zip(*parts, strict=True)]))
        weights = [p.weight.chunk(2, dim=1) for p in mixer.head_proj]
        head_proj.weight.copy_(
            torch.cat([torch.block_diag(*side) for side in zip(*weights, strict=True)], dim=1)
        )
        head_proj.bias.copy_(torch.cat([p.bias for p in mixer.head_proj]))
    x = torch.randn(2, 9, dim, dtype=torch.double)
    expected = mixer.post_proj(head_proj(dense(mixer.pre_proj(x))[0]))
    torch.testing.assert_close(mixer(x), expected)
    stored = sum(p.numel() for p in mixer.lstm.parameters())
    assert stored < sum(p.numel() for p in dense.parameters())
