"""Whether a gain is more than chance, and how much of a change of accuracy may be."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mixerzoo.significance import change_interval, change_text, has_helped, is_clear

ANSWERS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)


def columns(answers):
    return torch.tensor(answers).unbind(1)


@given(ANSWERS)
def test_the_interval_holds_the_change_it_is_of_and_says_the_reverse_of_the_reverse(answers):
    before, after = columns(answers)
    low, high = change_interval(before, after)
    assert -1 <= low < high <= 1
    change = float(after.float().mean() - before.float().mean())
    if abs(change) < 0.5:  # it is drawn towards 0, which a change of almost all of few images may be beyond
        assert low <= change <= high
    assert change_interval(after, before) == pytest.approx((-high, -low))


def test_many_images_say_more_than_few_and_few_without_a_change_are_no_certainty():
    widths = []
    for n in (10, 100, 1000):
        same = torch.ones(n, dtype=torch.bool)
        low, high = change_interval(same, same)
        assert low < 0 < high
        widths.append(high - low)
    assert widths == sorted(widths, reverse=True)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    dice = torch.Generator().manual_seed(0)
    lost, gained, n, times = 0.03, 0.01, 300, 2000
    covered = 0
    for _ in range(times):
        case = torch.rand(n, generator=dice)
        before, after = case > gained, (case <= gained) | (case > gained + lost)
        low, high = change_interval(before, after)
        covered += low <= gained - lost <= high
    assert covered / times == pytest.approx(0.95, abs=0.025)


def test_an_interval_is_told_in_points():
    assert change_text(-0.0084, 0.00312) == "-0.8 to +0.3"
    assert change_text(None, 0.1) == change_text(0.1, None) == ""


def test_a_gain_is_clear_from_twice_its_standard_error_on():
    gains = torch.cat([torch.full((8,), 1.0), torch.full((8,), -1.0)])
    error = float(gains.std()) / math.sqrt(len(gains))
    assert is_clear(gains + 2.01 * error)
    assert not is_clear(gains + 1.99 * error)
    assert not is_clear(torch.tensor([1.0]))
    assert not is_clear(torch.tensor([1.0, math.nan]))


def test_further_images_decide_alone_where_there_are_some():
    clear, unclear = torch.full((9,), 1.0), torch.tensor([1.0, -0.9])
    assert has_helped(unclear, torch.tensor([1e-3]))
    assert not has_helped(clear, torch.tensor([-1e-3]))
    assert has_helped(clear, torch.empty(0))
    assert not has_helped(unclear, torch.empty(0))
