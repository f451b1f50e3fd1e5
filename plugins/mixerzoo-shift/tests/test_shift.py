"""Everything mixerzoo demands of a mixer, and the values against an obvious loop."""

import pytest
import torch
from mixerzoo_shift import Shift

from mixerzoo.testing import parametrize_with_checks


@parametrize_with_checks("shift")
def test_conformance(check):
    check()


@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_agrees_with_a_loop(prefix):
    torch.manual_seed(0)
    mixer, x = Shift(dim=6, width=1.0, prefix=prefix), torch.randn(2, 7, 6)
    value = mixer.value(x)
    expected = value.clone()
    for token in range(7):
        for channel in range(4):  # of six: two from before, two from after, two that stay
            source = token - 1 if channel < 2 else token + 1
            if token < prefix:
                expected[:, token, channel] = value[:, prefix:, channel].mean(1)
            elif prefix <= source < 7:
                expected[:, token, channel] = value[:, source, channel]
            else:
                expected[:, token, channel] = 0
    torch.testing.assert_close(mixer(x), mixer.readout(expected))
