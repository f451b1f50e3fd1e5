"""`mixerzoo latency`: the table, what it takes from a library and what it measures, and the error of the sums."""

import json

import pytest
import tiny_search
from click.testing import CliRunner

from mixerzoo.cli import main
from mixerzoo.latency import Conditions, Stopwatch, measure_table
from mixerzoo.opening import open_teacher
from mixerzoo.plan import Candidate
from mixerzoo.progress import Reporter
from mixerzoo_search.candidates import list_candidates
from mixerzoo_search.latency.check import check_table

ASKED = [
    "latency",
    "--model",
    "tiny",
    "--threads",
    "1",
    "--mixers",
    "static,pool,none,mlp_slice",
    "--library",
    "lib",
]


@pytest.fixture(scope="module", autouse=True)
def _tiny_world():
    with tiny_search.tiny_world():
        yield


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*arguments, code=0):
        result = CliRunner().invoke(main, [*ASKED, *arguments])
        assert result.exit_code == code, result.output
        return result

    return run


def test_the_table_says_what_each_candidate_takes_beside_the_teachers_own(run, tmp_path):
    found = json.loads(run("--json").stdout)
    assert found["teacher_ms"] == pytest.approx(4.1)
    assert found["reused"] == found["missing"] == 0
    attention, mlp = found["shapes"]
    assert attention["sites"] == ["blocks.0.attn", "blocks.1.attn"]
    # Where nothing stands a tenth of the module's time is left, by the rule of these tests.
    assert attention["own_ms"] == pytest.approx(0.95 * tiny_search.ATTENTION_MS)
    rows = {row["candidate"]: row for row in attention["candidates"]}
    assert rows["none@1"]["ms"] == pytest.approx(0)
    assert rows["none@1"]["share"] == pytest.approx(0)
    assert 0 < rows["static@0.5"]["share"] < rows["static@1"]["share"] <= 1
    for row in [*attention["candidates"], *mlp["candidates"]]:
        assert row["error_ms"] == 0
        assert row["measured"]
    assert [row["change_ms"] for row in attention["candidates"]] == sorted(
        row["change_ms"] for row in attention["candidates"]
    )
    assert {row["candidate"].partition("@")[0] for row in mlp["candidates"]} == {"none", "mlp_slice"}
    assert found["environment"]["runtime"] == "eager"
    again = json.loads(run("--json").stdout)
    assert (again["reused"], again["measured"]) == (found["measured"], 0)
    assert again["shapes"] == found["shapes"]
    assert {path.name for path in (tmp_path / "lib").iterdir()} == {"latency", "library.lock"}


def test_on_a_terminal_it_is_a_table(run):
    said = run().stdout
    assert "teacher  tiny  4.10 ms  batch 1, 1 threads, float32, cpu, eager" in said
    assert "attention D=24 N=17 H=3" in said
    assert "2 sites, blocks.0.attn the first: the teacher's own module takes 0.950 ms at each" in said
    assert "(0 from the library, " in said
    assert max(map(len, said.splitlines())) < 110


def test_stored_only_shows(run, tmp_path):
    said = run("--stored").stdout
    assert "not measured yet" in said
    assert not (tmp_path / "lib").exists()
    run("--mixers", "pool")
    said = run("--stored").stdout
    assert "pool@1" in said.partition("not measured yet")[0]
    assert "not known)" in said


def test_the_sums_are_compared_with_students(run):
    found = json.loads(run("--json", "--check", "20").stdout)["check"]
    # Here latency is a sum over sites.
    for quality in (found["plain"], found["corrected"]):
        assert quality["mape"] == pytest.approx(0, abs=1e-6)
        assert quality["spearman"] > 0.99
        assert quality["plans"] == len(found["rows"]) == 20
    assert found["slope"] == pytest.approx(1)
    assert found["fitted_on"] >= 10
    said = run("--check", "5").stdout
    assert "sum over sites   MAPE 0.0%, largest error 0.0%, Spearman" in said
    assert "correction" in said


def test_the_correction_is_of_other_plans_than_the_error(monkeypatch):
    """Students take more than the sums say, by an affine law: the plain sums are off, the corrected ones are not."""

    class Slower(Stopwatch):
        time = tiny_search.ruled_time

    teacher = open_teacher("tiny")
    stopwatch = Slower(teacher, Conditions(threads=1))
    candidates = list_candidates(teacher.sites, mixers=["static", "pool", "none", "mlp_slice"])
    table = measure_table(stopwatch, candidates)
    ruled = tiny_search.ruled_ms
    monkeypatch.setattr(
        tiny_search,
        "ruled_ms",
        lambda model: ruled(model) if model is teacher.model else 0.3 + 1.1 * ruled(model),
    )
    found = check_table(stopwatch, candidates, table, plans=8, seed=0, reporter=Reporter(quiet=True))
    assert found.plain.mape > 0.1
    assert found.corrected.mape < 1e-6
    assert (found.intercept_ms, found.slope) == pytest.approx((0.3, 1.1))


@pytest.mark.slow
def test_a_search_with_the_same_library_measures_nothing_of_it(run, tmp_path):
    tiny_search.write_npz(tmp_path / "data.npz")
    run()
    search = ["search", "--model", "tiny", "--threads", "1", "--mixers", "static,pool,none,mlp_slice"]
    search += ["--budget", "60%", "--data", "data.npz", "--out", "run", "--library", "lib", "--trials", "2"]
    search += ["--images", "40", "--finetune-minutes", "0", "--distill-steps", "0"]
    CliRunner().invoke(main, search, catch_exceptions=False)
    latency = json.loads((tmp_path / "run" / "latency.json").read_text())
    assert latency["measured"] == 0
    assert latency["reused"] > 5
    assert str(Candidate("pool")) in latency["change_ms"]["blocks.0.attn"]


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (["--check", "2"], ["--check 2", "at least 3"]),
        (["--stored", "--check", "9"], ["--stored measures nothing"]),
        (["--stored", "--again"], ["--stored measures nothing"]),
        (["--threads", "0"], ["--threads 0", "at least 1"]),
        (["--batch-size", "0"], ["--batch-size 0", "at least 1"]),
        (["--mixers", "poool"], ["unknown mixer 'poool'", "pool"]),
        (["--widths", "wide"], ["wide"]),
        (["--runtime", "egaer"], ["egaer", "eager"]),
        (["--device", "cuda:99"], ["cuda:99", "--device cpu"]),
        (["--library", "there"], ["library 'there' holds something else"]),
    ],
)
def test_mistakes_cost_one_line_and_leave_nothing(run, tmp_path, arguments, texts):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "something").write_text("else")
    result = run(*arguments, code=2)
    assert result.stdout == ""
    for text in texts:
        assert text in result.stderr
    assert result.stderr.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"there"}
