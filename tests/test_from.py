"""Another search on what a run has made: nothing is measured or distilled twice, and it stands for itself."""

import json
import shutil

import pytest
import tiny_search
from click.testing import CliRunner
from tiny_search import check_summary

from mixerzoo.cli import main
from mixerzoo.errors import MixerzooError
from mixerzoo.latency import Stopwatch, store
from mixerzoo.latency.store import code_of
from mixerzoo.progress import Reporter
from mixerzoo.temporary import temporary_of
from mixerzoo_search import candidates, context, search, taking_over, timing
from mixerzoo_search.claims import TAKEN
from mixerzoo_search.evaluate import Evaluator
from mixerzoo_search.run_directory import RunDirectory
from mixerzoo_search.starting import settings_of
from mixerzoo_search.study import connect

optuna = pytest.importorskip("optuna")

TRIALS = 8


@pytest.fixture(scope="module", autouse=True)
def _tiny_world():
    with tiny_search.tiny_world():
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("from")
    tiny_search.write_npz(folder / "data.npz")
    tiny_search.write_npz(folder / "other.npz", count=90)
    return folder


@pytest.fixture(scope="module")
def first(place):
    options = tiny_search.FAST | {"mixers": tiny_search.MIXERS, "trials": TRIALS, "finetune_minutes": 0}
    uri = f"sqlite:///{place}/mlflow.db"
    return search(
        "tiny", place / "data.npz", budget="60%", out=place / "runs" / "x", tracking_uri=uri, **options
    ).path


@pytest.fixture
def again(place, first):
    """Search on what the first run has made."""

    def searched(**changes):
        options = {"budget": "45%", "trials": 3, "tracking_uri": f"sqlite:///{place}/mlflow.db"} | changes
        return search(**{"from_run": first} | options)

    return searched


@pytest.fixture
def work(monkeypatch):
    """What is done from here on: passes of the teacher, distilled candidates, evaluated plans, timed students."""
    done = {"captured": 0, "distilled": 0, "evaluated": [], "timed": 0}
    capture, distill, evaluate, time = context.capture, candidates.distill, Evaluator.evaluate, Stopwatch.time

    def captured(*args, **options):
        done["captured"] += 1
        return capture(*args, **options)

    def distilled(*args, **options):
        done["distilled"] += 1
        return distill(*args, **options)

    def evaluated(self, plan, *args, **options):
        done["evaluated"].append(plan)
        return evaluate(self, plan, *args, **options)

    def timed(self, students, **options):
        done["timed"] += len(students)
        return time(self, students, **options)

    monkeypatch.setattr(context, "capture", captured)
    monkeypatch.setattr(candidates, "distill", distilled)
    monkeypatch.setattr(Evaluator, "evaluate", evaluated)
    monkeypatch.setattr(Stopwatch, "time", timed)
    return done


def trials_of(path):
    study = optuna.load_study(
        study_name=RunDirectory(path).study, storage=connect(f"sqlite:///{path}/study.db")
    )
    return [trial for trial in study.trials if trial.state.name == "COMPLETE"]


def kept(path):
    return {file: file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def test_another_budget_measures_and_distils_nothing_again(again, first, work, place):
    before = kept(first)
    result = again(finetune_minutes=0)
    assert result.path == first.with_name("x-45%")
    assert (work["captured"], work["distilled"]) == (0, 0)
    check_summary(result.summary)
    assert result.summary["met"]
    assert kept(first) == before
    # Latencies are on the same scale, and the budget is a share of the same latency.
    there, here = RunDirectory(first), RunDirectory(result.path)
    assert here.record()["teacher_ms"] == there.record()["teacher_ms"]
    assert here.load("latency")["change_ms"] == there.load("latency")["change_ms"]
    assert result.summary["budget_ms"] == pytest.approx(0.45 * there.record()["teacher_ms"])
    for name in ("statistics", "stepped", "latency_check"):
        assert here.load(name) == there.load(name)
    assert there.load("scores").items() <= here.load("scores").items()  # others may matter near this budget
    # Its plans are there, with what the new budget makes of them; evaluated are only others.
    old = {json.dumps(trial.params, sort_keys=True): trial for trial in trials_of(first)}
    new = trials_of(result.path)
    taken = [trial for trial in new if TAKEN in trial.user_attrs]
    assert {json.dumps(trial.params, sort_keys=True) for trial in taken} == set(old)
    assert len(old) >= TRIALS
    for trial in taken:
        before = old[json.dumps(trial.params, sort_keys=True)]
        assert trial.values == before.values
        assert trial.user_attrs["source"] == "run x"
        over = trial.constraints["latency_over_budget_ms"]
        assert over == pytest.approx(trial.values[1] - result.summary["budget_ms"])
    assert len(new) == len(taken) + 3
    assert len(work["evaluated"]) >= 3  # and what is solved for again
    assert not {json.dumps(plan.to_json(), sort_keys=True) for plan in work["evaluated"]} & set(old)
    # The fastest plan, three trials, and the finalists.
    assert work["timed"] < 30
    assert not list(place.rglob("*.tmp"))
    assert not list(place.rglob("*.lock")) or {p.name for p in place.rglob("*.lock")} == {"library.lock"}


def test_it_goes_on_by_itself_when_the_earlier_run_is_gone(again, first, work, place):
    copy = first.with_name("gone")
    shutil.copytree(first, copy)
    options = {"from_run": copy, "budget": "50%", "out": place / "runs" / "alone", "finetune_minutes": 0}
    result = again(**options, trials=1)
    shutil.rmtree(copy)
    for path in ("study.db", "latency_check.json"):  # as if it had been killed before these
        (result.path / path).unlink()
    work["evaluated"].clear()
    work["timed"] = 0
    settings = settings_of(RunDirectory(result.path))
    assert settings.trials == 1
    renamed = result.path.rename(place / "runs" / "renamed")
    more = search(
        "tiny",
        place / "data.npz",
        budget="50%",
        out=renamed,
        tracking_uri=f"sqlite:///{place}/mlflow.db",
        **tiny_search.FAST | {"mixers": tiny_search.MIXERS, "trials": 2, "finetune_minutes": 0},
    )
    assert (work["captured"], work["distilled"]) == (0, 0)
    assert 2 <= len(work["evaluated"]) <= 2 + 6  # exact plans are solved for again after the study
    assert sum(TAKEN not in trial.user_attrs for trial in trials_of(more.path)) == 2
    assert sum(TAKEN in trial.user_attrs for trial in trials_of(more.path)) == TRIALS


def test_fewer_mixers_take_over_the_plans_that_have_no_others(again, first):
    result = again(mixers=("none", "static", "mlp_slice"), budget=None, finetune_minutes=0, trials=2)
    assert result.path.name == "x-60%"
    mixers = {text.split("@")[0] for trial in trials_of(result.path) for text in trial.params.values()}
    assert mixers <= {"keep", "none", "static", "mlp_slice"}
    there = [{text.split("@")[0] for text in trial.params.values()} for trial in trials_of(first)]
    able = sum(row <= {"keep", "none", "static", "mlp_slice"} for row in there)
    taken = sum(TAKEN in trial.user_attrs for trial in trials_of(result.path))
    assert taken <= able
    rows = RunDirectory(result.path).load("latency")["change_ms"].values()
    assert {candidate.split("@")[0] for row in rows for candidate in row} == {"none", "static", "mlp_slice"}


def test_more_mixers_are_made_and_the_others_are_not(again, first, work):
    made = {file.name for file in (first.parent / "library").glob("*.json")}
    result = again(
        mixers=(*tiny_search.MIXERS, "fnet"), finetune_minutes=0, trials=2, out=first.with_name("more")
    )
    assert work["captured"] == 1
    new = [
        json.loads(file.read_text())["candidate"]
        for file in (first.parent / "library").glob("*.json")
        if file.name not in made
    ]
    assert any(candidate.startswith("fnet") for candidate in new)
    assert result.summary["met"]


def test_of_a_mixer_that_was_edited_no_latency_is_taken_over(again, first, monkeypatch):
    def edited(text):
        return "edited" if text.startswith("static") else code_of(text)

    for module in (taking_over, timing, store):
        monkeypatch.setattr(module, "code_of", edited)
    result = again(finetune_minutes=0, trials=1, out=first.with_name("edited"))
    taken = [trial.params for trial in trials_of(result.path) if TAKEN in trial.user_attrs]
    assert not [text for params in taken for text in params.values() if text.startswith("static")]
    code = RunDirectory(result.path).load("latency")["code"]["blocks.0.attn"]
    assert {text.split("@")[0] for text in code if code[text] == "edited"} == {"static"}


def test_another_seed_is_one_of_the_study(again, first, work):
    result = again(seed=5, budget=None, finetune_minutes=0, out=first.with_name("seed"))
    assert (work["captured"], work["distilled"]) == (0, 0)
    identity = RunDirectory(result.path).record()["identity"]
    assert (identity["seed"], identity["study_seed"]) == (0, 5)
    assert RunDirectory(result.path).load("latency_check") == RunDirectory(first).load("latency_check")


@pytest.mark.slow
def test_a_plan_whose_weights_are_others_is_evaluated_again(again, first, monkeypatch):
    monkeypatch.setattr(taking_over, "weights_of", lambda library, plan: "others")
    result = again(budget="55%", finetune_minutes=0, trials=2)
    assert not [trial for trial in trials_of(result.path) if TAKEN in trial.user_attrs]


@pytest.mark.slow
def test_on_another_machine_latency_is_measured_anew(again, first, work):
    copy = first.with_name("elsewhere")
    shutil.copytree(first, copy)
    run = RunDirectory(copy)
    run.note(teacher_ms=99.0, environment=run.record()["environment"] | {"device_name": "another"})
    result = again(from_run=copy, budget="50%", finetune_minutes=0, trials=2)
    assert (work["captured"], work["distilled"]) == (0, 0)
    assert result.summary["teacher"]["latency_ms"] != 99.0
    assert not [trial for trial in trials_of(result.path) if TAKEN in trial.user_attrs]
    assert run.load("scores").items() <= RunDirectory(result.path).load("scores").items()


def test_what_a_killed_process_was_writing_there_does_not_take_the_name(again, first):
    out = first.parent / "mine"
    out.mkdir()
    temporary_of(out / "run.json").write_text('{"half')
    assert again(budget="53%", finetune_minutes=0, trials=1, out=out).path == out
    assert {path.name for path in out.iterdir() if path.name.startswith(".")} == set()


@pytest.mark.slow
def test_a_name_that_is_taken_is_not_taken_twice(again, first):
    (first.parent / "x-52%").mkdir()
    (first.parent / "x-52%" / "letter.txt").write_text("dear")
    one = again(budget="52%", finetune_minutes=0, trials=1)
    assert one.path.name == "x-52%-2"
    assert again(budget="52%", finetune_minutes=0, trials=1).path == one.path  # the same command goes on
    assert again(budget="52%", seed=4, finetune_minutes=0, trials=1).path.name == "x-52%-3"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"threads": 3}, "--threads 3: run '{run}' has --threads 1; leave it out"),
        ({"batch_size": 4}, "--batch-size 4: run '{run}' has --batch-size 1; leave it out"),
        ({"model": "other"}, "--model other: run '{run}' has --model tiny; leave it out"),
        ({"images": 30}, "--images 30: run '{run}' has --images 40; leave it out"),
        ({"runtime": "inductor"}, "--runtime inductor: run '{run}' has --runtime eager; leave it out"),
        ({"distill_steps": 9}, "--distill-steps 9: run '{run}' has --distill-steps 4; leave it out"),
        ({"trials": 0}, "--trials 0: give at least 1"),
        ({"seed": -1}, "--seed -1: give at least 0"),
        ({"budget": "40%", "budget_ms": 5.0}, "give one of budget_ms"),
    ],
)
def test_what_contradicts_the_run_is_refused(again, first, changes, text):
    before = {*first.parent.iterdir()}
    with pytest.raises(MixerzooError) as raised:
        again(**changes)
    assert text.format(run=first) in str(raised.value)
    assert {*first.parent.iterdir()} == before


@pytest.mark.slow
def test_other_data_is_refused_and_the_same_elsewhere_is_not(again, first, place):
    with pytest.raises(MixerzooError, match=r"not what run '.*' was made with"):
        again(data=place / "other.npz")
    shutil.copy(place / "data.npz", place / "moved.npz")
    result = again(data=place / "moved.npz", budget="58%", finetune_minutes=0, trials=1)
    assert RunDirectory(result.path).record()["identity"]["data"] == str(place / "moved.npz")


@pytest.mark.parametrize(
    "storage", ["sqlite:////no/such/place/study.db", "nonsense://x", "postgresql://a:***@b/c"]
)
def test_a_run_whose_study_cannot_be_read_gives_no_plans_and_says_so(again, first, monkeypatch, storage):
    copy = first.with_name("unread")
    shutil.copytree(first, copy)
    (copy / "study.db").unlink()
    RunDirectory(copy).note(storage=storage)
    told = []
    monkeypatch.setattr(Reporter, "note", lambda self, text: told.append(text))
    out = copy.with_name("read")
    result = again(from_run=copy, budget="50%", finetune_minutes=0, trials=1, out=out)
    assert not [trial for trial in trials_of(result.path) if TAKEN in trial.user_attrs]
    (line,) = [text for text in told if "taken over into" in text]
    assert "no evaluated plans (" in line
    assert storage in line
    for path in (copy, out):
        shutil.rmtree(path)


def test_the_working_directory_does_not_become_a_run_on_another(again, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MixerzooError, match=r"--out \. is the working directory; with --from"):
        again(out=".")
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_run_is_refused(again, place, tmp_path):
    with pytest.raises(MixerzooError, match=r"is not a run directory: it has no run\.json"):
        again(from_run=tmp_path)
    (tmp_path / "run.json").write_text('{"identity": {"recipe": "far"}}')
    with pytest.raises(MixerzooError, match="not a search of mixerzoo"):
        again(from_run=tmp_path)


def test_the_command_takes_what_is_not_said_from_the_run(first, place, monkeypatch):
    monkeypatch.chdir(place)
    words = ["search", "--from", str(first), "--budget", "57%", "--trials", "1", "--finetune-minutes", "0"]
    told = CliRunner().invoke(main, [*words, "--json"])
    assert told.exit_code == 0, told.output
    assert json.loads(told.stdout)["met"]
    settings = settings_of(RunDirectory(first.with_name("x-57%")))
    assert (settings.model, settings.images, settings.threads) == ("tiny", 40, 1)
    told = CliRunner().invoke(main, [*words, "--batch-size", "1", "--threads", "2"])
    assert told.exit_code == 2
    assert told.stderr.count("\n") == 1
    assert "--threads 2: run" in told.stderr
    told = CliRunner().invoke(main, [*words, "--join"])
    assert "give one of them" in told.stderr
