"""Global distillation under a clock that tests can turn: never worse, nothing else is touched, and it goes on."""

import copy
import json
import math
import types

import pytest
import tiny
import torch
from torch import nn

import mixerzoo.finetune.loop as module
from mixerzoo.checkpoint import CHECKPOINT, load_checkpoint, remove_checkpoint, save_checkpoint
from mixerzoo.errors import MixerzooError
from mixerzoo.finetune import Recipe, finetune, rates, train
from mixerzoo.finetune.loop import Training
from mixerzoo.finetune.rates import PROBES, PROMISE, set_rates
from mixerzoo.finetune.recipe import Pool
from mixerzoo.hosts import Replacement, assemble, fingerprint
from mixerzoo.plan import Candidate
from mixerzoo.score import Judge
from mixerzoo.student import make_replacement

EMBEDDING = ("cls_token", "reg_token", "pos_embed", "patch_embed")  # before the first site that is replaced


@pytest.fixture(autouse=True)
def steps(monkeypatch):
    """Let every look at the clock take one second: `seconds` is then a number of steps, more or less."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(module, "time", types.SimpleNamespace(perf_counter=lambda: float(next(ticks))))


@pytest.fixture(params=["classifier", "embedding", "scaled"])
def teacher(request):
    options = {"embedding": {"num_classes": 0}, "scaled": {"init_values": 0.5, "reg_tokens": 1}}
    return tiny.tiny_teacher(**options.get(request.param, {}))


def make_student(teacher):
    torch.manual_seed(0)
    modules = {
        site.name: make_replacement(
            Candidate(
                "pool" if site.kind == "attention" else "mlp_slice", 1.0 if site.kind == "attention" else 0.5
            ),
            site,
        )
        for site in teacher.sites
    }
    return assemble(teacher.model, modules)


def judge_of(teacher):
    the_judge = Judge(teacher, tiny.tiny_batches(24, seed=5), None)
    return lambda student: the_judge.evaluate(student).loss


def images():
    return tiny.tiny_batches(64)


def test_it_helps_and_says_how_much(teacher):
    evaluate, student = judge_of(teacher), make_student(teacher)
    before = evaluate(student)
    best, loss = finetune(teacher, student, images(), seconds=60, evaluate=evaluate, lr=3e-3)
    assert loss < 0.8 * before
    assert evaluate(best) == loss
    assert best is not student


def test_nothing_else_is_touched(teacher):
    student = make_student(teacher)
    before = copy.deepcopy(student.state_dict())
    best, _ = finetune(teacher, student, images(), seconds=20, evaluate=judge_of(teacher), lr=3e-3)
    assert fingerprint(teacher.model) == teacher.fingerprint
    assert not any(p.requires_grad or p.grad is not None for p in teacher.model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
    assert student.blocks[0].norm1.weight is teacher.model.blocks[0].norm1.weight
    assert not best.training
    assert not any(p.requires_grad for p in best.parameters())
    assert {id(p) for p in best.parameters()}.isdisjoint(id(p) for p in student.parameters())


def test_kept_modules_are_trained_too(teacher):
    student = make_student(teacher)
    best, _ = finetune(teacher, student, images(), seconds=60, evaluate=judge_of(teacher), lr=3e-3)
    after = best.state_dict()
    unchanged = {name for name, tensor in student.state_dict().items() if torch.equal(tensor, after[name])}
    assert all(name.startswith(EMBEDDING) for name in unchanged), unchanged


def scripted(values):
    """Return an `evaluate` that gives `values` in turn, and the weights it saw."""
    left, seen = iter(values), []

    def evaluate(model):
        seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return next(left)

    return evaluate, seen


def same(model, state):
    return all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_the_best_state_comes_back_not_the_last():
    teacher = tiny.tiny_teacher()
    evaluate, seen = scripted([1.0, 0.9, 0.5, 0.7, float("nan"), *[0.6] * 100])
    best, loss = finetune(teacher, make_student(teacher), images(), seconds=60, evaluate=evaluate)
    assert loss == 0.5
    assert same(best, seen[2])
    assert not same(best, seen[-1])
    assert len(seen) > 4


def test_what_does_not_help_is_not_taken():
    teacher = tiny.tiny_teacher()
    evaluate, seen = scripted([1.0, *[1.0] * 100])
    student = make_student(teacher)
    best, loss = finetune(teacher, student, images(), seconds=30, evaluate=evaluate)
    assert best is student
    assert loss == 1.0
    assert len(seen) > 3


@pytest.mark.parametrize("lr", [1e3, 1e-6])
def test_it_is_never_worse(lr):
    teacher = tiny.tiny_teacher()
    evaluate, student = judge_of(teacher), make_student(teacher)
    before = evaluate(student)
    best, loss = finetune(teacher, student, images(), seconds=20, evaluate=evaluate, lr=lr)
    assert loss <= before
    assert evaluate(best) == loss


def test_steps_that_lead_far_away_are_taken_back_and_the_rate_falls():
    """At the start, and later from the best state."""
    teacher = tiny.tiny_teacher()
    evaluate, seen = scripted([1.0, 3.0, 1.9, 0.5, 1.1, float("nan"), 0.4, *[0.6] * 100])
    student = make_student(teacher)
    recipe = Recipe(steps=200, lr=1e-3)
    rows, tuned = tune(teacher, student=student, evaluate=evaluate, steps=200, lr=1e-3)
    factors = [row["lr"] / recipe.rate((row["step"] - 1) / 200) for row in rows]
    # 3.0, 1.1 and what is not finite: a fifth of the rate from then on; 1.9 is not twice 1.0.
    assert round(1 / factors[-1]) == 125
    assert sorted({round(1 / f) for f in factors}) == [1, 5, 25, 125]
    assert tuned.loss == 0.4
    assert same(tuned.student, seen[6])
    taken_back = [seen[number] for number in (1, 2)]
    start = dict(student.named_parameters())
    moved = [max(float((state[n] - p).abs().max()) for n, p in start.items()) for state in taken_back]
    assert moved[1] < moved[0]  # from the start again, more slowly


def test_what_the_student_shares_with_the_teacher_is_not_trained():
    teacher = tiny.tiny_teacher()
    last = [site for site in teacher.sites if site.kind == "attention"][-1]
    student = assemble(teacher.model, {last.name: make_replacement(Candidate("pool", 1.0), last)})
    _, tuned = tune(teacher, student=student, evaluate=judge_of(teacher), steps=30)
    before, after = student.state_dict(), tuned.student.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(last.name in name for name in changed)
    block = last.name.rsplit(".", 1)[0]
    assert all(name.startswith((block, "norm", "head", "fc_norm")) for name in changed), changed
    penalty = lambda model: sum(p.square().sum() for p in model.blocks[0].mlp.parameters())  # noqa: E731
    _, tuned = tune(
        teacher, student=student, evaluate=lambda m: -float(penalty(m).detach()), penalty=penalty, steps=30
    )
    after = tuned.student.state_dict()
    assert torch.equal(before["patch_embed.proj.weight"], after["patch_embed.proj.weight"])


@pytest.mark.parametrize("seconds", [0, -1.0])
def test_without_time_nothing_happens(seconds):
    teacher = tiny.tiny_teacher()
    student = make_student(teacher)
    best, loss = finetune(teacher, student, images(), seconds=seconds, evaluate=lambda model: 0.25)
    assert best is student
    assert loss == 0.25


class GoesToNan(nn.Module):
    """Fine for a while, then not, in what the steps see."""

    def __init__(self, dim, after, way):
        super().__init__()
        self.readout = nn.Linear(dim, dim)
        self.left, self.way = after, way

    def forward(self, x):
        y = self.readout(x)
        if not torch.is_grad_enabled():
            return y
        self.left -= 1
        if self.left >= 0:
            return y
        # The root of 0 has a value, but no gradient.
        return y * float("nan") if self.way == "loss" else y + (self.readout.weight.sum() * 0).sqrt()


@pytest.mark.parametrize("way", ["loss", "gradient"])
@pytest.mark.parametrize("after", [0, 20])
def test_it_stops_at_what_is_not_finite_and_keeps_the_best(way, after):
    teacher = tiny.tiny_teacher()
    site = teacher.sites[0]
    torch.manual_seed(0)
    student = assemble(
        teacher.model, {site.name: Replacement(GoesToNan(24, after, way), site, masks=False)}
    ).requires_grad_(False)
    progress = []
    evaluate = judge_of(teacher)
    before = evaluate(student)
    best, loss = finetune(
        teacher, student, images(), seconds=100, evaluate=evaluate, lr=3e-3, on_progress=progress.append
    )
    assert len(progress) <= after + 1 < 50
    assert all(tensor.isfinite().all() for tensor in best.state_dict().values())
    if after:
        assert loss < before
    else:
        assert best is student
        assert loss == before


def test_progress_goes_to_one():
    teacher = tiny.tiny_teacher()
    seen = []
    finetune(
        teacher, make_student(teacher), images(), seconds=30, evaluate=lambda _: 1.0, on_progress=seen.append
    )
    assert seen == sorted(seen)
    assert 0 < seen[0] < 0.1
    assert seen[-1] == 1.0


def test_a_seed_settles_the_order():
    teacher = tiny.tiny_teacher()
    found = []
    for seed in (0, 0, 1):
        evaluate = judge_of(teacher)
        found.append(
            finetune(
                teacher, make_student(teacher), images(), seconds=12, evaluate=evaluate, lr=1e-3, seed=seed
            )[1]
        )
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_the_loss_is_of_outputs_and_hidden_states():
    teacher = tiny.tiny_teacher()
    student = make_student(teacher)
    stages = [teacher.host.stages(model) for model in (teacher.model, student)]
    batch = tiny.tiny_images(6)
    with torch.no_grad():
        found = module.whole_loss(teacher, *stages, batch)
        same_model = module.whole_loss(teacher, stages[0], stages[0], batch)
        hidden, wanted, given = 0.0, batch, batch
        for t, s in zip(*stages, strict=True):
            wanted, given = t(wanted), s(given)
            if wanted.ndim == 3:
                hidden += (
                    1 - nn.functional.cosine_similarity(wanted.flatten(1), given.flatten(1))
                ).mean() / 3
        p = wanted.softmax(-1)
        kl = (p * (p.log() - given.softmax(-1).log())).sum(-1).mean()
    assert float(found) == pytest.approx(float(kl + hidden), rel=1e-4)
    assert float(same_model) == pytest.approx(0, abs=1e-5)


def test_labels_add_their_cross_entropy_and_weigh_nothing_unless_asked():
    teacher = tiny.tiny_teacher()
    stages = [teacher.host.stages(model) for model in (teacher.model, make_student(teacher))]
    batch, labels = tiny.tiny_images(6), torch.arange(6)
    with torch.no_grad():
        given = batch
        for stage in stages[1]:
            given = stage(given)
        expected = module.whole_loss(teacher, *stages, batch) + 0.5 * nn.functional.cross_entropy(
            given, labels
        )
        found = module.whole_loss(teacher, *stages, batch, labels, 0.5)
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    results = [
        tune(teacher, labels=some)[1] for some in (None, torch.arange(64) % 10, torch.zeros(64).long())
    ]
    assert results[0].loss == results[1].loss == results[2].loss
    weighed = [tune(teacher, labels=torch.full((64,), wrong), label_weight=10.0)[1] for wrong in (3, 4)]
    with torch.no_grad():
        answers = [tuned.student(tiny.tiny_images(64)).mean(0) for tuned in weighed]
    assert answers[0][3] > answers[1][3]
    assert answers[1][4] > answers[0][4]
    with pytest.raises(ValueError, match="no labels"):
        tune(teacher, label_weight=1.0)


def tune(
    teacher,
    *,
    student=None,
    labels=None,
    evaluate=None,
    folder=None,
    penalty=None,
    on_progress=lambda share: None,
    **recipe,
):
    """Train the student with gradient steps; return its rows as they came, and the result."""
    rows = []
    tuned = train(
        teacher,
        student or make_student(teacher),
        images(),
        Recipe(**{"steps": 40, "lr": 3e-3} | recipe),
        # The student is judged by what it was trained on, so that labels show.
        evaluate=evaluate or scripted_fall(),
        labels=labels,
        penalty=penalty,
        checkpoint=folder,
        on_progress=on_progress,
        on_row=rows.append,
    )
    return rows, tuned


def scripted_fall():
    """Return an `evaluate` that is lower every time: the last state is the best."""
    values = iter(range(10**6))
    return lambda model: 1.0 / (1 + next(values))


def test_the_rate_rises_and_falls_to_nothing():
    recipe = Recipe(steps=1000, lr=2.0)
    rates = [recipe.rate(recipe.share(step, 0.0)) for step in range(1001)]
    top = rates.index(max(rates))
    assert rates[0] == pytest.approx(0.2)
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert (top, max(rates)) == (50, pytest.approx(2.0))
    assert rates[-1] == pytest.approx(0.0, abs=1e-9)


def test_the_curve_is_as_it_went():
    teacher = tiny.tiny_teacher()
    rows, tuned = tune(teacher, evaluate=judge_of(teacher), steps=120)
    assert tuned.curve == rows
    assert (tuned.steps, tuned.stopped, rows[-1]["step"]) == (120, None, 120)
    assert 90 <= len(rows) <= 116  # a hundred, and checks between two of them
    checked = [row["held_out"] for row in rows if row["held_out"] is not None]
    assert len(checked) == module.EARLY + module.CHECKS
    assert rows[-1]["held_out"] == checked[-1]
    assert min(checked) == tuned.loss
    assert rows[0]["loss"] > rows[-1]["loss"] > 0
    assert [row["seconds"] for row in rows] == sorted(row["seconds"] for row in rows)


def training(teacher, student=None, **options):
    recipe = Recipe(**{"steps": 20, "lr": 1e-3} | options.pop("recipe", {}))
    pool = Pool(torch.cat(images()))
    arguments = {"labels": None, "evaluate": lambda model: 1.0, "folder": None} | options
    return Training(teacher, make_student(teacher) if student is None else student, pool, recipe, **arguments)


def test_no_step_promises_more_than_the_loss():
    teacher = tiny.tiny_teacher()
    most = training(teacher).standing.most
    again = training(teacher)
    losses, sums = 0.0, dict.fromkeys(most, 0.0)
    again.order = torch.empty(0, dtype=torch.int64)
    again.generator.manual_seed(0)
    for _ in range(PROBES):
        again.model.zero_grad()
        loss = again._loss(again._rows())
        loss.backward()
        losses += float(loss.detach())
        for name, parameter in again.model.named_parameters():
            if name in most:
                sums[name] += float(parameter.grad.abs().sum())
    promised = {name: rate * sums[name] for name, rate in most.items()}
    assert sum(promised.values()) == pytest.approx(PROMISE * losses, rel=1e-3)
    assert len(most) > 5
    assert max(promised.values()) == pytest.approx(min(promised.values()), rel=1e-3)


def test_the_rate_asked_for_is_the_highest():
    teacher = tiny.tiny_teacher()
    for lr in (1e-9, 1e3):
        one = training(teacher, recipe={"lr": lr})
        set_rates(one.optimizer, one.model, one.standing.most, lr, top=lr)
        names = [name for name, _ in one.model.named_parameters()]
        rates = {name: group["lr"] for name, group in zip(names, one.optimizer.param_groups, strict=True)}
        for name, rate in rates.items():
            assert rate == pytest.approx(min(lr, one.standing.most.get(name, lr)), rel=1e-3)


def test_with_a_penalty_the_rate_is_that_of_all():
    teacher = tiny.tiny_teacher()
    one = training(teacher, penalty=lambda model: next(model.parameters()).square().sum())
    assert one.standing.most == {}
    set_rates(one.optimizer, one.model, one.standing.most, 1e-3, top=1e-3)
    assert [group["lr"] for group in one.optimizer.param_groups] == pytest.approx(
        [1e-3] * len(one.optimizer.param_groups)
    )


def test_a_student_without_loss_has_nothing_to_learn():
    teacher = tiny.tiny_teacher()
    same = copy.deepcopy(assemble(teacher.model, {}))
    assert all(rate < 1e-3 for rate in training(teacher, same).standing.most.values())


def test_every_pass_shows_every_image_once():
    teacher = tiny.tiny_teacher()
    seen = []

    class Recorded:
        def __len__(self):
            return 20

        def batch(self, rows):
            seen.append(rows)
            return tiny.tiny_images(20)[rows]

    recipe = Recipe(steps=8, batch_size=5)
    train(teacher, make_student(teacher), Recorded(), recipe, evaluate=lambda model: 1.0)
    assert seen.pop(0) == [0]  # finds out what the student shares with the teacher
    passes = [[row for rows in part for row in rows] for part in (seen[:4], seen[4:8], seen[8:])]
    assert all(sorted(order) == list(range(20)) for order in passes)
    assert passes[0] != passes[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, None])
def test_autocast_is_for_those_who_ask_on_a_cpu(dtype):
    recipe = Recipe(steps=20, dtype=dtype)
    assert recipe.autocast is dtype
    assert Recipe(steps=20, dtype=torch.float32).autocast is None
    teacher = tiny.tiny_teacher()
    evaluate = judge_of(teacher)
    before = evaluate(make_student(teacher))
    _, tuned = tune(teacher, evaluate=evaluate, dtype=dtype)
    assert tuned.loss < 0.9 * before
    assert all(p.dtype == torch.float32 for p in tuned.student.parameters())


def test_why_it_stopped_is_said(monkeypatch):
    monkeypatch.setattr(rates, "PROMISE", math.inf)
    teacher = tiny.tiny_teacher()
    assert tune(teacher, steps=2)[1].stopped is None
    _, tuned = tune(teacher, steps=20, lr=1e30)
    assert "was nan at step 2" in tuned.stopped or "was inf at step 2" in tuned.stopped
    assert tuned.steps == 1


# Going on after a stop


class Killed(Exception):
    pass


def killed_at(step, steps):
    def on_progress(share):
        if round(share * steps) == step:
            raise Killed

    return on_progress


def without_seconds(curve):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in curve]


@pytest.mark.parametrize(
    ("every", "kills"), [(0.0, (1,)), (3.0, (2, 12, 12, 29)), (11.0, (13, 40)), (0.0, (3, 17, 39, 40))]
)
def test_a_stopped_training_ends_as_an_undisturbed_one(tmp_path, monkeypatch, every, kills):
    teacher = tiny.tiny_teacher()
    evaluate = judge_of(teacher)
    options = {"evaluate": evaluate, "labels": torch.arange(64) % 10, "label_weight": 0.1}
    _, whole = tune(teacher, **options)
    monkeypatch.setattr(module, "SAVE_SECONDS", every)
    monkeypatch.setattr(module, "SAVE_SHARE", 1e9)
    for step in kills:
        with pytest.raises(Killed):
            tune(teacher, folder=tmp_path, on_progress=killed_at(step, 40), **options)
    rows, again = tune(teacher, folder=tmp_path, **options)
    assert (again.loss, again.steps) == (whole.loss, whole.steps)
    assert same(again.student, whole.student.state_dict())
    assert without_seconds(again.curve) == without_seconds(whole.curve)
    assert len(rows) <= len(whole.curve)
    assert len(list(tmp_path.glob("*.safetensors"))) <= 1
    remove_checkpoint(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_time_that_was_spent_counts(tmp_path, monkeypatch):
    teacher = tiny.tiny_teacher()
    monkeypatch.setattr(module, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(module, "SAVE_SHARE", 1e9)

    def stop(share):
        if share > 0.6:
            raise Killed

    options = {"steps": None, "seconds": 200.0, "evaluate": lambda model: 1.0, "folder": tmp_path}
    with pytest.raises(Killed):
        tune(teacher, on_progress=stop, **options)
    shares = []
    _, tuned = tune(teacher, on_progress=shares.append, **options)
    assert 0.55 < shares[0] < 0.7
    assert 200 <= tuned.seconds < 230


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """A folder with the checkpoint of a training that was stopped at step 9."""
    monkeypatch.setattr(module, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(module, "SAVE_SHARE", 1e9)
    with pytest.raises(Killed):
        tune(tiny.tiny_teacher(), folder=tmp_path, on_progress=killed_at(9, 40))
    return tmp_path


def test_a_checkpoint_is_json_and_safetensors(stopped):
    content, tensors = load_checkpoint(stopped)
    assert json.loads((stopped / CHECKPOINT).read_text())["content"] == content
    assert content["step"] == 8
    assert {name.partition(".")[0] for name in tensors} == {
        "student", "best", "optimizer", "order", "generator"
    }  # fmt: skip
    assert {path.suffix for path in stopped.iterdir()} == {".json", ".safetensors"}


@pytest.mark.parametrize(
    ("changes", "text"),
    [({"lr": 1e-3}, "lr is 0.003 there, 0.001 here"), ({"steps": 41}, "steps is 40 there, 41 here")],
)
def test_another_training_is_refused(stopped, changes, text):
    before = sorted(path.name for path in stopped.iterdir())
    with pytest.raises(MixerzooError, match=text):
        tune(tiny.tiny_teacher(), folder=stopped, **changes)
    with pytest.raises(MixerzooError, match="of another training"):
        tune(tiny.tiny_teacher(seed=1), folder=stopped)
    assert sorted(path.name for path in stopped.iterdir()) == before


def cut(path):
    path.write_bytes(path.read_bytes()[:-40])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: cut(next(folder.glob("*.safetensors"))),
        lambda folder: next(folder.glob("*.safetensors")).unlink(),
        lambda folder: (folder / CHECKPOINT).write_text("[]"),
        lambda folder: cut(folder / CHECKPOINT),
    ],
)
def test_a_damaged_checkpoint_is_named(stopped, spoil):
    spoil(stopped)
    with pytest.raises(MixerzooError, match=r"is damaged .* remove '.*checkpoint\.json' to begin anew"):
        tune(tiny.tiny_teacher(), folder=stopped)
    (stopped / CHECKPOINT).unlink()
    tune(tiny.tiny_teacher(), folder=stopped)


def test_a_slow_check_does_not_pass_for_a_slow_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SAVE_SHARE", 1.0)
    costs = []
    save = Training._save

    def recorded(training, folder):
        costs.append(training.save_cost)
        save(training, folder)

    def slow(model):
        for _ in range(500):
            module.time.perf_counter()
        return 1.0

    monkeypatch.setattr(Training, "_save", recorded)
    tune(tiny.tiny_teacher(), folder=tmp_path, evaluate=slow)
    assert len(costs) > 2
    assert max(costs) < 10


def test_a_training_goes_on_where_autocast_is_another(stopped, monkeypatch):
    monkeypatch.setattr(Recipe, "autocast", property(lambda self: torch.bfloat16))
    _, tuned = tune(tiny.tiny_teacher(), folder=stopped)
    assert tuned.steps == 40


def test_what_a_killed_process_was_writing_goes_with_the_checkpoint(stopped):
    (file,) = stopped.glob("*.safetensors")
    for path in (file, stopped / CHECKPOINT):
        path.with_name(f".{path.name}.1234.tmp").write_bytes(b"half")
    remove_checkpoint(stopped)
    assert list(stopped.iterdir()) == []


def test_recurrent_layers_are_in_training_mode_and_nothing_else_is():
    # cuDNN has gradients of those only; here it is told by the flag.
    site = tiny.tiny_teacher().sites[0]
    teacher = tiny.tiny_teacher()
    student = assemble(teacher.model, {site.name: make_replacement(Candidate("multihead_lstm", 0.5), site)})
    seen = []

    def evaluate(model):
        seen.append({name for name, part in model.named_modules() if part.training})
        return 1.0

    recurrent = {name for name, part in student.named_modules() if isinstance(part, nn.LSTM)}
    train(teacher, student, Pool(torch.cat(list(images()))), Recipe(steps=2), evaluate=evaluate)
    assert recurrent
    assert seen == [recurrent] * len(seen)
    assert not any(part.training for part in student.modules())


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, {"step": 1}, {"x": torch.ones(2)})

    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("mixerzoo.checkpoint.write_json", killed)
        with pytest.raises(Killed):
            save_checkpoint(tmp_path, {"step": 2}, {"x": torch.zeros(2)})
    content, tensors = load_checkpoint(tmp_path)
    assert (content["step"], tensors["x"].tolist()) == (1, [1, 1])
    save_checkpoint(tmp_path, {"step": 3}, {"x": torch.full((2,), 3.0)})
    assert load_checkpoint(tmp_path)[0]["step"] == 3
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
