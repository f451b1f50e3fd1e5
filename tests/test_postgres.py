"""A study in PostgreSQL: the same promises as in SQLite, on a server that this test starts and stops."""

import json
import os
import sys
from pathlib import Path

import postgres
import pytest
import tiny_search

from mixerzoo.errors import MixerzooError
from mixerzoo_search import join, search
from mixerzoo_search.run_directory import RunDirectory
from mixerzoo_search.study import disconnect

sys.path.append(str(Path(__file__).parent / "search"))

import test_claims as claims

REASON = postgres.missing()
pytestmark = pytest.mark.skipif(REASON is not None or not hasattr(os, "fork"), reason=REASON or "it forks")


@pytest.fixture(scope="module")
def url():
    with postgres.server() as url:
        yield url


@pytest.fixture
def named(monkeypatch):
    """Give the studies of a test a name; connections are closed after it."""
    studies = []

    def naming(name):
        def opened(url, model, **changes):
            options = {"model": model, "prior": claims.Prior.from_damage({}), "budget_ms": 9.0, "seed": 0}
            studies.append(claims.open_study(url, name, **options | changes))
            return studies[-1]

        monkeypatch.setattr(claims, "opened", opened)
        return opened

    yield naming
    for study in studies:
        disconnect(study._storage)


@pytest.mark.parametrize("kill", [None, 2])
def test_processes_share_a_study(url, tmp_path, kill, named):
    named(f"shared {kill}")
    model = claims.make_model(4)
    evaluated = claims.share(url, model, tmp_path / "workers", kill=kill)
    study = claims.opened(url, model)
    claims.assert_each_once(study, evaluated)
    assert sum(claims.LOST in trial.user_attrs for trial in study.trials) == (kill is not None)


@pytest.mark.slow
def test_a_search_keeps_its_study_there(url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_search.write_npz(tmp_path / "data.npz")
    options = tiny_search.FAST | {"mixers": tiny_search.MIXERS, "trials": 3, "finetune_minutes": 0}
    secret = url.replace("mixerzoo@", "mixerzoo:secret@")  # which the server does not ask for
    with tiny_search.tiny_world():
        first = search("tiny", "data.npz", budget="60%", out="run", storage=secret, **options)
        tiny_search.check_summary(first.summary)
        assert not (first.path / "study.db").exists()
        kept = RunDirectory(first.path).record()["storage"]
        assert "secret" not in (first.path / "run.json").read_text()
        assert kept == url.replace("mixerzoo@", "mixerzoo:***@")
        with pytest.raises(MixerzooError, match=r"keeps its study in '.*'; give --storage with the password"):
            search("tiny", "data.npz", budget="60%", out="run", **options)
        joined = join("run", storage=secret)  # nobody leads it any more
        assert joined.summary["evaluations"] == first.summary["evaluations"]
        second = search(from_run="run", budget="45%", storage=secret, trials=2)
        taken = json.loads((second.path / "taken.json").read_text())["evaluations"]
        assert len(taken) == 3
        # A run of that name somewhere else is another search, and does not get its study.
        (tmp_path / "other").mkdir()
        with pytest.raises(MixerzooError, match=r"has a study 'run' of another search; give a run directory"):
            search("tiny", "data.npz", budget="70%", out="other/run", storage=secret, **options)
