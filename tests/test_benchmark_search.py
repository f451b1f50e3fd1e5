"""benchmarks/search.py and the tabular benchmark: what is in it, and that each part runs and says what it found."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import table as tabular  # noqa: E402
from search_parts import regret, samplers, solver  # noqa: E402

import search  # noqa: E402

sys.path.remove(str(BENCHMARKS))

from mixerzoo.errors import MixerzooError  # noqa: E402
from mixerzoo.plan import Plan  # noqa: E402


@pytest.fixture(scope="module")
def table():
    return tabular.load_table()


def test_the_table_is_whole(table):
    assert len(table.sites) >= 4
    assert min(map(len, table.candidates)) >= 6
    assert table.loss.shape == table.ms.shape == tuple(map(len, table.candidates))
    assert np.isfinite(table.loss).all()
    assert (table.loss > -1e-6).all()
    assert (table.ms > 0).all()
    assert tabular.FILE.stat().st_size < 300_000
    nothing = (0,) * len(table.sites)
    assert table.loss[nothing] == pytest.approx(0, abs=1e-6)
    assert table.ms[nothing] == pytest.approx(table.teacher_ms, rel=0.02)


def test_what_a_search_knows_is_what_the_table_says(table):
    model = table.model()
    plan = {
        site: row[2] if at == 1 else "keep"
        for at, (site, row) in enumerate(zip(table.sites, table.candidates, strict=True))
    }
    assert model.predict_loss(Plan.from_json(plan)) == pytest.approx(
        float(table.loss[table.at(plan)]), abs=1e-6
    )
    loss, ms = table.predictions()
    assert ms[table.at(plan)] == pytest.approx(model.predict_ms(Plan.from_json(plan)))
    assert loss[table.at(plan)] == pytest.approx(model.predict_loss(Plan.from_json(plan)))
    assert np.corrcoef(ms.ravel(), table.ms.ravel())[0, 1] > 0.85


def test_there_is_something_to_learn_in_it(table):
    """The exact plan of the additive model is not the best one everywhere, and the front has many plans."""
    budgets = [regret.budget_of(table, share) for share in np.linspace(0.1, 0.9, 17)]
    exact = [samplers.exact_plans(table.model(), [budget])[0] for budget in budgets]
    missed = [
        table.ms[table.at(plan)] > budget or table.loss[table.at(plan)] > table.best(budget)
        for plan, budget in zip(exact, budgets, strict=True)
    ]
    assert np.mean(missed) > 0.4
    assert len({table.best(budget) for budget in budgets}) >= 6


def test_priors_differ(table):
    on, off = (table.prior(kind, scored=False) for kind in ("on", "off"))
    site = table.sites[0]
    assert on.weights[site] != off.weights[site]
    assert len(set(off.weights[site].values())) == 1
    assert sorted(table.prior("shuffled", scored=True).weights[site].values()) == pytest.approx(
        sorted(table.prior("on", scored=True).weights[site].values())
    )


@pytest.mark.parametrize("content", [b"", b"no archive"])
def test_a_bad_table_is_named(tmp_path, content):
    path = tmp_path / "table.npz"
    path.write_bytes(content)
    with pytest.raises(MixerzooError, match="not readable"):
        tabular.load_table(path)
    with pytest.raises(MixerzooError, match=r"none\.npz"):
        tabular.load_table(tmp_path / "none.npz")


def test_regret_is_measured_and_goes_on(tmp_path, monkeypatch):
    file, picture = tmp_path / "search.json", tmp_path / "regret.png"
    command = ["--parts", "table", "--quick", "--seeds", "1", "--processes", "1", "--json", str(file)]
    command += ["--methods", "mixerzoo,exact,random"]
    result = CliRunner().invoke(search.main, [*command, "--picture", str(picture)])
    assert result.exit_code == 0, result.output
    figures = json.loads(file.read_text())["digits_vit"]["table"]
    regrets = figures["median_regret"]
    for share, row in regrets["mixerzoo"].items():
        assert row["64"] <= row["8"]
        assert row["64"] <= (regrets["exact"][share]["64"] or np.inf)
    assert picture.stat().st_size > 1000
    monkeypatch.setattr(regret, "trajectory", lambda *_: pytest.fail("run again"))
    assert CliRunner().invoke(search.main, command).exit_code == 0


def test_the_bars_can_be_missed(monkeypatch, tmp_path):
    worst = [1.0] * 64
    monkeypatch.setattr(regret, "trajectory", lambda method, share, seed: worst)
    result = CliRunner().invoke(
        search.main, ["--parts", "table", "--seeds", "1", "--processes", "1", "--methods", "mixerzoo,random"]
    )
    assert result.exit_code == 1
    assert "not below random" in result.output


def test_the_solver_is_timed_and_checked(monkeypatch, tmp_path):
    for name, value in {"SITES": 6, "CANDIDATES": 5, "BUDGETS": 8}.items():
        monkeypatch.setattr(solver, name, value)
    file = tmp_path / "search.json"
    result = CliRunner().invoke(search.main, ["--parts", "solver", "--json", str(file)])
    assert result.exit_code == 0, result.output
    rows = json.loads(file.read_text())["digits_vit"]["solver"]["rows"]
    assert set(rows) == set(solver.SPACES)
    assert all(row["proven"] == 8 for row in rows.values())


def test_unknown_parts_are_named():
    result = CliRunner().invoke(search.main, ["--parts", "tables"])
    assert result.exit_code == 2
    assert "tables" in result.output
