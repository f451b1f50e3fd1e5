"""Progress: one bar a phase on a terminal, which ends at what there was to do in the end; nothing elsewhere."""

import io
import re

import pytest
from rich.console import Console

from mixerzoo.progress import Reporter, beginning_at


@pytest.fixture
def reporter():
    found = Reporter()
    found.console = Console(file=io.StringIO(), force_terminal=True, width=120)
    found.silent = False
    return found


def last_line(reporter):
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", reporter.console.file.getvalue())
    return text.rstrip().splitlines()[-1]


def test_a_phase_ends_full(reporter):
    with reporter.phase("images", 5) as report:
        report(2)
    assert last_line(reporter).startswith("images")
    assert "5/5" in last_line(reporter)


def test_more_may_be_found_to_do(reporter):
    with reporter.phase("scores", 3) as report:
        beginning_at(0, report)(3)
        report(3, 7)
        beginning_at(3, report)(2)
    assert "7/7" in last_line(reporter)


def test_nothing_is_shown_where_there_is_no_terminal(reporter):
    reporter.silent = True
    with reporter.phase("images", 5) as report:
        report(2, 3)
    reporter.note("a note")
    assert reporter.console.file.getvalue() == ""
