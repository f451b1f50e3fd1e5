"""FAR's recipe: the losses are the published ones, what shall stay frozen does, and a stopped run goes on."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_search
import torch
from click.testing import CliRunner
from torch.nn import functional as F

import mixerzoo
from mixerzoo.classes import fitting_labels
from mixerzoo.cli import main
from mixerzoo.data import ImageConfig, image_batches, open_npz
from mixerzoo.denormals import tiny_as_zero
from mixerzoo.errors import MixerzooError
from mixerzoo.hosts import Replacement, assemble
from mixerzoo.locks import held, lock_of
from mixerzoo.opening import open_teacher
from mixerzoo.plan import Candidate
from mixerzoo.registry import get_registry, temporary_plugin
from mixerzoo_search.far import run as far_run
from mixerzoo_search.far import training as far_training
from mixerzoo_search.far.images import TrainingImages, seeded
from mixerzoo_search.far.student import (
    HEADS,
    OUTPUTS,
    Tap,
    attention_sites,
    compared,
    set_trainable,
    start_student,
)
from mixerzoo_search.far.token_correlation import measure, pairs, pearson, token_similarity
from mixerzoo_search.far.training import Pace, Standing, Trainer, learning_rate

LSTM = Candidate("multihead_lstm")
SCRIPT = Path(__file__).parent / "tiny_search.py"
FILES = {"run.json", "far.json", "far.png", "best"}
BASE = ("--recipe", "far", "--model", "tiny", "--data", "data.npz", "--batch-size", "8", "--out", "run")


@pytest.fixture(scope="module", autouse=True)
def _tiny_world():
    with pytest.MonkeyPatch.context() as patch, temporary_plugin(tiny_search.TinyPlugin(), name="tiny"):
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with data and a finished run of six epochs."""
    folder = tmp_path_factory.mktemp("far")
    tiny_search.write_npz(folder / "data.npz")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        told = run("--epochs", "6", "--lr", "0.005")
        (folder / "printed.txt").write_text(told.stdout)
    return folder


@pytest.fixture
def here(place, tmp_path, monkeypatch):
    """A folder with the data alone."""
    shutil.copy(place / "data.npz", tmp_path / "data.npz")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words, code=0):
    told = CliRunner().invoke(main, ["distill", *BASE, *words], catch_exceptions=False)
    assert told.exit_code == code, told.stderr
    return told


def result_of(folder):
    return json.loads((folder / "run" / "far.json").read_text())


def without_times(result):
    """Return a result without what differs from run to run."""
    curve = [{name: value for name, value in row.items() if name != "seconds"} for row in result["curve"]]
    return result | {"curve": curve}


def make(mixer=LSTM, *, seed=0, **options):
    """Return a teacher, a student of it as inherited, and what is compared."""
    teacher = tiny.tiny_teacher(**options)
    sites = attention_sites(teacher, mixer)
    student = start_student(teacher, mixer, sites, tiny.tiny_batches(16), 16, seed=seed)
    return teacher, student, compared(teacher, student, sites, get_registry().mixers.get(mixer.mixer))


def trainer(teacher, student, kept, *, augment="none", labels=True, lr=1e-3, count=48):
    """Return a trainer on the pictures of `tiny_search`."""
    arrays = {"x": tiny_search.pictures(count)} | ({"y": np.arange(count) % 10} if labels else {})
    np.savez("trained.npz", **arrays)
    data = open_npz("trained.npz")
    indices = data.splits.calibration
    images = TrainingImages(
        data,
        indices,
        teacher.image,
        fitting_labels(teacher, data, indices),
        classes=10,
        augment=augment,
    )
    return Trainer(teacher, student, kept, images, batch_size=8, lr=lr, seed=0)


# -- token similarity --


def test_token_similarity_is_the_cosine_between_tokens():
    y = torch.tensor([[3.0, 4.0], [6.0, 8.0], [-4.0, 3.0], [-3.0, -4.0]])
    wanted = torch.tensor([[1, 1, 0, -1], [1, 1, 0, -1], [0, 0, 1, 0], [-1, -1, 0, 1]], dtype=torch.float)
    torch.testing.assert_close(token_similarity(y), wanted)
    torch.testing.assert_close(token_similarity(torch.stack([y, 5 * y])), wanted.expand(2, 4, 4))
    assert pairs(wanted).tolist() == [1, 0, -1, 0, -1, 0]


def test_pearson_is_numpys_and_undefined_for_a_constant():
    one, other = torch.randn(3, 50), torch.randn(3, 50)
    wanted = [np.corrcoef(a, b)[0, 1] for a, b in zip(one.numpy(), other.numpy(), strict=True)]
    np.testing.assert_allclose(pearson(one, other), wanted, atol=1e-6)
    assert pearson(one, -2 * one + 1).tolist() == pytest.approx([-1, -1, -1])
    assert pearson(one, torch.full((3, 50), 0.7)).isnan().all()


def test_the_teacher_keeps_its_own_token_correlation_and_another_mixing_does_not():
    teacher = tiny.tiny_teacher()
    sites = attention_sites(teacher, LSTM)
    same = measure(teacher, assemble(teacher.model, {}), sites, tiny.tiny_batches(16), None)
    assert same.student.agreement == 1
    for site in same.sites.values():
        assert (site.mean, site.per_image) == pytest.approx((1, 1))
        torch.testing.assert_close(site.teacher, site.student)
    teacher, student, _ = make()
    other = measure(teacher, student, sites, tiny.tiny_batches(16), None)
    for name, site in other.sites.items():
        assert site.mean < 0.9
        assert site.per_image < 0.9
        torch.testing.assert_close(site.teacher, same.sites[name].teacher)


def test_it_is_the_mean_over_images_however_they_are_batched():
    teacher, student, _ = make()
    sites = attention_sites(teacher, LSTM)
    images = tiny.tiny_images(12)
    labels = torch.arange(12) % 10
    one, other = (measure(teacher, student, sites, images.split(size), labels) for size in (12, 5))
    assert one.student.accuracy == other.student.accuracy
    for name in one.sites:
        assert one.sites[name].mean == pytest.approx(other.sites[name].mean, abs=1e-5)
        assert one.sites[name].per_image == pytest.approx(other.sites[name].per_image, abs=1e-5)
        with Tap({name: student.get_submodule(name)}, inputs=False) as tap, torch.no_grad():
            student(images)
        wanted = torch.stack([F.cosine_similarity(y[:, None], y[None], dim=-1) for y in tap.seen[name]])
        wanted = wanted.mean(0)
        torch.testing.assert_close(one.sites[name].student, wanted, atol=1e-5, rtol=1e-5)


# -- the student, and what is compared --


def test_all_attention_is_replaced_and_nothing_else():
    teacher, student, _ = make()
    replaced = [name for name, module in student.named_modules() if isinstance(module, Replacement)]
    assert replaced == [site.name for site in teacher.sites if site.kind == "attention"]
    shared = {id(p) for p in teacher.model.parameters()} & {id(p) for p in student.parameters()}
    assert shared == set()
    weights = teacher.model.state_dict()
    for name, tensor in student.state_dict().items():
        if ".mixer." not in name:
            assert torch.equal(tensor, weights[name])


def test_the_lstm_is_compared_before_the_projection_which_is_the_teachers_and_frozen():
    teacher, student, kept = make()
    assert (kept.what, kept.inputs) == (HEADS, True)
    trained = set_trainable(student, 1, kept)
    names = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    assert len(trained) == len(names) > 0
    assert all(".mixer." in name and "post_proj" not in name for name in names)
    every = {name for name, _ in student.named_parameters() if ".mixer." in name and "post_proj" not in name}
    assert names == every
    assert len(set_trainable(student, 2, kept)) == len(list(student.parameters()))
    for name in kept.student:
        assert torch.equal(kept.student[name].weight, teacher.model.get_submodule(name).proj.weight)


def test_a_projection_without_a_bias_is_recognised_too():
    _, _, kept = make(proj_bias=False)
    assert kept.what == HEADS


def test_another_mixer_is_compared_by_its_output_and_trains_whole():
    _, student, kept = make(Candidate("linear_attention"))
    assert (kept.what, kept.inputs, len(kept.frozen)) == (OUTPUTS, False, 0)
    set_trainable(student, 1, kept)
    for name, parameter in student.named_parameters():
        assert parameter.requires_grad is (".mixer." in name)


def test_the_start_follows_from_the_seed():
    one, same, other = (make(seed=seed)[1].state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


# -- the losses --


def test_the_losses_are_cross_entropy_and_token_cosines_of_head_outputs(here):
    teacher, student, kept = make()
    images, target = tiny.tiny_images(6), F.one_hot(torch.arange(6), 10).float()
    losses = trainer(teacher, student, kept).losses(images, target, stage=1)
    wanted = 0.0
    inputs = {}
    handles = [
        model.get_submodule(site).register_forward_pre_hook(
            lambda _m, args, key=(which, site): inputs.__setitem__(key, args[0])
        )
        for which, model in (("teacher", teacher.model), ("student", student))
        for site in kept.student
    ]
    with torch.no_grad():
        teacher.model(images)
        logits = student(images)
        for handle in handles:
            handle.remove()
        for site in kept.student:
            attention = teacher.model.get_submodule(site)
            x = inputs["teacher", site]
            v = attention.qkv(x).chunk(3, dim=-1)[2].unflatten(-1, (3, -1)).transpose(1, 2)
            heads = (teacher.host.attention_maps(attention, x) @ v).transpose(1, 2).flatten(2)
            mixer = student.get_submodule(site).mixer
            x = inputs["student", site]
            mine = torch.cat(
                [
                    proj(lstm(part)[0])
                    for lstm, proj, part in zip(
                        mixer.lstm, mixer.head_proj, mixer.pre_proj(x).chunk(3, -1), strict=True
                    )
                ],
                dim=-1,
            )
            dot = (heads * mine).sum(1)
            wanted += 1 - (dot / (heads.norm(dim=1) * mine.norm(dim=1))).mean()
        task = -(target * logits.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(losses["tokens"].detach(), wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(losses["task"].detach(), task)
    assert set(trainer(teacher, student, kept).losses(images, target, stage=2)) == {"task"}


def test_the_student_feeds_itself_so_that_later_sites_teach_earlier_ones(here):
    teacher, student, kept = make()
    set_trainable(student, 1, kept)
    last = list(kept.student)[-1]
    with (
        Tap(kept.teacher, inputs=True) as wanted,
        Tap(kept.student, inputs=True) as given,
    ):
        teacher.model(tiny.tiny_images(4))
        student(tiny.tiny_images(4))
    far_training.token_cosine(given.seen[last], wanted.seen[last]).backward()
    first = student.get_submodule("blocks.0.attn.mixer.pre_proj")
    assert float(first.weight.grad.abs().sum()) > 0


@pytest.mark.parametrize("classes", [10, 0])
def test_without_labels_the_teacher_is_the_task(here, classes):
    teacher, student, kept = make(num_classes=classes)
    made = trainer(teacher, student, kept, labels=False)
    images, target = made.images.batch(range(8))
    assert target is None
    found = made.losses(images, target, stage=2)["task"]
    with torch.no_grad():
        out, wanted = student(images), teacher.model(images)
    if classes:
        expected = (wanted.softmax(-1) * (wanted.log_softmax(-1) - out.log_softmax(-1))).sum(-1).mean()
    else:
        expected = 1 - F.cosine_similarity(out, wanted).mean()
    torch.testing.assert_close(found.detach(), expected, atol=1e-5, rtol=1e-4)


def test_stage_1_trains_the_mixers_and_stage_2_everything(here):
    teacher, student, kept = make()
    made = trainer(teacher, student, kept)
    frozen = {name for name, p in student.named_parameters() if ".mixer." not in name or p in kept.frozen}
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    optimizer = made.optimizer(1)
    row = made.epoch(Standing(), optimizer, Pace(epochs=2, seconds=0), lambda share: None)
    after = student.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(before) - frozen
    assert row["loss"] == pytest.approx(row["task"] + row["tokens"], abs=1e-5)
    row = made.epoch(Standing(stage=2), made.optimizer(2), Pace(epochs=1, seconds=0), lambda share: None)
    changed = {name for name in before if not torch.equal(before[name], student.state_dict()[name])}
    assert changed == set(before)
    assert "tokens" not in row


def test_vectors_and_position_embeddings_do_not_decay(here):
    teacher, student, kept = make()
    names = {parameter: name for name, parameter in student.named_parameters()}
    groups = trainer(teacher, student, kept).optimizer(2).param_groups
    decay = {names[p]: group["weight_decay"] for group in groups for p in group["params"]}
    assert set(decay) == set(names.values())
    for name, value in decay.items():
        spared = student.get_parameter(name).ndim < 2 or name in ("pos_embed", "cls_token")
        assert value == (0 if spared else far_training.WEIGHT_DECAY), name


# -- pace, learning rate, images --


def test_a_third_of_the_training_is_stage_2():
    for epochs, wanted in ((2, (1, 1)), (3, (2, 1)), (6, (4, 2)), (300, (200, 100))):
        assert tuple(Pace.of(stage, epochs=epochs, minutes=None).epochs for stage in (1, 2)) == wanted
    one, two = (Pace.of(stage, epochs=None, minutes=6) for stage in (1, 2))
    assert (one.seconds, two.seconds) == pytest.approx((240, 120))
    assert one.share(99, 60) == pytest.approx(0.25)
    assert Pace.of(1, epochs=6, minutes=None).share(3, 1e9) == pytest.approx(0.75)


def test_the_learning_rate_rises_to_its_highest_and_falls():
    rates = np.array([learning_rate(share, 1e-3) for share in np.linspace(0, 1, 201)])
    top = int(rates.argmax())
    assert rates.max() == pytest.approx(1e-3)
    assert (np.diff(rates[: top + 1]) > 0).all()
    assert (np.diff(rates[top:]) < 0).all()
    assert rates[0] < 0.1 * rates.max()
    assert rates[-1] < 0.1 * rates.max()
    assert top == 10


def test_seconds_end_a_stage_in_the_middle_of_an_epoch(here, monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(far_training.time, "perf_counter", lambda: float(next(clock)))
    teacher, student, kept = make()
    made, standing = trainer(teacher, student, kept), Standing()
    row = made.epoch(standing, made.optimizer(1), Pace(epochs=None, seconds=2), lambda share: None)
    assert row["steps"] == 2
    assert standing.seconds == 2
    assert Pace(epochs=None, seconds=2).share(standing.epoch, standing.seconds) >= 1


@pytest.mark.parametrize("augment", ["none", "mix", "deit"])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_prepared_and_follow_from_the_seed(here, augment, channels):
    tiny_search.write_npz("data.npz")
    data = open_npz("data.npz")
    config = ImageConfig(size=(channels, 16, 16), mean=(0.5,) * channels, std=(0.5,) * channels)
    images = TrainingImages(data, range(40), config, data.labels[:40], classes=10, augment=augment)
    made = []
    for seed in (0, 0, 1):
        with seeded(seed):
            made.append(images.batch(range(8)))
    for x, y in made:
        assert x.shape == (8, channels, 16, 16)
        assert torch.isfinite(x).all()
        torch.testing.assert_close(y.sum(-1), torch.ones(8))
    assert torch.equal(made[0][0], made[1][0])
    assert torch.equal(made[0][0], made[2][0]) is (augment == "none")
    (plain,) = image_batches(data, range(8), config)
    assert torch.equal(made[0][0], plain) is (augment == "none")
    if augment == "none":
        assert made[0][1][3].tolist() == pytest.approx([0.91 if c == 3 else 0.01 for c in range(10)])


def test_seeding_leaves_the_callers_dice_alone():
    def throw():
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    def seed_all():
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)

    seed_all()
    wanted = throw(), throw()
    seed_all()
    first = throw()
    with seeded("x"):
        inside = throw()
    assert (first, throw()) == wanted
    assert inside not in wanted


def test_tiny_numbers_are_zero_only_while_training():
    one = torch.ones(())
    with tiny_as_zero():
        assert float(one * 1e-40) == 0
        with tiny_as_zero():
            pass
        assert float(one * 1e-40) == 0
    assert float(one * 1e-40) > 0


# -- a whole run --


def test_a_run_leaves_a_student_that_loads_a_picture_and_figures(place):
    result = result_of(place)
    assert {path.name for path in (place / "run").iterdir()} == FILES
    assert json.dumps(result, allow_nan=False)
    assert [row["stage"] for row in result["curve"]] == [1, 1, 1, 1, 2, 2]
    assert result["task_loss"] == "cross-entropy on labels"
    assert result["compared"] == HEADS
    assert (place / "run" / "far.png").read_bytes().startswith(b"\x89PNG")
    teacher = open_teacher("tiny")
    data = open_npz(str(place / "data.npz"))
    student = mixerzoo.load(place / "run")
    images = torch.cat(list(image_batches(data, data.splits.test, teacher.image)))
    with torch.no_grad():
        answers = student(images).argmax(-1)
        expected = teacher.model(images).argmax(-1)
    last = result["measured"]["stage 2"]
    assert last["agreement"] == pytest.approx(float((answers == expected).float().mean()))
    labels = data.labels[list(data.splits.test)]
    assert last["accuracy"] == pytest.approx(float((answers == labels).float().mean()))
    plan = result["student"]["plan"]
    assert set(plan) == {site.name for site in teacher.sites}
    assert {plan[name] for name in plan if name.endswith("attn")} == {"multihead_lstm@1"}
    assert {plan[name] for name in plan if name.endswith("mlp")} == {"keep"}
    assert "token-to-token correlation" in (place / "run" / "best" / "README.md").read_text()


def test_stage_1_brings_the_head_outputs_nearer(place):
    first, *_, last = (row for row in result_of(place)["curve"] if row["stage"] == 1)
    assert last["tokens"] < 0.9 * first["tokens"]


def test_the_correlation_is_given_for_every_site_and_as_the_mean(place):
    measured = result_of(place)["measured"]
    assert list(measured) == ["start", "stage 1", "stage 2"]
    for row in measured.values():
        means = [site["token_correlation"] for site in row["sites"].values()]
        assert len(means) == 2
        assert row["token_correlation"] == pytest.approx(sum(means) / 2)


def test_the_figures_are_printed(place):
    text = (place / "printed.txt").read_text()
    for step, row in result_of(place)["measured"].items():
        (line,) = (line for line in text.splitlines() if line.startswith(f"{step:<12}"))
        assert f"{row['accuracy']:.2%}" in line
        assert f"{100 * row['change_low']:+.1f} to {100 * row['change_high']:+.1f} " in line
        assert f"{row['token_correlation']:.4g}" in line
    assert "cross-entropy on labels" in text
    assert str(Path("run/best")) in text


def test_mlflow_has_the_run(place):
    parent = json.loads((place / "run" / "run.json").read_text())["mlflow_run_id"]
    with tiny_search.mlflow_client(place) as client:
        found = client.get_run(parent)
        assert found.info.status == "FINISHED"
        assert found.data.params["mixer"] == "multihead_lstm@1"
        last = result_of(place)["measured"]["stage 2"]
        assert found.data.metrics["token_correlation"] == pytest.approx(last["token_correlation"])
        assert {"far.json", "far.png"} <= {artifact.path for artifact in client.list_artifacts(parent)}


@pytest.mark.parametrize("when", [1, 3, 5, 6])
def test_a_stopped_run_goes_on_to_the_same_end(place, here, monkeypatch, when):
    real, left = Trainer.epoch, [when]

    def tired(self, *arguments):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return real(self, *arguments)

    monkeypatch.setattr(Trainer, "epoch", tired)
    told = CliRunner().invoke(main, ["distill", *BASE, "--epochs", "6", "--lr", "0.005"])
    assert told.exit_code == (1 if when < 6 else 0)
    if when < 6:
        assert not (here / "run" / "best").exists()
        left[0] = 6 - when  # and no epoch twice
        run("--epochs", "6", "--lr", "0.005")
    assert without_times(result_of(here)) == without_times(
        result_of(place) | {"environment": result_of(here)["environment"]}
    )
    one, other = (mixerzoo.load(folder / "run").state_dict() for folder in (place, here))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert {path.name for path in (here / "run").iterdir()} == FILES


def test_a_finished_run_is_not_trained_again(place, here, monkeypatch):
    shutil.copytree(place, here, dirs_exist_ok=True)
    monkeypatch.setattr(Trainer, "epoch", None)
    told = run("--epochs", "6", "--lr", "0.005", "--json")
    assert json.loads(told.stdout) == result_of(here)


@pytest.mark.parametrize("moment", ["remove_checkpoint", "_log"])
def test_what_was_trained_and_not_logged_is_logged_by_the_next_start(here, monkeypatch, moment):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(far_run, moment, killed)
        told = CliRunner().invoke(main, ["distill", *BASE, "--epochs", "2"])
    assert told.exit_code == 1
    before = result_of(here)
    monkeypatch.setattr(Trainer, "epoch", None)
    run("--epochs", "2")
    assert result_of(here) == before
    assert {path.name for path in (here / "run").iterdir()} == FILES
    test_mlflow_has_the_run(here)


def test_two_processes_do_not_train_in_one_folder(here):
    with held(lock_of(here / "run"), wait=False):
        told = run("--epochs", "2", code=2)
    assert "'run': another process trains there; wait for it, or give another --out" in told.stderr
    assert told.stderr.count("\n") == 1
    assert not (here / "run").exists()


def test_another_run_in_the_same_folder_is_refused_with_the_difference(place, here):
    shutil.copytree(place, here, dirs_exist_ok=True)
    told = run("--epochs", "6", "--lr", "0.004", code=2)
    assert "lr is 0.005 there, 0.004 here" in told.stderr


def test_a_damaged_checkpoint_is_named(here, monkeypatch):
    real, left = Trainer.epoch, [2]

    def tired(self, *arguments):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return real(self, *arguments)

    monkeypatch.setattr(Trainer, "epoch", tired)
    CliRunner().invoke(main, ["distill", *BASE, "--epochs", "3"])
    (file,) = (here / "run").glob("checkpoint-*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    told = run("--epochs", "3", code=2)
    assert file.name in told.stderr
    assert "checkpoint.json" in told.stderr
    (here / "run" / "checkpoint.json").unlink()
    left[0] = 3
    run("--epochs", "3")


def test_a_loss_that_is_not_finite_ends_in_one_line(here):
    told = run("--epochs", "2", "--lr", "1e30", code=2)
    assert "stage" in told.stderr
    assert "--lr" in told.stderr
    assert told.stderr.count("\n") == 1
    with tiny_search.mlflow_client(here) as client:
        parent = json.loads((here / "run" / "run.json").read_text())["mlflow_run_id"]
        assert client.get_run(parent).info.status == "FAILED"


@pytest.mark.parametrize("model", ["tiny", "tiny_embedding"])
def test_a_run_needs_no_labels(here, model):
    tiny_search.write_npz(here / "data.npz", labels=False)
    result = json.loads(
        run("--model", model, "--epochs", "2", "--json", "--mixer", "linear_attention").stdout
    )
    assert result["task_loss"].startswith("KL" if model == "tiny" else "1 - cosine")
    assert result["compared"] == OUTPUTS
    assert result["teacher"]["accuracy"] is None
    assert all(row["accuracy"] is None for row in result["measured"].values())
    mixerzoo.load(here / "run")


def test_minutes_are_shared_by_both_stages(here):
    result = json.loads(run("--minutes", "0.02", "--json").stdout)
    assert {row["stage"] for row in result["curve"]} == {1, 2}


@pytest.mark.parametrize(
    ("words", "texts"),
    [
        (("--mixer", "multihead_lstn"), ("multihead_lstn", "multihead_lstm")),
        (("--mixer", "multihead_lstm@0.3"), ("multihead_lstm@0.3", "0.25, 0.5, 1")),
        (("--mixer", "keep"), ("keep",)),
        (("--mixer", "@"), ("@",)),
        (("--mixer", "mlp_slice"), ("mlp_slice", "attention")),
        (("--mixer", "none"), ("none", "no parameters")),
        (("--epochs", "1"), ("--epochs 1",)),
        (("--epochs", "2", "--minutes", "1"), ("--epochs", "--minutes")),
        (("--minutes", "0"), ("--minutes 0",)),
        (("--minutes", "nan"), ("--minutes nan",)),
        (("--images", "5"), ("--images 5",)),
        (("--batch-size", "1"), ("--batch-size 1",)),
        (("--lr", "0"), ("--lr 0",)),
        (("--seed", "-1"), ("--seed -1",)),
        (("--mixers", "static"), ("--mixers", "--recipe local")),
        (("--distill-steps", "0"), ("--distill-steps", "--recipe local")),
        (("--out", "full"), ("full", "--out")),
        (("--model", "tinny"), ("tinny",)),
        (("--data", "nowhere"), ("nowhere",)),
        (("--tracking-uri", "sqlite:////no/such/place/mlflow.db"), ("--tracking-uri",)),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(here, words, texts):
    (here / "full").mkdir()
    (here / "full" / "diary.txt").write_text("mine")
    before = sorted(here.rglob("*"))
    told = run(*words, code=2)
    assert told.stdout == ""
    assert told.stderr.startswith("mixerzoo: ")
    assert told.stderr.count("\n") == 1
    for text in texts:
        assert text in told.stderr
    assert sorted(here.rglob("*")) == before


def test_a_teacher_without_attention_sites_is_refused():
    teacher = tiny.tiny_teacher()
    bare = type(teacher)(**{**vars(teacher), "sites": tuple(s for s in teacher.sites if s.kind == "mlp")})
    with pytest.raises(MixerzooError, match="no attention site"):
        attention_sites(bare, LSTM)


@pytest.mark.slow
def test_a_killed_process_loses_at_most_an_epoch(place, here):
    words = [sys.executable, str(SCRIPT), "distill", *BASE, "--epochs", "6", "--lr", "0.005"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for kills in range(3):
        process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL)
        there = {path.name for path in (here / "run").glob("checkpoint-*.safetensors")}
        while process.poll() is None:
            now = {path.name for path in (here / "run").glob("checkpoint-*.safetensors")}
            if now - there:
                process.send_signal(signal.SIGKILL)
                process.wait()
                break
            time.sleep(0.001)
        else:
            pytest.fail(f"it ended before kill {kills}")
    subprocess.run(words, env=environment, check=True, stdout=subprocess.DEVNULL)
    assert without_times(result_of(here))["curve"] == without_times(result_of(place))["curve"]
    one, other = (mixerzoo.load(folder / "run").state_dict() for folder in (place, here))
    assert all(torch.equal(one[name], other[name]) for name in one)
