"""The C kernels give what PyTorch gives, and are done without where they cannot be had."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mixerzoo_mixers import kernels, recurrent, ssm
from mixerzoo_mixers.kernels.lstm import recurrence
from mixerzoo_mixers.kernels.scan import scan

from . import draw_mask

compiled = pytest.mark.skipif(
    kernels.kernel("scan") is None, reason="no C compiler here: the kernels cannot be compiled"
)


def agree(found: Tensor, expected: Tensor) -> None:
    """To single precision, in units of the greatest value: the sums are long."""
    scale = expected.abs().max().clamp(min=1e-6)
    torch.testing.assert_close(found.double() / scale, expected.double() / scale, rtol=0, atol=1e-5)


@compiled
@pytest.mark.parametrize(
    ("batch", "tokens", "inner", "states"), [(1, 1, 1, 1), (2, 5, 33, 3), (3, 37, 70, 16), (1, 131, 64, 16)]
)
@pytest.mark.parametrize("threads", [1, 3])
def test_scan_agrees_with_pytorch(batch: int, tokens: int, inner: int, states: int, threads: int) -> None:
    torch.manual_seed(tokens)
    inputs = [
        torch.randn(batch, tokens, inner),
        torch.rand(batch, tokens, inner),
        -4 * torch.rand(inner, states),
        torch.randn(batch, tokens, states),
        torch.randn(batch, tokens, states),
    ]
    weights = torch.randn(batch, tokens, inner)
    ours = [t.clone().requires_grad_() for t in inputs]
    exact = [t.double().requires_grad_() for t in inputs]
    torch.set_num_threads(threads)
    try:
        y = scan(*ours)
        gradients = torch.autograd.grad((weights * y).sum(), ours)
    finally:
        torch.set_num_threads(1)
    expected = ssm.selective_scan(*exact)
    agree(y, expected)
    # With one token, `a` has no gradient at all.
    wanted = torch.autograd.grad((weights * expected).sum(), exact)
    for found, right in zip(gradients, wanted, strict=True):
        agree(found, right)


@compiled
def test_scan_takes_views_and_steps_of_any_size() -> None:
    base = torch.randn(2, 24, 9)
    delta = torch.tensor([0.0, 1e-8, 1.0, 100.0, 1e4]).repeat(2, 4)[..., None].expand(2, 20, 24)
    b, c = torch.randn(2, 20, 8).chunk(2, dim=-1)
    a = -torch.rand(4, 24).mT
    u = base.mT.repeat(1, 3, 1)[:, :20]
    agree(scan(u, delta, a, b, c), ssm.selective_scan(u.double(), delta.double(), a.double(), b, c))


@compiled
def test_scan_lets_nan_be_seen() -> None:
    u = torch.randn(1, 6, 4)
    u[0, 3, 1] = torch.nan
    y = scan(u, torch.rand(1, 6, 4), -torch.rand(4, 2), torch.randn(1, 6, 2), torch.randn(1, 6, 2))
    assert y[0, :3].isfinite().all()
    assert y[0, 3:, 1].isnan().all()
    assert y[..., [0, 2, 3]].isfinite().all()


@compiled
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("batch", "dim", "heads", "width"), [(1, 6, 3, 0.5), (6, 36, 2, 1.0), (3, 40, 4, 0.5)]
)
def test_lstm_agrees_with_pytorch(
    monkeypatch: pytest.MonkeyPatch,
    batch: int,
    dim: int,
    heads: int,
    width: float,
    masked: bool,
    causal: bool,
) -> None:
    torch.manual_seed(dim)
    mixer = recurrent.MultiheadLstm(dim, heads, width, causal)
    x = torch.randn(batch, 19, dim, requires_grad=True)
    mask = draw_mask(batch, 19) if masked else torch.ones(batch, 19, dtype=torch.bool)
    weights = torch.randn_like(x)[mask]
    results = []
    for use in (kernels.usable, lambda *_: False):
        monkeypatch.setattr(recurrent, "usable", use)
        y = (mixer(x, mask=mask) if masked else mixer(x))[mask]
        gradients = torch.autograd.grad((weights * y).sum(), [x, *mixer.parameters()])
        results.append((y, *gradients))
    for found, right in zip(*results, strict=True):
        agree(found, right)


@compiled
def test_lstm_stops_at_each_samples_length() -> None:
    inputs, bias, weight = torch.randn(2, 5, 7, 12), torch.randn(2, 12), torch.randn(2, 12, 3)
    lengths = torch.tensor([7, 1, 4, 0, 2])
    states = recurrence(inputs.clone(), bias, weight, lengths, 1)
    for i, length in enumerate(lengths.tolist()):
        assert (states[:, i, length:] == 0).all()
        alone = recurrence(inputs[:, i : i + 1, :length].clone(), bias, weight, None, 1)
        torch.testing.assert_close(states[:, i, :length], alone[:, 0])


def test_other_tensors_go_through_pytorch() -> None:
    plain = torch.zeros(2)
    assert not kernels.usable("scan", plain.double())
    assert not kernels.usable("scan", plain, plain.bfloat16())
    assert not kernels.usable("scan", plain.to("meta"))


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kernels.kernel.cache_clear()
    yield tmp_path
    kernels.kernel.cache_clear()


def test_no_compiler_is_no_error(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", "")
    with caplog.at_level("INFO", logger="mixerzoo_mixers.kernels"):
        assert kernels.kernel("scan") is None
    assert "no C compiler: scan runs in PyTorch" in caplog.text
    assert ssm.scan(
        *(torch.rand(1, 3, 2) for _ in range(2)), -torch.ones(2, 1), *torch.rand(2, 1, 3, 1)
    ).shape


def test_a_compiler_that_fails_is_no_error(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiler = fresh / "cc"
    compiler.write_text("#!/bin/sh\necho 'something is missing' >&2\ntest \"$1\" = --version\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    with caplog.at_level("INFO", logger="mixerzoo_mixers.kernels"):
        assert kernels.kernel("lstm") is None
    assert "something is missing" in caplog.text
    assert not list(fresh.rglob("*.so"))


def test_kernels_can_be_turned_off(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXERZOO_KERNELS", "0")
    assert kernels.kernel("scan") is None
    assert not list(fresh.iterdir())


@compiled
def test_processes_that_compile_at_once_do_not_disturb_each_other(fresh: Path) -> None:
    code = "from mixerzoo_mixers.kernels import kernel; assert kernel('scan') is not None"
    running = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    assert [process.wait(timeout=200) for process in running] == [0, 0, 0]
    libraries = list((fresh / "mixerzoo" / "kernels").iterdir())
    assert len(libraries) == 1
    assert isinstance(kernels.kernel("scan"), ctypes.CDLL)
    assert list((fresh / "mixerzoo" / "kernels").iterdir()) == libraries
