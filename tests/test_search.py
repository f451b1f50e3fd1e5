"""The whole search on the tiny teacher: what it writes, what it promises, and what a bad plugin or file costs it."""

import json
from contextlib import contextmanager

import numpy as np
import pytest
import tiny
import tiny_search
import torch
from PIL import Image
from tiny_search import check_summary
from torch import nn

import mixerzoo
from mixerzoo import Caps, MixerSpec, MixerzooError, hookimpl
from mixerzoo.data import MIN_IMAGES, image_batches, load_labels
from mixerzoo.errors import BudgetOutOfReachError
from mixerzoo.hosts import Replacement, count_params
from mixerzoo.latency import Stopwatch
from mixerzoo.opening import open_data, open_teacher
from mixerzoo.plan import Plan
from mixerzoo.registry import get_registry, temporary_plugin
from mixerzoo.score import Judge
from mixerzoo_search import evaluate, search
from mixerzoo_search.image_parts import ImageParts
from mixerzoo_search.results import closing_lines

SCORED = 14  # images of the 80 in the data, of which 40 are distilled on


@pytest.fixture(scope="module", autouse=True)
def _tiny_world():
    with tiny_search.tiny_world():
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the data, and one MLflow store for all runs: a new one takes seconds to make."""
    folder = tmp_path_factory.mktemp("search")
    tiny_search.write_npz(folder / "labelled.npz")
    tiny_search.write_npz(folder / "unlabelled.npz", labels=False)
    return folder


@pytest.fixture(scope="module")
def start(place):
    """Start a search in a folder of its own name, with a library of its own unless told otherwise."""

    def started(out, model="tiny", data="labelled.npz", **changes):
        budget = {} if "budget_ms" in changes else {"budget": "60%"}
        options = {"mixers": tiny_search.MIXERS} | budget | tiny_search.FAST
        options |= {"library": place / "runs" / out / "library"} | changes
        return search(
            model,
            place / data,
            out=place / "runs" / out,
            tracking_uri=f"sqlite:///{place}/mlflow.db",
            **options,
        )

    return started


@pytest.fixture(scope="module")
def finished(start):
    return start("finished")


def on_test_images(student, data, *, name="tiny"):
    """Judge a student from scratch, on the images that nothing was chosen on."""
    teacher = open_teacher(name)
    indices = data.splits.test
    judge = Judge(teacher, image_batches(data, indices, teacher.image), load_labels(data, indices))
    return judge.evaluate(student)


def index_of(path):
    """Return key -> entry of the library in a run directory."""
    return {file.stem: json.loads(file.read_text()) for file in (path / "library").glob("*.json")}


def test_the_run_directory_holds_what_is_promised(finished):
    path = finished.path
    for name in (
        "run.json", "study.db", "summary.json", "best/plan.json", "best/model.safetensors",
        "best/README.md", "report.html", "report.png",
    ):  # fmt: skip
        assert (path / name).stat().st_size > 0, name
    assert list(path.rglob("*.tmp")) == []
    assert (path / "report.png").read_bytes().startswith(b"\x89PNG")
    page = (path / "report.html").read_text()
    assert page.lower().startswith("<!doctype html>")
    files = {"library.lock", "latency"}
    files |= {f"{key}.{kind}" for key in index_of(path) for kind in ("json", "safetensors")}
    assert {file.name for file in (path / "library").iterdir()} == files
    record = json.loads((path / "run.json").read_text())
    assert record["identity"]["seed"] == 0
    assert record["identity"]["plugins"]["mixerzoo"] == mixerzoo.__version__
    assert list(record["identity"]["space"]) == [site.name for site in open_teacher("tiny").sites]
    assert record["environment"]["threads"] == 1


def test_the_summary_follows_its_schema(finished):
    assert json.loads((finished.path / "summary.json").read_text()) == finished.summary
    check_summary(finished.summary)


def test_the_budget_is_met_and_the_best_is_on_the_frontier(finished):
    summary = finished.summary
    best = summary["best"]
    assert summary["met"]
    assert summary["budget_ms"] == pytest.approx(0.6 * summary["teacher"]["latency_ms"])
    assert best["latency_ms"] <= summary["budget_ms"]
    within = [row for row in summary["pareto"] if row["latency_ms"] <= summary["budget_ms"]]
    assert within[-1]["plan"] == best["plan"]
    # The rule is additive, so the additive model has no error to make.
    assert summary["latency_model"]["max_error"] < 1e-6
    assert summary["latency_model"]["spearman"] > 0.99
    assert summary["evaluations"] >= tiny_search.FAST["trials"]


def test_the_best_student_loads_and_does_what_the_summary_says(finished, place):
    best = finished.summary["best"]
    student = mixerzoo.load(finished.best)
    found = on_test_images(student, open_data(str(place / "labelled.npz")))
    assert found.loss == pytest.approx(best["loss"], abs=1e-6)
    assert (found.agreement, found.accuracy) == (best["agreement"], best["accuracy"])
    assert count_params(student) == best["params"]
    assert tiny_search.ruled_ms(student) == pytest.approx(best["latency_ms"])
    for site, candidate in best["plan"].items():
        assert isinstance(student.get_submodule(site), Replacement) is (candidate != "keep")
    plan = json.loads((finished.best / "plan.json").read_text())
    assert plan["plan"] == best["plan"]
    # The run directory will do too.
    x = tiny.tiny_images(2)
    torch.testing.assert_close(mixerzoo.load(finished.path)(x), student(x), rtol=0, atol=0)


def test_the_model_card_and_the_closing_lines_say_the_figures(finished, place):
    best = finished.summary["best"]
    card = (finished.best / "README.md").read_text()
    for text in (f"{best['params']:,}", f"{best['loss']:.4g}", *best["plan"].values(), "labelled.npz"):
        assert text in card
    said = "\n".join(closing_lines(finished.summary, finished.path, "sqlite:///mlflow.db"))
    assert f"{best['latency_ms']:.2f} ms" in said
    assert str(finished.best) in said
    low, high = (f"{100 * bound:+.1f}" for bound in finished.summary["test"]["accuracy_interval"])
    for text in (card, said):
        assert f"a change of {low} to {high} points" in text


def mlflow_runs(place, path):
    """Return the parent run of a run directory, its children and the names of its artifacts."""
    with tiny_search.mlflow_client(place) as client:
        parent = client.get_run(json.loads((path / "run.json").read_text())["mlflow_run_id"])
        children = client.search_runs(
            [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
        )
        artifacts = {file.path for file in client.list_artifacts(parent.info.run_id)}
    return parent, list(children), artifacts


def test_mlflow_has_a_parent_and_one_child_an_evaluation(finished, place):
    summary = finished.summary
    parent, children, artifacts = mlflow_runs(place, finished.path)
    assert parent.info.status == "FINISHED"
    assert parent.data.params["budget"] == "60%"
    assert parent.data.params["teacher"] == "tiny"
    for name in ("loss", "latency_ms", "agreement", "accuracy", "params"):
        assert parent.data.metrics[name] == pytest.approx(summary["best"][name])
    assert parent.data.metrics["teacher_latency_ms"] == summary["teacher"]["latency_ms"]
    assert artifacts >= {"plan.json", "report.html", "report.png", "summary.json"}
    assert len(children) == summary["evaluations"]
    assert len({child.info.run_name for child in children}) == len(children)


def test_every_child_has_the_promised_params_and_metrics(finished, place):
    _, children, _ = mlflow_runs(place, finished.path)
    sites = [site.name for site in open_teacher("tiny").sites]
    letters = {spec.name: spec.letter for spec in get_registry().mixers}
    front = {json.dumps(row["plan"]) for row in finished.summary["pareto"]}
    for child in children:
        params, metrics = child.data.params, child.data.metrics
        plan = Plan.from_json({site: params[site] for site in sites})
        assert params["plan"] == plan.short_name(open_teacher("tiny").sites, letters)
        counts = {name: int(value) for name, value in params.items() if name.startswith("count.")}
        mixers = [candidate.mixer for _, candidate in plan.choices]
        assert counts == {f"count.{mixer}": mixers.count(mixer) for mixer in mixers}
        assert set(metrics) >= {
            "loss", "agreement", "accuracy", "latency_ms", "predicted_ms", "params", "on_frontier"
        }  # fmt: skip
        assert metrics["on_frontier"] in (0.0, 1.0)
        assert not metrics["on_frontier"] or json.dumps(plan.to_json()) in front
    assert sum(child.data.metrics["on_frontier"] for child in children) == len(finished.summary["pareto"])


def test_a_folder_of_unlabelled_images_will_do(start, place):
    folder = place / "pictures"
    folder.mkdir()
    for number, image in enumerate(tiny_search.pictures(80)):
        Image.fromarray(image).save(folder / f"{number:03}.png")
    result = start("unlabelled", data="pictures", trials=3)
    check_summary(result.summary, labelled=False)
    assert result.summary["met"]
    card = (result.best / "README.md").read_text()
    assert "| accuracy |  |  |" in card
    said = closing_lines(result.summary, result.path, "sqlite:///mlflow.db")
    assert not any(line.startswith("accuracy") for line in said)
    _, children, _ = mlflow_runs(place, result.path)
    assert children
    assert not any("accuracy" in child.data.metrics for child in children)


def test_the_fewest_images_there_may_be_are_enough(start, place):
    np.savez(place / "few.npz", x=tiny_search.pictures(MIN_IMAGES))
    result = start("few", data="few.npz", trials=2)
    check_summary(result.summary, labelled=False)
    assert result.summary["hypervolume"] > 0


def test_images_that_the_teacher_does_not_tell_apart_have_no_hypervolume(start, place):
    np.savez(place / "same.npz", x=tiny_search.pictures(1).repeat(40, axis=0))
    result = start("same", data="same.npz", trials=2, finetune_minutes=0)
    assert result.summary["met"]
    assert result.summary["hypervolume"] == 0


def test_labels_that_are_not_the_teachers_classes_are_left_out(start, place):
    x = tiny_search.pictures(80)
    np.savez(place / "others.npz", x=x, y=np.arange(80) % 14)
    result = start("others", data="others.npz", trials=2, finetune_minutes=0)
    check_summary(result.summary, labelled=False)


def test_a_model_object_instead_of_a_name(start, place):
    model = tiny.tiny_vit()
    model.requires_grad_(True).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = start("object", model=model, trials=3)
    assert result.summary["teacher"]["name"] == "VisionTransformer"
    assert result.summary["met"]
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    # Nobody can build this one by its name, so an instance of it has to be given.
    with pytest.raises(MixerzooError, match="pass an instance of it"):
        mixerzoo.load(result.best)
    student = mixerzoo.load(result.best, model=tiny.tiny_vit(seed=3))
    found = on_test_images(student, open_data(str(place / "labelled.npz")))
    assert found.loss == pytest.approx(result.summary["best"]["loss"], abs=1e-6)


def test_a_model_without_a_head_is_judged_by_its_embeddings(start, place):
    result = start("embedding", model="tiny_embedding", trials=3)
    check_summary(result.summary, labelled=False)
    best = result.summary["best"]
    assert best["agreement"] == pytest.approx(1 - best["loss"], abs=1e-6)
    student = mixerzoo.load(result.best)
    assert student(tiny.tiny_images(2)).shape == (2, 24)
    found = on_test_images(student, open_data(str(place / "labelled.npz")), name="tiny_embedding")
    assert found.loss == pytest.approx(best["loss"], abs=1e-6)


class Neighbours(nn.Module):
    """Adds the token before to every token, then a linear layer."""

    def __init__(self, dim):
        super().__init__()
        self.out = nn.Linear(dim, dim)

    def forward(self, x):
        return self.out(x + x.roll(1, 1))


class Raises(Neighbours):
    def forward(self, x):
        raise RuntimeError("out of ideas")


class Nan(Neighbours):
    def forward(self, x):
        return super().forward(x) * float("nan")


class Fragile(Neighbours):
    """Can be timed and distilled, but is NaN on the images that candidates are scored on."""

    def forward(self, x):
        return super().forward(x) * (float("nan") if len(x) == SCORED else 1.0)


class WrongShape(Neighbours):
    def forward(self, x):
        return super().forward(x)[:, :1]


@contextmanager
def plugin_with(module, *, name="mine", readout="out"):
    class Plugin:
        @hookimpl
        def register_mixers(self, register):
            register(
                MixerSpec(
                    name=name,
                    build=lambda dim: module(dim),
                    summary="for this test",
                    caps=Caps(any_length=True),
                    readout=readout,
                )
            )

    with temporary_plugin(Plugin(), name="mixerzoo-mine"):
        yield


def test_a_third_party_mixer_is_used(start):
    with plugin_with(Neighbours):
        result = start("third_party", mixers=("mine", "none"), budget="75%", trials=5)
        best = result.summary["best"]
        assert "mine@1" in best["plan"].values()
        plan = json.loads((result.best / "plan.json").read_text())
        assert plan["plugins"]["mine"] == "mixerzoo-mine 0"
        record = json.loads((result.path / "run.json").read_text())
        assert record["identity"]["plugins"]["mixerzoo-mine"] == "0"
        assert isinstance(
            next(m for m in mixerzoo.load(result.best).modules() if isinstance(m, Neighbours)), Neighbours
        )
    with pytest.raises(MixerzooError, match=r"needs mixer 'mine' of mixerzoo-mine 0; install"):
        mixerzoo.load(result.best)


@pytest.mark.parametrize(
    ("module", "reason"),
    [(Raises, "out of ideas"), (Nan, "not that of its readout"), (WrongShape, "maps")],
)
def test_a_mixer_that_fails_is_recorded_and_costs_nothing_else(start, module, reason):
    with plugin_with(module):
        result = start(f"failing_{module.__name__}", mixers=(*tiny_search.MIXERS, "mine"), trials=3)
    check_summary(result.summary)
    assert result.summary["met"]
    index = index_of(result.path)
    assert reason in json.dumps(index) + (result.path / "latency.json").read_text()
    assert all(entry["failed"] for entry in index.values() if entry["candidate"].startswith("mine"))
    assert all(not entry["failed"] for entry in index.values() if not entry["candidate"].startswith("mine"))
    plans = [row["plan"] for row in result.summary["pareto"]]
    assert not any(candidate.startswith("mine") for plan in plans for candidate in plan.values())


def test_a_mixer_that_is_nan_on_other_images_is_in_no_plan(start, place):
    parts = ImageParts.of(open_data(str(place / "labelled.npz")).splits, tiny_search.FAST["images"])
    assert len(parts.scores) == SCORED
    with plugin_with(Fragile):
        result = start("fragile", mixers=("none", "static", "mine"), trials=3)
    check_summary(result.summary)
    assert result.summary["met"]
    index = index_of(result.path)
    mine = {key for key, entry in index.items() if entry["candidate"] == "mine@1"}
    assert not any(index[key]["failed"] for key in mine)
    scores = json.loads((result.path / "scores.json").read_text(), parse_constant=lambda word: word)
    assert any(scores.get(key, 0) in (None, "NaN") for key in mine)  # it was scored, and found wanting
    for file in ("latency_check", "finalists"):
        assert "mine@1" not in (result.path / f"{file}.json").read_text()


def test_a_damaged_library_file_is_found_and_only_that_candidate_is_made_again(start, finished):
    folder = finished.path / "library"
    times = {file.name: file.stat().st_mtime_ns for file in folder.glob("*.safetensors")}
    index = index_of(finished.path)
    key = sorted(key for key, entry in index.items() if entry["params"] and not entry["steps"])[0]
    damaged = folder / f"{key}.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    result = start("finished")
    again = {file.name: file.stat().st_mtime_ns for file in folder.glob("*.safetensors")}
    assert {name for name in again if again[name] != times.get(name)} == {damaged.name}
    content[-1] ^= 1
    assert damaged.read_bytes() == bytes(content)  # same seed, same candidate
    assert result.summary["best"] == finished.summary["best"]


def test_a_budget_above_the_teachers_latency_needs_nothing_replaced(start):
    result = start("generous", budget_ms=10_000, trials=3)
    check_summary(result.summary)
    assert result.summary["met"]
    assert result.summary["best"]["agreement"] == 1
    mixerzoo.load(result.best)


def test_a_budget_below_the_fastest_plan_is_refused_with_that_plan(start, place):
    with pytest.raises(BudgetOutOfReachError) as raised:
        start("impossible", budget="5%")
    said = str(raised.value)
    # Nothing at any site: what is left is outside the sites.
    assert "N2/N2" in said
    assert "0.68 ms" in said
    assert "outside the sites" in said
    parent, _, _ = mlflow_runs(place, place / "runs" / "impossible")
    assert parent.info.status == "FAILED"
    # Where a site has no faster candidate, that is what bounds it.
    with pytest.raises(BudgetOutOfReachError, match="2 of the 4 sites have no candidate that is faster"):
        start("bounded", budget="20%", mixers=("static",))


def slower_when_final(factor):
    """Latency by the rule, but all longer measurements of students come out slower."""

    def time(self, students, *, rounds=None, on_round=lambda done: None):
        found = tiny_search.ruled_time(self, students, rounds=rounds, on_round=on_round)
        if rounds != evaluate.FINAL:
            return found
        return {
            name: timing
            if name == "teacher"
            else type(timing)(**vars(timing) | {"ratio": factor * timing.ratio})
            for name, timing in found.items()
        }

    return time


def test_where_the_best_misses_the_budget_when_measured_again_a_faster_one_is_taken(start, monkeypatch):
    monkeypatch.setattr(Stopwatch, "time", slower_when_final(1.06))
    result = start("slower", trials=12)
    assert result.summary["met"]
    assert result.summary["best"]["latency_ms"] <= result.summary["budget_ms"]
    check_summary(result.summary)


def test_where_all_miss_the_budget_when_measured_again_it_is_not_called_met(start, monkeypatch):
    monkeypatch.setattr(Stopwatch, "time", slower_when_final(9.0))
    result = start("missed", trials=4)
    check_summary(result.summary)
    assert not result.summary["met"]
    assert not result.best.exists()
    assert (result.path / "report.html").exists()
    said = closing_lines(result.summary, result.path, "sqlite:///mlflow.db")
    assert said[0].startswith("no plan met")


def test_one_of_both_budgets_has_to_be_given(place):
    for budgets in ({}, {"budget": "60%", "budget_ms": 5}):
        with pytest.raises(MixerzooError, match="give one of budget_ms"):
            search("tiny", place / "labelled.npz", **budgets)
