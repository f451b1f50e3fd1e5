"""`mixerzoo profile`: of a teacher with a library, and of a search, at every point where one may have been stopped."""

import json
import shutil

import pytest
import tiny_search
from click.testing import CliRunner
from PIL import Image

from mixerzoo.cli import main
from mixerzoo_search import scores, scoring, search
from mixerzoo_search.journal import Journal
from mixerzoo_search.profile.of_run import profile_run

WORDS = ("--model", "tiny", "--threads", "1", "--images", "24")


@pytest.fixture(scope="module", autouse=True)
def _tiny_world():
    with tiny_search.tiny_world():
        yield


def go(folder, **changes):
    options = {"mixers": tiny_search.MIXERS, **tiny_search.FAST, "trials": 3, "finetune_minutes": 0} | changes
    return search(
        "tiny",
        folder / "data.npz",
        budget="60%",
        out=folder / "run",
        tracking_uri=f"sqlite:///{folder}/mlflow.db",
        quiet=True,
        **options,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    tiny_search.write_npz(folder / "data.npz")
    go(folder)
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def profile(*words):
    result = CliRunner().invoke(main, ["profile", *map(str, words)])
    assert result.exit_code == 0, (result.stderr, result.exception)
    return result.stdout


def refused(*words):
    result = CliRunner().invoke(main, ["profile", *map(str, words)])
    assert result.exit_code == 2, (result.output, result.exception)
    assert len(result.stderr.splitlines()) == 1
    return result.stderr


def test_a_finished_search_shows_predictions_beside_the_truth(finished, here):
    run = finished / "run"
    told = profile("--run", run, "--out", here / "out")
    for words in (
        "blocks.1.attn",
        "contribution",
        "predicted",
        "fitted",
        "measured",
        "Spearman",
        "mlp_slice@0.5",
    ):
        assert words in told
    page = (here / "out" / "profile.html").read_text()
    for words in ("Candidates", "How well the prior knew", "Predicted and measured damage", "mlp_slice@0.5"):
        assert words in page
    assert "plotly.js v" in page
    with Image.open(here / "out" / "profile.png") as picture:
        assert picture.height > 1000
    content = json.loads(profile("--run", run, "--out", here / "out", "--json"))
    prior, stored = content["prior"], json.loads((run / "prior.json").read_text())
    assert {name: prior[name] for name in ("scores", "before_scores", "left_out", "mixers")} == {
        name: stored[name] for name in ("scores", "before_scores", "left_out", "mixers")
    }
    scores = json.loads((run / "scores.json").read_text())
    for row in prior["candidates"]:
        assert {"log_contribution", "log_error", "entropy"} <= set(row["features"])
        if row["score"] is not None:
            assert row["score"] == scores[row["key"]]
            assert row["fitted"] > 0
    assert {tuple(pair) for pair in json.loads((run / "stepped.json").read_text())["chosen"]} >= {
        (row["site"], row["candidate"]) for row in prior["candidates"] if row["before_steps"] is not None
    }
    summary = json.loads((run / "summary.json").read_text())
    assert content["teacher"] == {
        name: summary["teacher"][name] for name in ("name", "latency_ms", "accuracy", "params")
    }
    assert [site["latency_ms"] > 0 for site in content["sites"]] == [True] * 4


def test_it_is_written_into_the_run_directory_unless_told_otherwise(finished, tmp_path):
    shutil.copytree(finished / "run", tmp_path / "run")
    assert f"profile  {tmp_path / 'run' / 'profile.html'}" in profile("--run", tmp_path / "run")
    assert (tmp_path / "run" / "profile.png").exists()


def test_the_report_says_how_well_the_prior_knew(finished):
    page = (finished / "run" / "report.html").read_text()
    assert "How well the prior knew" in page
    stored = json.loads((finished / "run" / "prior.json").read_text())
    assert f"over {stored['scores']} scores" in page
    assert all(mixer in page for mixer in stored["mixers"])


class Stop(Exception):
    pass


def stopped(folder, monkeypatch, module, part, after):
    """Start a search that stops when a function of a module has been called so many times."""
    real, calls = getattr(module, part), []

    def interrupted(*arguments, **options):
        calls.append(part)
        if len(calls) > after:
            raise Stop
        return real(*arguments, **options)

    tiny_search.write_npz(folder / "data.npz")
    with monkeypatch.context() as patch:
        patch.setattr(module, part, interrupted)
        with pytest.raises(Stop):
            go(folder)
    return folder / "run"


def test_a_search_stopped_before_its_closed_forms_shows_what_statistics_say(here, monkeypatch):
    run = stopped(here, monkeypatch, scoring, "_make_closed", 0)
    told = profile("--run", run)
    assert "predicted" in told
    assert "Spearman" not in told
    rows = profile_run(run).prior.rows
    assert {(row.nmse, row.score, row.fitted) for row in rows} == {(None, None, None)}
    assert len({row.predicted for row in rows}) > 4


def test_a_search_stopped_while_it_scores_shows_the_scores_it_has(here, monkeypatch):
    run = stopped(here, monkeypatch, scores, "measure_scores", 0)
    assert profile_run(run).prior.overall.scores == 0
    rows = profile_run(run).prior.rows
    assert all(row.nmse is not None and row.key for row in rows)
    # As after a kill amid the scores: they are written one by one, the table is not.
    (run / "scores.json").write_text(json.dumps({row.key: 0.1 + at for at, row in enumerate(rows[:5])}))
    found = profile_run(run).prior
    assert found.overall.scores == 5
    assert [row.score for row in found.rows[:6]] == [0.1, 1.1, 2.1, 3.1, 4.1, None]
    assert all(row.fitted is not None for row in found.rows)
    assert "Spearman" in profile("--run", run)


def test_what_is_no_run_or_has_nothing_to_show_is_refused(finished, here, monkeypatch):
    assert "is not a run directory" in refused("--run", here / "nowhere")
    early = here / "early"
    early.mkdir()
    tiny_search.write_npz(early / "data.npz")
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "__init__", stop)
        with pytest.raises(Stop):
            go(early)
    assert "has no predictions yet: start the same search again" in refused("--run", early / "run")
    for name, content, text in (
        ("prior.json", '{"before_scores": 0.5, "left_out": 0.5}', "not what this version writes"),
        ("prior.json", "[]", "not what this version writes"),
        ("scores.json", "{", "not readable as JSON"),
        ("statistics.json", "{}", "not what this version writes"),
    ):
        damaged = here / "damaged"
        shutil.copytree(finished / "run", damaged)
        (damaged / name).write_text(content)
        assert text in refused("--run", damaged, "--out", here / "out")
        shutil.rmtree(damaged)
    assert not (here / "out").exists()


def stop(*arguments, **options):
    raise Stop


def test_what_a_run_has_of_its_own_is_not_taken_beside_it(finished):
    for words in (("--model", "tiny"), ("--images", "30"), ("--library", "x"), ("--memory-limit", "1")):
        assert f"{words[0]} does not go with --run" in refused("--run", finished / "run", *words)


def test_a_library_adds_what_the_prior_predicts(finished, here):
    words = (*WORDS, "--data", finished / "data.npz")
    assert "predicted" not in profile(*words)
    assert json.loads(profile(*words, "--json")).keys() == {"schema", "teacher", "sites", "environment"}
    library = finished / "library"
    told = profile(*words, "--library", library)
    assert "predicted" in told
    assert "Spearman" not in told
    content = json.loads(profile(*words, "--library", library, "--json"))
    rows = content["prior"]["candidates"]
    stored = json.loads((finished / "run" / "prior.json").read_text())["candidates"]
    closed = {(row["site"], row["candidate"]) for row in stored}
    assert {(row["site"], row["candidate"]) for row in rows} == closed
    assert all(row["nmse"] > 0 and row["predicted"] > 0 and row["score"] is None for row in rows)
    assert "Candidates" in (here / "profiles" / "tiny" / "profile.html").read_text()


def test_a_library_of_something_else_predicts_nothing(finished, here):
    tiny_search.write_npz(here / "other.npz", count=60)
    told = profile(*WORDS, "--data", here / "other.npz", "--library", finished / "library")
    assert "no candidates of this teacher and data" in told
    assert "is not a library" in refused(*WORDS, "--data", here / "other.npz", "--library", here)


def test_a_bad_memory_limit_is_refused(here, finished):
    for value in ("-1", "nan", "inf"):
        text = f"--memory-limit {value}: give 0 or more GiB, such as 4"
        words = ("--data", finished / "data.npz", "--memory-limit", value)
        assert text in refused(*WORDS, *words)
        result = CliRunner().invoke(main, ["search", "--model", "tiny", "--budget", "60%", *map(str, words)])
        assert (result.exit_code, text in result.stderr) == (2, True)
    assert list(here.iterdir()) == []
    assert "blocks.1.attn" in profile(*WORDS, "--data", finished / "data.npz", "--memory-limit", "0")
