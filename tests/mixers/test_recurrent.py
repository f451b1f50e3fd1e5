"""LSTMs on the grid beside timm's, and with and without the kernel."""

from __future__ import annotations

import pytest
import torch

from mixerzoo import MixerzooError
from mixerzoo.compat import guard_torchvision
from mixerzoo_mixers import kernels, recurrent
from mixerzoo_mixers.recurrent import Lstm2d, both_ways

from . import SPECS, site


def test_agrees_with_timm() -> None:
    guard_torchvision()
    from timm.models.sequencer import LSTM2d

    torch.manual_seed(0)
    mixer = Lstm2d(dim=12, tokens=15, width=1.0, prefix=0, grid=(3, 5)).double()
    theirs = LSTM2d(12, 3).double()
    with torch.no_grad():
        theirs.rnn_v.load_state_dict(mixer.rnn_v.state_dict())
        theirs.rnn_h.load_state_dict(mixer.rnn_h.state_dict())
        mixer.readout.weight[:, 12:] = 0  # timm's has no place for the token itself
        theirs.fc.weight.copy_(mixer.readout.weight[:, :12])
        theirs.fc.bias.copy_(mixer.readout.bias)
        x = torch.randn(2, 15, 12, dtype=torch.double)
        expected = theirs(x.unflatten(1, (3, 5))).flatten(1, 2)
        torch.testing.assert_close(mixer(x), expected)


@pytest.mark.skipif(
    kernels.kernel("lstm") is None, reason="no C compiler here: the kernel cannot be compiled"
)
def test_the_kernel_changes_no_value_and_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    lstm = torch.nn.LSTM(7, 5, batch_first=True, bidirectional=True)
    x = torch.randn(6, 4, 7, requires_grad=True)
    weights = torch.randn(6, 4, 10)
    results = []
    for use in (kernels.usable, lambda *_: False):
        monkeypatch.setattr(recurrent, "usable", use)
        y = both_ways(lstm, x)
        results.append((y, *torch.autograd.grad((weights * y).sum(), [x, *lstm.parameters()])))
    for found, right in zip(*results, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)


def test_rows_and_columns_are_not_mixed_up() -> None:
    """With one prefix token and an oblong grid, a cell sees its own row and column and the prefix, nothing else."""
    torch.manual_seed(0)
    mixer = Lstm2d(dim=8, tokens=13, width=1.0, prefix=1, grid=(3, 4)).double().eval()
    x = torch.randn(1, 13, 8, dtype=torch.double)
    changed = x.clone()
    changed[0, 1 + 4 * 1 + 2] += 1  # the cell in row 1, column 2
    moved = (mixer(changed) - mixer(x)).abs().amax(-1)[0]
    seen = (moved[1:] > 0).view(3, 4)
    assert seen[1].all()
    assert seen[:, 2].all()
    assert int(seen.sum()) == 4 + 3 - 1
    assert moved[0] > 0


def test_needs_a_grid() -> None:
    with pytest.raises(MixerzooError, match="mixer 'lstm2d' needs a grid"):
        SPECS["lstm2d"].make(site(SPECS["lstm2d"], grid=None), 1.0)
