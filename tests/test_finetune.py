"""Global distillation under a clock that tests can turn: never worse, and nothing else is touched."""

import copy
import types

import pytest
import tiny
import torch
from torch import nn

import mixerzoo.finetune as module
from mixerzoo.finetune import finetune
from mixerzoo.hosts import Replacement, assemble, fingerprint
from mixerzoo.plan import Candidate
from mixerzoo.score import Judge
from mixerzoo.student import make_replacement


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
    unchanged = [name for name, tensor in student.state_dict().items() if torch.equal(tensor, after[name])]
    assert unchanged == []


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
        found = module._loss(teacher, *stages, batch)
        same_model = module._loss(teacher, stages[0], stages[0], batch)
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
