"""Pruning a whole student: one order, really smaller modules, targets, and what is kept is worth more than chance."""

import copy

import pytest
import tiny
import torch

from mixerzoo.errors import BudgetOutOfReachError, MixerzooError
from mixerzoo.hosts import assemble, count_params
from mixerzoo.plan import Candidate, Plan
from mixerzoo.progress import Reporter
from mixerzoo.pruning.student import Order, all_kept, penalty_of, prunables, slots, smaller
from mixerzoo.pruning.targets import Gauge, Share, Thresholds, flops
from mixerzoo.score import Judge
from mixerzoo.shrink import largest, norms, silence
from mixerzoo.student import Student, load_student, make_replacement, save_student
from mixerzoo_search.prune.phases import Pruner


@pytest.fixture(scope="module")
def teacher():
    return tiny.tiny_teacher()


@pytest.fixture(scope="module")
def student(teacher):
    """All attention is an LSTM, MLPs are kept."""
    plan = Plan.of(
        {site.name: Candidate("multihead_lstm") for site in teacher.sites if site.kind == "attention"},
        teacher.sites,
    )
    torch.manual_seed(0)
    modules = {
        site: make_replacement(candidate, teacher.site(site))
        for site, candidate in plan.choices
        if not candidate.is_keep
    }
    return Student(plan=plan, model=copy.deepcopy(assemble(teacher.model, modules)))


def thresholds(teacher, student, sites, gauge):
    order = Order(slots(student.model, sites))
    return Thresholds(order, lambda sizes: smaller(teacher, student, sites, sizes).model, gauge)


class Watch:
    """Stands in for a stopwatch where nothing is timed."""

    example = tiny.tiny_images(1)


def by_chance(sizes, count):
    generator = torch.Generator().manual_seed(3)
    order = torch.stack([torch.randperm(sizes.shape[1], generator=generator)[:count] for _ in sizes])
    return order.sort(dim=1).values


def test_every_site_of_a_kept_teacher_can_be_pruned(teacher):
    student = all_kept(teacher)
    sites = prunables(teacher, student)
    assert [(p.site.name, list(p.units), p.kept) for p in sites] == [
        ("blocks.0.attn", ["heads"], True),
        ("blocks.0.mlp", ["hidden"], True),
        ("blocks.1.attn", ["heads"], True),
        ("blocks.1.mlp", ["hidden"], True),
    ]
    images = tiny.tiny_images(4)
    whole = smaller(teacher, student, sites, {})
    assert whole.plan == student.plan
    assert torch.equal(whole.model(images), teacher.model(images))


def test_attention_with_norms_inside_stays_whole():
    teacher = tiny.tiny_teacher(qk_norm=True)
    names = [p.site.name for p in prunables(teacher, all_kept(teacher))]
    assert names == ["blocks.0.mlp", "blocks.1.mlp"]


def test_a_pruned_student_is_that_with_the_units_silent():
    """Silent heads and hidden units of the teacher's own modules: the smaller student computes the same."""
    # With a bias of its values, a head that is gone still adds what it adds to every token: that is kept.
    teacher = tiny.tiny_teacher(qkv_bias=False)
    student = all_kept(teacher)
    sites = prunables(teacher, student)
    sizes = {"blocks.0.attn": {"heads": 2}, "blocks.0.mlp": {"hidden": 40}, "blocks.1.mlp": {"hidden": 8}}
    small = smaller(teacher, student, sites, sizes)
    silent = copy.deepcopy(student.model)
    for prunable in sites:
        for kind, count in sizes.get(prunable.site.name, {}).items():
            module, units = prunable.module(silent), prunable.units[kind]
            silence(module, units, largest(norms(module, units), count))
    images = tiny.tiny_images(4)
    with torch.no_grad():
        assert torch.allclose(small.model(images), silent(images), atol=1e-4, rtol=1e-4)
    assert small.plan["blocks.0.attn"] == Candidate("fewer_heads", 1.0, (("heads", 2),))
    assert small.plan["blocks.1.attn"].is_keep
    assert count_params(small.model) < count_params(teacher.model)


@pytest.mark.parametrize(("heads", "whole"), [(5, True), (4, False)])
def test_kept_attention_of_which_few_heads_go_would_be_larger_and_stays_whole(heads, whole):
    teacher = tiny.tiny_teacher(num_heads=6)
    student = all_kept(teacher)
    small = smaller(teacher, student, prunables(teacher, student), {"blocks.0.attn": {"heads": heads}})
    assert small.plan["blocks.0.attn"].is_keep is whole
    assert (count_params(small.model) < count_params(teacher.model)) is not whole


def test_it_is_rebuilt_from_json_and_weights(teacher, student, tmp_path):
    sites = prunables(teacher, student)
    order = Order(slots(student.model, sites))
    small = smaller(teacher, student, sites, order.sizes(order.most // 2))
    save_student(tmp_path, small, teacher)
    again = load_student(tmp_path, model=tiny.tiny_vit())
    images = tiny.tiny_images(2)
    assert again.plan == small.plan
    assert torch.equal(again.model(images), small.model(images))
    assert prunables(teacher, again)[0].candidate == small.plan["blocks.0.attn"]


def test_sizes_fall_with_the_number_of_pruned_slots(teacher, student):
    sites = prunables(teacher, student)
    order = Order(slots(student.model, sites))
    assert order.sizes(0) == {}
    counts = []
    for pruned in range(0, order.most + 1, 7):
        counts.append(count_params(smaller(teacher, student, sites, order.sizes(pruned)).model))
    assert counts == sorted(counts, reverse=True)
    most = order.sizes(order.most)
    assert most["blocks.0.mlp"] == {"hidden": 8}
    assert most["blocks.0.attn"] == {"units": 4}


def test_the_order_does_not_depend_on_the_scale_of_a_layer(teacher):
    student = all_kept(teacher)
    scaled = Student(plan=student.plan, model=copy.deepcopy(student.model))
    with torch.no_grad():
        for parameter in scaled.model.blocks[0].mlp.parameters():
            parameter.mul_(10)
    sites = prunables(teacher, student)
    one, other = (Order(slots(s.model, sites)) for s in (student, scaled))
    assert one.sizes(90) == other.sizes(90)


@pytest.mark.parametrize("by", ["params", "flops"])
def test_a_target_is_reached_and_hardly_more(teacher, by):
    student = all_kept(teacher)
    sites = prunables(teacher, student)
    gauge = Gauge(by, teacher, Watch())
    found = thresholds(teacher, student, sites, gauge).reach(0.7)
    assert 0.6 < found.share.value <= 0.7
    assert gauge(smaller(teacher, student, sites, found.sizes).model).value == found.share.value


def test_targets_that_cannot_be_reached_or_need_not_are_said(teacher):
    student = all_kept(teacher)
    sites = prunables(teacher, student)
    found = thresholds(teacher, student, sites, Gauge("params", teacher, Watch()))
    with pytest.raises(BudgetOutOfReachError, match=r"target 0\.05 .*out of reach: .* give at least 33%"):
        found.reach(0.05)
    with pytest.raises(MixerzooError, match=r"target 1 .*takes 100\.0% of it as it is; give a lower target"):
        found.reach(1.0)


def test_what_was_measured_for_one_target_serves_the_next(teacher):
    student = all_kept(teacher)
    sites = prunables(teacher, student)
    found = thresholds(teacher, student, sites, Gauge("params", teacher, Watch()))
    first, again = found.reach(0.7), found.reach(0.7)
    assert (again.sizes, again.tries) == (first.sizes, 1)
    assert first.tries < 10
    assert found.reach(0.5).pruned > first.pruned


def test_a_target_missed_when_measured_again_is_pruned_further(teacher):
    student = all_kept(teacher)
    sites = prunables(teacher, student)

    class Drifting(Gauge):
        """Reads 3 % more when it measures for longer."""

        def __call__(self, model, *, rounds=None):
            share = count_params(model) / teacher.params
            return Share(value=share * (1 if rounds is None else 1.03))

    gauge = Drifting("params", teacher, Watch())
    found = thresholds(teacher, student, sites, gauge).reach(0.7)
    assert found.share.value <= 0.7


def test_operations_of_products_and_lstms_are_counted(teacher, student):
    linear = torch.nn.Linear(6, 5)
    assert flops(linear, torch.zeros(3, 6)) == 2 * 3 * 6 * 5
    lstm = torch.nn.LSTM(8, 5, batch_first=True, bidirectional=True)
    assert flops(lstm, torch.zeros(2, 7, 8)) == 2 * 2 * 7 * 2 * 4 * 5 * (8 + 5)
    assert flops(student.model, Watch.example) > 0


@pytest.fixture(scope="module")
def pruner(teacher, student):
    judges = [Judge(teacher, tiny.tiny_batches(40, seed=seed), None) for seed in (5, 6)]
    return Pruner(
        teacher=teacher,
        student=student,
        batches=tiny.tiny_batches(80),
        validation=judges[0],
        test=judges[1],
        gauge=Gauge("params", teacher, Watch()),
        reporter=Reporter(quiet=True),
        lr=1e-2,
        seed=0,
    )


def test_the_penalty_takes_units_out_of_use(pruner):
    before = pruner.in_use(pruner.student.model)
    student, tuned = pruner.penalised(1.0, seconds=None, steps=40)
    assert pruner.in_use(student.model) < before - 0.01
    assert tuned.loss == pytest.approx(
        pruner.validation.evaluate(student.model).loss + pruner.in_use(student.model), rel=1e-4
    )


def test_units_by_norm_keep_more_than_units_by_chance(teacher):
    """At the same sizes, after the same closed-form refit."""
    student = all_kept(teacher)
    judge = Judge(teacher, tiny.tiny_batches(60, seed=5), None)
    pruner = Pruner(
        teacher=teacher,
        student=student,
        batches=tiny.tiny_batches(80),
        validation=judge,
        test=judge,
        gauge=Gauge("params", teacher, Watch()),
        reporter=Reporter(quiet=True),
        lr=1e-3,
        seed=0,
    )
    sizes = pruner.thresholds(student).reach(0.6).sizes
    losses = {}
    for name, choose in (("norm", largest), ("chance", by_chance)):
        losses[name] = judge.evaluate(pruner.refitted(pruner.cut(student, sizes, choose=choose)).model).loss
    assert losses["norm"] < 0.9 * losses["chance"]


def test_the_penalty_is_the_share_of_units_in_use(teacher):
    student = all_kept(teacher)
    sites = prunables(teacher, student)
    penalty = penalty_of(sites)
    assert 0.9 < float(penalty(student.model)) <= 1
    model = copy.deepcopy(student.model)
    for prunable in sites:
        for units in prunable.units.values():
            half = torch.arange(units.size // 2).expand(len(units.rows), -1)
            silence(prunable.module(model), units, half)
    assert 0.4 < float(penalty(model)) < 0.55
