"""`mixerzoo study sparsity`: what it measures is so, a mishap or a kill costs one group, and p-values are honest."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_search
import torch
from click.testing import CliRunner
from scipy.stats import permutation_test, spearmanr
from torch import nn

from mixerzoo import MixerSpec, hookimpl
from mixerzoo.capture import capture
from mixerzoo.cli import main
from mixerzoo.data import image_batches
from mixerzoo.opening import open_data, open_teacher
from mixerzoo.plan import Candidate
from mixerzoo.registry import temporary_plugin
from mixerzoo.score import Judge
from mixerzoo.statistics import ATTENTION_STATISTICS
from mixerzoo_search.sparsity import group_student
from mixerzoo_search.sparsity.group_student import GroupStudents
from mixerzoo_search.sparsity.relation import _orders, closest, relate, verdict
from mixerzoo_search.sparsity.settings import StudySettings, label_of, windows

DEPTH = 6
FAST = ["--model", "tiny_deep", "--steps", "2", "--images", "40", "--data", "data.npz"]
LABELS = [f"{first}-{first + 1}" for first in range(DEPTH - 1)]
PNG = b"\x89PNG\r\n"


class Stubborn(nn.Module):
    """Can be built and does not work."""

    def __init__(self, dim):
        super().__init__()
        self.readout = nn.Linear(dim, dim)

    def forward(self, x):
        raise ValueError("not\ntoday")


class DeepPlugin:
    """A teacher of six attention layers, and a mixer that never works."""

    @hookimpl
    def register_hosts(self, register):
        class Host(tiny_search.TinyHost):
            name = "tiny_deep"

            def model_names(self):
                return ("tiny_deep", "tiny_blind")

            def load(self, name, checkpoint):
                return tiny.tiny_vit(depth=DEPTH, num_classes=10 if name == "tiny_deep" else 0)

        register(Host())

    @hookimpl
    def register_mixers(self, register):
        register(MixerSpec(name="stubborn", build=Stubborn, readout="readout", summary="never works"))


@pytest.fixture(scope="module", autouse=True)
def _world():
    with temporary_plugin(DeepPlugin(), name="deep"):
        yield


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_search.write_npz(tmp_path / "data.npz")
    return tmp_path


def study(*words):
    return CliRunner().invoke(main, ["study", "sparsity", *FAST, *words], catch_exceptions=False)


def refused(result, *texts):
    """Exit code 2, and one line on standard error that says all of `texts`."""
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("mixerzoo: ")
    assert result.stderr.count("\n") == 1
    for text in texts:
        assert text in result.stderr


def written(folder):
    """Return the result of a study, which must be JSON that anything reads, beside its picture."""
    content = json.loads((folder / "sparsity.json").read_text())
    assert json.dumps(content, allow_nan=False)
    assert (folder / "sparsity.png").read_bytes().startswith(PNG)
    return content


def figures(content):
    """Return mixer -> layers -> what was measured, without how long it took."""
    return {
        mixer: {
            group["layers"]: {name: group.get(name) for name in ("solved", "trained", "steps", "failed")}
            for group in part["groups"]
        }
        for mixer, part in content["mixers"].items()
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished study of two mixers: its folder, its result, and what was printed."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        tiny_search.write_npz(folder / "data.npz")
        told = study("--mixer", "none, linear_attention", "--group-size", "2")
    assert told.exit_code == 0, told.stderr
    path = folder / "studies" / "tiny_deep-sparsity"
    return path, written(path), told


def test_every_group_of_every_mixer_is_replaced(finished):
    path, content, _ = finished
    assert list(content["mixers"]) == ["none@1", "linear_attention@1"]
    for part in content["mixers"].values():
        assert [group["layers"] for group in part["groups"]] == LABELS
        assert [group["sites"] for group in part["groups"]] == [
            [f"blocks.{at}.attn", f"blocks.{at + 1}.attn"] for at in range(DEPTH - 1)
        ]
    assert len(list((path / "groups").iterdir())) == 2 * len(LABELS)
    assert content["settings"]["group_size"] == 2
    assert {"threads", "versions", "python"} <= set(content["environment"])


def test_the_figures_are_those_of_the_teacher_with_the_group_replaced(finished):
    path, content, _ = finished
    teacher, data = open_teacher("tiny_deep"), open_data(str(path.parent.parent / "data.npz"))
    test = data.splits.test
    judge = Judge(teacher, image_batches(data, test, teacher.image), data.labels[list(test)])

    class Nothing(nn.Module):
        def forward(self, x, **_):
            return torch.zeros_like(x)

    for group in content["mixers"]["none@1"]["groups"]:
        wanted = judge.evaluate_modules({site: Nothing() for site in group["sites"]})
        assert group["trained"] == group["solved"]
        assert group["trained"]["loss"] == pytest.approx(wanted.loss, abs=1e-6)
        assert group["trained"]["agreement"] == wanted.agreement
        assert group["trained"]["accuracy"] == wanted.accuracy
    assert content["teacher"]["accuracy"] == judge.teacher_evaluation().accuracy
    assert content["settings"]["test_images"] == len(test)


def test_a_groups_statistics_are_the_means_of_its_layers(finished):
    path, content, _ = finished
    teacher, data = open_teacher("tiny_deep"), open_data(str(path.parent.parent / "data.npz"))
    indices = data.splits.calibration[:40]
    found = capture(teacher, image_batches(data, indices, teacher.image), len(indices)).statistics
    for group in content["mixers"]["none@1"]["groups"]:
        for name in ATTENTION_STATISTICS:
            mean = sum(found[site][name] for site in group["sites"]) / 2
            assert group["statistics"][name] == pytest.approx(mean, abs=1e-5)


def test_the_correlation_is_that_of_the_table(finished):
    _, content, _ = finished
    part = content["mixers"]["linear_attention@1"]
    losses = [group["trained"]["loss"] for group in part["groups"]]
    for relation in part["relations"]:
        if relation["statistic"] == "depth":
            values = range(len(losses))
        else:
            values = [group["statistics"][relation["statistic"]] for group in part["groups"]]
        wanted = spearmanr(values, losses)
        assert relation["spearman"] == pytest.approx(wanted.statistic)
        assert relation["p_groups"] == pytest.approx(wanted.pvalue)
        assert relation["groups"] == len(LABELS)
    assert [relation["statistic"] for relation in part["relations"]] == [*ATTENTION_STATISTICS, "depth"]


def test_the_tables_and_the_verdict_are_printed(finished):
    _, content, told = finished
    for text in (*LABELS, "p, layers", "accuracy drop", "sparsity.png", "sparsity.json"):
        assert text in told.stdout
    for part in content["mixers"].values():
        assert part["verdict"] in told.stdout
        assert part["closest"] in told.stdout
    assert "\x1b" not in told.stdout
    assert told.stderr == ""


def test_a_finished_study_is_told_again_without_work(finished, monkeypatch):
    path, content, _ = finished
    monkeypatch.chdir(path.parent.parent)
    monkeypatch.setattr(group_student, "distill", None)
    again = study("--mixer", "none, linear_attention", "--group-size", "2", "--json")
    assert again.exit_code == 0, again.stderr
    assert figures(json.loads(again.stdout)) == figures(content)
    assert written(path) == json.loads(again.stdout)


def test_it_goes_on_where_it_was_killed(finished, here, monkeypatch):
    words = ("--mixer", "linear_attention", "--group-size", "2", "--out", "mine")
    train, calls = GroupStudents.train, []

    def killed(self, student, sites, **options):
        calls.append(sites[0].name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return train(self, student, sites, **options)

    monkeypatch.setattr(GroupStudents, "train", killed)
    assert study(*words).exit_code == 1
    assert not (here / "mine" / "sparsity.json").exists()
    kept = {path.name: path.read_bytes() for path in (here / "mine" / "groups").iterdir()}
    assert len(kept) == 2
    told = study(*words)
    assert told.exit_code == 0, told.stderr
    assert len(calls) == 3 + 3
    for name, content in kept.items():
        assert (here / "mine" / "groups" / name).read_bytes() == content
    (found,) = figures(written(here / "mine")).values()
    assert found == figures(finished[1])["linear_attention@1"]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--steps", "3"], "steps is 2 there, 3 here"),
        (["--seed", "1"], "seed is 0 there, 1 here"),
        (["--group-size", "1"], "group_size is 2 there, 1 here"),
        (["--mixer", "none"], "mixers is"),
        (["--stride", "2"], "stride is 1 there, 2 here"),
    ],
)
def test_a_folder_of_another_study_is_left_alone(finished, monkeypatch, words, text):
    path, content, _ = finished
    monkeypatch.chdir(path.parent.parent)
    base = ["--mixer", "none, linear_attention", "--group-size", "2"]
    refused(study(*base, *words), str(Path("studies/tiny_deep-sparsity")), text, "another --out")
    assert written(path)["settings"] == content["settings"]


BAD = {
    "unknown mixer": (["--mixer", "liner"], ["unknown mixer 'liner'", "did you mean 'linear'?"]),
    "mixer for mlp sites": (["--mixer", "mlp_slice"], ["--mixer mlp_slice", "attention"]),
    "no mixer": (["--mixer", " , "], ["--mixer", "name one or more"]),
    "twice": (["--mixer", "none,none"], ["--mixer 'none,none'", "each once"]),
    "width": (["--width", "0.3"], ["--width 0.3", "multihead_lstm", "0.25"]),
    "group size": (["--group-size", "7"], ["--group-size 7", "6 attention layers"]),
    "no group": (["--group-size", "0"], ["--group-size 0", "at least 1"]),
    "stride": (["--stride", "0"], ["--stride 0", "at least 1"]),
    "steps": (["--steps", "-1"], ["--steps -1", "at least 0"]),
    "images": (["--images", "3"], ["--images 3", "at least 20"]),
    "seed": (["--seed", "-1"], ["--seed -1", "at least 0"]),
    "model": (["--model", "tiny_depe"], ["unknown model 'tiny_depe'"]),
    "data": (["--data", "nowhere"], ["data 'nowhere'"]),
    "out": (["--out", "data.npz"], ["'data.npz' holds something else", "--out"]),
}


@pytest.mark.parametrize(("words", "texts"), BAD.values(), ids=BAD)
def test_a_mistake_costs_one_line_and_leaves_nothing(here, words, texts):
    refused(study(*words), *texts)
    assert [path.name for path in here.iterdir()] == ["data.npz"]


def test_a_mixer_that_fails_is_told_and_costs_no_other(here):
    told = study("--mixer", "stubborn,none", "--group-size", "1")
    assert told.exit_code == 0, told.stderr
    content = written(here / "studies" / "tiny_deep-sparsity")
    bad, good = content["mixers"]["stubborn@1"], content["mixers"]["none@1"]
    assert all("ValueError: not today" in group["failed"] for group in bad["groups"])
    assert "no group could be replaced" in bad["verdict"]
    assert all(not group["failed"] for group in good["groups"])
    assert "failed: stubborn@1 at blocks.0.attn" in told.stdout


def test_without_labels_or_classes_there_is_no_accuracy(here):
    tiny_search.write_npz(here / "data.npz", labels=False)
    told = study("--mixer", "none", "--out", "unlabelled")
    assert told.exit_code == 0, told.stderr
    assert "accuracy" not in told.stdout
    assert written(here / "unlabelled")["teacher"]["accuracy"] is None
    told = study("--mixer", "none", "--model", "tiny_blind", "--out", "embedding")
    assert told.exit_code == 0, told.stderr
    assert all(
        group["trained"]["loss"] > 0 for group in written(here / "embedding")["mixers"]["none@1"]["groups"]
    )


# Training


def students(*, seed=0, depth=4):
    """Return a teacher, its attention layers, and what makes students of it."""
    teacher = tiny.tiny_teacher(depth=depth)
    batches = tiny.tiny_batches(40)
    made = GroupStudents(teacher, capture(teacher, batches, 40), batches, seed=seed)
    return teacher, [site for site in teacher.sites if site.kind == "attention"], made


def test_steps_bring_the_student_nearer_and_leave_all_else_alone():
    teacher, layers, made = students()
    before = {name: tensor.clone() for name, tensor in teacher.model.state_dict().items()}
    group = layers[1:3]
    candidate = Candidate("linear_attention")
    student = made.solved(candidate, group)
    judge = Judge(teacher, tiny.tiny_batches(40), None)
    solved = judge.evaluate(student).loss
    kept = {n: t.clone() for n, t in student.state_dict().items() if ".mixer." not in n}
    assert made.train(student, group, steps=30) == 30
    assert judge.evaluate(student).loss < solved
    after = student.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in kept.items())
    assert all(torch.equal(teacher.model.state_dict()[name], tensor) for name, tensor in before.items())
    assert not any(parameter.requires_grad for parameter in student.parameters())


def test_the_same_seed_gives_the_same_student_and_another_one_does_not():
    losses, candidate = [], Candidate("multihead_lstm")
    for seed in (0, 0, 1):
        teacher, layers, made = students(seed=seed)
        student = made.solved(candidate, layers[:1])
        made.train(student, layers[:1], steps=3)
        losses.append(Judge(teacher, tiny.tiny_batches(40), None).evaluate(student).loss)
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("lr", [1e3, 1e30])
def test_steps_that_only_do_harm_are_undone(monkeypatch, lr):
    monkeypatch.setattr(group_student, "LR", lr)
    _, layers, made = students()
    candidate = Candidate("linear_attention")
    student = made.solved(candidate, layers[:2])
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    made.train(student, layers[:2], steps=4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())


# Groups


@pytest.mark.parametrize(
    ("size", "stride", "labels"),
    [
        (1, 1, ["0", "1", "2", "3", "4", "5"]),
        (2, 1, LABELS),
        (2, 2, ["0-1", "2-3", "4-5"]),
        (4, 4, ["0-3", "2-5"]),  # the last layers are in a group in any case
        (6, 1, ["0-5"]),
    ],
)
def test_groups_cover_all_layers(size, stride, labels):
    layers = [site for site in tiny.tiny_teacher(depth=DEPTH).sites if site.kind == "attention"]
    groups = windows(layers, size, stride)
    assert [label_of(group, layers) for group in groups] == labels
    assert {site.name for group in groups for site in group} == {site.name for site in layers}


@pytest.mark.parametrize(("layers", "size"), [(1, 1), (2, 1), (8, 2), (12, 2), (24, 5), (32, 6)])
def test_by_default_a_group_is_about_a_fifth_of_the_layers(layers, size):
    assert StudySettings(model="m", data="d").size(layers) == size


# Relations


def layers_of(values, name="gini"):
    return [dict.fromkeys(ATTENTION_STATISTICS, math.nan) | {name: value} for value in values]


def singles(count):
    return [[at] for at in range(count)]


def only(relations):
    """Return the one statistic that the layers have; the other is depth."""
    found, depth = relations
    assert depth.statistic == "depth"
    return found


def test_for_single_layers_the_p_value_is_that_of_a_permutation_test():
    values, drops = [0.9, 0.5, 0.7, 0.3, 0.1, 0.4], [1.0, 3.0, 2.5, 2.0, 5.0, 4.0]
    found = only(relate(singles(6), layers_of(values), drops))
    wanted = permutation_test(
        (values,), lambda x: spearmanr(x, drops).statistic, permutation_type="pairings", n_resamples=np.inf
    )
    assert found.spearman == pytest.approx(wanted.statistic)
    assert found.p_layers == pytest.approx(wanted.pvalue)
    assert found.p_groups == pytest.approx(spearmanr(values, drops).pvalue)


def test_overlapping_groups_do_not_make_it_look_surer_than_it_is():
    """Noise: drops of groups are means over layers too, so that neighbours go together by themselves."""
    generator = np.random.default_rng(0)
    groups = [[at, at + 1, at + 2] for at in range(5)]
    sure = {"p_groups": 0, "p_layers": 0}
    for _ in range(200):
        layers, harm = generator.random(7), generator.random(7)
        found = only(relate(groups, layers_of(layers), [harm[group].mean() for group in groups]))
        for name in sure:
            sure[name] += getattr(found, name) < 0.05
    assert sure["p_layers"] <= 20
    assert sure["p_groups"] > sure["p_layers"]


@pytest.mark.parametrize(("name", "sign"), [("gini", -1), ("entropy", 1), ("sink", -1), ("tokens_90", 1)])
def test_the_direction_is_that_of_sparser(name, sign):
    """Drops that grow with `sign` times the statistic: sparser layers are easier."""
    values = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    easier = only(relate(singles(6), layers_of(values, name), [sign * value for value in values]))
    harder = only(relate(singles(6), layers_of(values, name), [-sign * value for value in values]))
    assert (easier.toward_sparser, harder.toward_sparser) == (pytest.approx(-1), pytest.approx(1))
    assert (easier.sparser_is_easier, harder.sparser_is_easier) == (True, False)
    assert easier.spearman == pytest.approx(sign)


def test_more_layers_than_can_be_put_in_every_order():
    values = np.linspace(0, 1, 24)
    found = only(relate(singles(24), layers_of(values), values**2))
    assert found.spearman == pytest.approx(1)
    assert 0 < found.p_layers < 0.001
    assert found == only(relate(singles(24), layers_of(values), values**2))


VERDICTS = {
    "sparser groups lost less (Spearman -1.00 over 6 groups, p 0.003)": [6, 5, 4, 3, 2, 1],
    "sparser groups lost more (Spearman +1.00 over 6 groups, p 0.003)": [1, 2, 3, 4, 5, 6],
    "no clear relation (Spearman +0.03 over 6 groups, p 1.00)": [3, 5, 1, 6, 2, 4],
    "nothing to relate": [2, 2, 2, 2, 2, 2],
    "4 groups are too few to tell": [4, 3, 2, 1],
    "0 groups are too few to tell": [],
}


@pytest.mark.parametrize(("text", "drops"), VERDICTS.items())
def test_the_verdict_is_frank(text, drops):
    layers = layers_of([0.1, 0.2, 0.3, 0.4, 0.5, 0.6][: max(len(drops), 1)])
    assert text in verdict(relate(singles(len(drops)), layers, drops))


def test_the_closest_statistic_is_told_with_how_many_were_tried():
    layers = [
        {"gini": g, "entropy": e, "contribution": c}
        for g, e, c in zip([5, 1, 3, 2, 4, 6], [1, 2, 3, 4, 5, 6], [6, 4, 5, 3, 2, 1], strict=True)
    ]
    text = closest(relate(singles(6), layers, [1, 3, 2, 4, 5, 6]))
    assert text.startswith("closest of 3: contribution -1.00, p 0.003")
    assert "depth alone +0.94" in text
    assert closest(relate(singles(6), layers, [1] * 6)) == ""


def test_orders_are_all_orders_where_these_are_few():
    assert set(map(tuple, _orders(4))) == set(itertools.permutations(range(4)))
