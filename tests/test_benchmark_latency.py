"""benchmarks/latency.py: both parts run, keep what they have, and judge by their bars; on the tiny teacher, by rule."""

import json
import sys
from pathlib import Path

import pytest
import tiny_run
import tiny_search
from click.testing import CliRunner

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import latency  # noqa: E402

from mixerzoo.opening import open_teacher  # noqa: E402
from mixerzoo.student import save_student  # noqa: E402

sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def start(tmp_path):
    """Run the script; returns what it printed and what is in the JSON."""
    path = tmp_path / "latency.json"

    def start(*arguments, code=0):
        words = ["--quick", "--model", "tiny", "--threads", "1", "--cache", str(tmp_path / "cache")]
        with tiny_search.tiny_world():
            result = CliRunner().invoke(latency.main, [*words, "--json", str(path), *arguments])
        assert result.exit_code == code, result.output
        return result.output, json.loads(path.read_text())["tiny"] if path.exists() else {}

    return start


def test_the_error_of_each_runtime_is_kept_and_judged(start, monkeypatch):
    said, found = start("--parts", "error", "--runtimes", "eager")
    row = found["error"]["rows"]["eager"]
    assert row["plain"]["mape"] < 1e-6  # by the rule, latency is a sum over sites
    assert row["plain"]["plans"] == latency.QUICK_PLANS
    assert row["environment"]["runtime"] == "eager"
    assert found["error"]["passed"] == {"eager": True}
    assert "within the bars" in said
    monkeypatch.setattr(latency, "check_table", None)
    assert start("--parts", "error", "--runtimes", "eager")[1] == found
    monkeypatch.setattr(latency, "MAPE_BAR", -1.0)
    said, found = start("--parts", "error", "--runtimes", "eager")
    assert found["error"]["passed"] == {"eager": False}
    assert "NO" in said


def test_unknown_parts_and_runtimes_are_refused(start):
    assert "unknown: meet" in start("--parts", "meet", code=2)[0]
    assert "unknown: tpu" in start("--runtimes", "tpu", code=2)[0]


@pytest.mark.slow
def test_a_winner_that_is_over_its_budget_when_measured_afresh_is_named(start, monkeypatch):
    monkeypatch.setattr(latency, "QUICK_SEARCHES", 2)
    monkeypatch.setattr(
        latency, "measured_apart", latency.measured_again
    )  # the rule holds in this process only
    said, found = start("--parts", "met")
    rows = found["met"]["rows"]
    assert list(rows) == ["45%", "95%"]
    for row in rows.values():
        assert row["met"]
        assert row["fresh"] == pytest.approx(row["reported"])
        assert row["over"] <= 0
    assert rows["95%"]["latency"]["measured"] == 0  # the first search has measured all
    assert found["met"]["passed"]
    assert "over: none" in said
    monkeypatch.setattr(latency, "OVER_BAR", -0.9)
    monkeypatch.setattr(latency, "search", None)  # nothing is searched again
    said, found = start("--parts", "met")
    assert found["met"]["wrong"] == ["45%", "95%"]
    assert not found["met"]["passed"]


@pytest.mark.slow
def test_winners_are_measured_in_a_process_of_their_own(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)  # as it is for a script there
    teacher = open_teacher("digits_vit")
    best = tmp_path / "best"
    save_student(best, tiny_run.make_student(teacher, {"blocks.0.attn": "pool@1"}), teacher)
    found = latency.measured_apart("digits_vit", best, 1)
    assert 0 < found["fresh"] < 2
    assert found["teacher_ms"] > 0
