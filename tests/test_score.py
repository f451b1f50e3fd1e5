"""Scores against direct computation, and the cached prefix against full forward passes."""

import math

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mixerzoo.hosts import Replacement, assemble
from mixerzoo.score import HARMLESS, Evaluation, Judge, judge, output_loss

COUNT = 13


def kl(target, output):
    """KL(teacher || student), image by image, from probabilities."""
    p, q = target.double().softmax(-1), output.double().softmax(-1)
    return (p * (p.log() - q.log())).sum(-1)


class Half(nn.Module):
    def forward(self, x):
        return 0.5 * x


@pytest.fixture(scope="module", params=["classifier", "scaled", "embedding", "one stage"])
def setting(request):
    options = {"scaled": {"init_values": 0.5, "reg_tokens": 1}, "embedding": {"num_classes": 0}}
    teacher = tiny.tiny_teacher(**options.get(request.param, {}))
    if request.param == "one stage":
        object.__setattr__(teacher, "host", one_stage())
        object.__setattr__(teacher, "sites", tuple(type(s)(**vars(s) | {"stage": 0}) for s in teacher.sites))
    labels = torch.arange(COUNT) % 10 if teacher.classifier else None
    return teacher, Judge(teacher, tiny.tiny_batches(COUNT, batch_size=5), labels)


def one_stage():
    from mixerzoo.hosts.timm_vit import TimmVitHost

    class OneStage(TimmVitHost):
        def stages(self, model):
            return [model]

    return OneStage()


@given(seed=st.integers(0, 2**31), classes=st.integers(2, 12), scale=st.floats(0.01, 20))
def test_the_loss_of_logits_is_the_divergence(seed, classes, scale):
    generator = torch.Generator().manual_seed(seed)
    output, target = (scale * torch.randn(2, 6, classes, generator=generator)).unbind(0)
    found = output_loss(output, target, classifier=True)
    torch.testing.assert_close(found.double(), kl(target, output), rtol=1e-3, atol=1e-5)
    assert (found > -1e-5).all()
    torch.testing.assert_close(output_loss(target, target, classifier=True), torch.zeros(6))
    # Only differences between logits count.
    torch.testing.assert_close(output_loss(output + 3, target, classifier=True), found, rtol=1e-3, atol=1e-4)


def test_the_loss_of_embeddings_is_one_minus_the_cosine():
    output, target = torch.randn(2, 5, 8).unbind(0)
    expected = 1 - (output * target).sum(-1) / output.norm(dim=-1) / target.norm(dim=-1)
    torch.testing.assert_close(output_loss(output, target, classifier=False), expected)
    torch.testing.assert_close(
        output_loss(7 * target, target, classifier=False), torch.zeros(5), atol=1e-6, rtol=0
    )


def test_agreement_and_accuracy_are_shares_of_right_answers():
    target = torch.eye(4)[[0, 1, 2, 3]] * 5
    output = torch.eye(4)[[0, 1, 3, 2]] * 5
    found = judge(output, target, torch.tensor([0, 2, 3, 1]), classifier=True)
    assert found.agreement == 0.5
    assert found.accuracy == 0.5
    assert found.loss == pytest.approx(float(kl(target, output).mean()), rel=1e-5)
    assert judge(output, target, None, classifier=True).accuracy is None


def test_embeddings_have_no_accuracy_and_agree_by_their_cosine():
    target = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    found = judge(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), target, torch.tensor([0, 1]), classifier=False)
    assert found.loss == pytest.approx(0.5)
    assert found.agreement == pytest.approx(0.5)
    assert found.accuracy is None
    assert judge(-target, target, None, classifier=False).agreement == 0


def test_the_teacher_agrees_with_itself(setting):
    teacher, the_judge = setting
    assert the_judge.images == COUNT
    found = the_judge.teacher_evaluation()
    assert found.loss == pytest.approx(0, abs=1e-6)
    assert found.agreement == pytest.approx(1)
    with torch.inference_mode():
        direct = teacher.model(torch.cat(tiny.tiny_batches(COUNT, batch_size=5)))
    torch.testing.assert_close(the_judge.target, direct)
    if teacher.classifier:
        labels = torch.arange(COUNT) % 10
        assert found.accuracy == pytest.approx(float((direct.argmax(-1) == labels).float().mean()))
    else:
        assert found.accuracy is None
    assert the_judge.evaluate_modules({}).loss == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("names", [(0,), (1,), (2,), (3,), (1, 2), (0, 3)])
def test_the_cached_prefix_changes_nothing(setting, names):
    teacher, the_judge = setting
    sites = [teacher.sites[index] for index in names]
    modules = {site.name: Replacement(Half(), site, masks=False) for site in sites}
    found = the_judge.evaluate_modules(modules)
    student = assemble(teacher.model, modules)
    with torch.inference_mode():
        output = student(torch.cat(tiny.tiny_batches(COUNT, batch_size=5)))
    expected = judge(output, the_judge.target, the_judge.labels, classifier=teacher.classifier)
    assert found.loss == pytest.approx(expected.loss, rel=1e-4)
    assert found.agreement == pytest.approx(expected.agreement, abs=1e-6)
    assert found.accuracy == expected.accuracy
    assert found.loss > 1e-4
    assert the_judge.evaluate(student).loss == pytest.approx(found.loss, rel=1e-4)


def test_only_the_changed_part_is_run():
    teacher = tiny.tiny_teacher()
    the_judge = Judge(teacher, tiny.tiny_batches(COUNT), None)
    calls = []

    class Counted(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, x, **_):
            calls.append(len(x))
            return self.module(x)

    last = teacher.sites[-1]
    modules = {last.name: Replacement(Half(), last, masks=False)}
    student = assemble(teacher.model, modules)
    student.blocks[0].mlp = Counted(student.blocks[0].mlp)
    the_judge.outputs(student, first=last.stage)
    assert sum(calls) < COUNT  # at most the check that the stages compose, on one image
    calls.clear()
    the_judge.outputs(student)
    assert sum(calls) >= COUNT


def test_a_student_that_has_gone_to_nan_has_no_finite_loss():
    teacher = tiny.tiny_teacher()
    the_judge = Judge(teacher, tiny.tiny_batches(COUNT), None)

    class Nan(nn.Module):
        def forward(self, x):
            return x * float("nan")

    for site in teacher.sites:
        found = the_judge.evaluate_modules({site.name: Replacement(Nan(), site, masks=False)})
        assert math.isnan(found.loss)


def test_batches_are_counted():
    seen = []
    Judge(tiny.tiny_teacher(), tiny.tiny_batches(COUNT, batch_size=5), None, on_batch=seen.append)
    assert seen == [1, 2, 3]


def test_a_constant_answer_loses_the_entropy_of_sure_answers_and_the_spread_of_embeddings(setting):
    teacher, the_judge = setting
    the_judge.target = 50 * torch.eye(10).repeat(20, 1)  # 10 classes or directions, equally often
    expected = math.log(10) if teacher.classifier else 1 - 1 / math.sqrt(10)
    assert the_judge.constant_loss() == pytest.approx(expected, rel=1e-4)
    assert the_judge.harmless_loss() == pytest.approx(HARMLESS * expected, rel=1e-4)


def test_the_interval_of_accuracy_is_that_of_the_same_images():
    labels = torch.arange(COUNT) % 3
    the_judge = Judge(tiny.tiny_teacher(), tiny.tiny_batches(COUNT), labels)
    target = the_judge.target
    right = torch.nn.functional.one_hot(labels, target.shape[1]).float()
    found = judge(right, target, labels, classifier=True)
    assert found.accuracy == 1
    own = the_judge.teacher_evaluation()
    assert found.change_low <= 1 - own.accuracy <= found.change_high
    assert own.change_low == -own.change_high < 0
    for classifier, these in ((True, None), (False, labels)):
        none = judge(right, target, these, classifier=classifier)
        assert (none.accuracy, none.change_low, none.change_high) == (None, None, None)


def test_figures_that_are_not_finite_are_none_in_json():
    found = Evaluation(loss=math.nan, agreement=0.5, accuracy=None, change_low=-0.25, change_high=math.inf)
    assert found.to_json() == {
        "loss": None, "agreement": 0.5, "accuracy": None, "change_low": -0.25, "change_high": None,
    }  # fmt: skip


@pytest.mark.parametrize("keep", ["images", "nothing"])
def test_without_prefixes_a_student_is_judged_the_same_from_the_images(keep):
    teacher = tiny.tiny_teacher()
    kept, lean = (Judge(teacher, tiny.tiny_batches(COUNT), None, keep=keep) for keep in ("prefixes", keep))
    last = teacher.sites[-1]
    modules = {last.name: Replacement(Half(), last, masks=False)}
    student = assemble(teacher.model, modules)
    expected = kept.outputs(student, first=last.stage)
    assert torch.allclose(lean.outputs(student, first=last.stage), expected, atol=1e-5)
    assert lean.evaluate_modules(modules).loss == pytest.approx(kept.evaluate_modules(modules).loss, rel=1e-4)
    assert lean.losses(student).shape == (COUNT,)
    assert sum(len(states) for states in lean._hidden) < sum(len(states) for states in kept._hidden)
