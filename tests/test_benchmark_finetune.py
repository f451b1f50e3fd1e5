"""benchmarks/finetune.py: every stage is judged, kept, and not done again; on the tiny teacher."""

import json
import sys
from pathlib import Path

import pytest
import tiny
import tiny_search
from click.testing import CliRunner

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import finetune  # noqa: E402
import subjects  # noqa: E402

sys.path.remove(str(BENCHMARKS))

from mixerzoo.data import open_npz  # noqa: E402


@pytest.fixture
def start(monkeypatch, tmp_path):
    """Run the script on the tiny teacher; returns its result and what is in the JSON."""
    data = open_npz(str(tiny_search.write_npz(tmp_path / "pictures.npz")))
    subject = subjects.Subject(teacher=tiny.tiny_teacher(), data=data, indices=data.splits.calibration[:40])
    monkeypatch.setattr(finetune, "open_subject", lambda *_, **__: subject)

    def run(*words):
        file = tmp_path / "finetune.json"
        common = ["--quick", "--json", str(file), "--cache", str(tmp_path / "cache"), "--threads", "1"]
        result = CliRunner().invoke(finetune.main, [*common, *words])
        return result, json.loads(file.read_text()) if file.exists() else {}

    return run


def test_the_stages_are_judged_and_go_on(start, monkeypatch):
    train = finetune.train

    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune, "train", stopped)
    assert start("--lr", "0.003")[0].exit_code == 1
    monkeypatch.setattr(finetune, "train", train)
    monkeypatch.setattr(finetune, "refit", stopped)  # it is there already
    result, figures = start("--lr", "0.003")
    assert result.exit_code == 0, result.output
    stages = figures["stages"]
    assert list(stages) == ["stitched", "refit", "finetuned"]
    # The steps are chosen on validation images: on the test images of a teacher that knows nothing they may not help.
    assert max(stages["finetuned"]["loss"], stages["refit"]["loss"]) < stages["stitched"]["loss"]
    assert stages["finetuned"]["steps"] == finetune.QUICK_STEPS
    accuracy = figures["teacher"]["accuracy"]
    assert figures["points_below"]["refit"] == pytest.approx(
        100 * (accuracy - stages["refit"]["accuracy"]), abs=0.01
    )
    assert {"device", "threads", "versions"} <= set(figures["environment"])
    assert figures["met"] is None
    monkeypatch.setattr(finetune, "train", stopped)
    assert start("--lr", "0.003")[1]["stages"] == stages
    result, _ = start("--lr", "0.001")
    assert result.exit_code == 1
    assert "other settings" in result.output
