"""Gated MLPs (SwiGLU and kin): found in timm's models, sliced by importance, refitted, pruned and loaded again."""

import pytest
import tiny
import torch
from torch import nn

from mixerzoo.capture import capture
from mixerzoo.distill import Recipe, distill
from mixerzoo.hosts import as_teacher, assemble
from mixerzoo.hosts.timm_vit import TimmVitHost
from mixerzoo.plan import Candidate, Plan
from mixerzoo.pruning.student import all_kept, as_mixer, prunables, smaller
from mixerzoo.refit import refit
from mixerzoo.registry import get_registry
from mixerzoo.score import Judge
from mixerzoo.student import Student, load_student, make_replacement, save_student

HOST = TimmVitHost()


def gated(kind):
    """Return a tiny transformer of timm's with one of its gated MLPs."""
    tiny.guard_torchvision()
    from timm.layers import GluMlp, SwiGLU, SwiGLUPacked

    layer = {"SwiGLU": SwiGLU, "GluMlp": GluMlp, "SwiGLUPacked": SwiGLUPacked}[kind]
    return tiny.tiny_vit(mlp_layer=layer, act_layer=nn.SiLU)


def eva():
    """Return a tiny EVA-02: gated MLPs, rotary positions, blocks that are no nn.Sequential."""
    tiny.guard_torchvision()
    import timm

    options = {"img_size": 28, "depth": 2, "embed_dim": 24, "num_heads": 3, "num_classes": 5}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return timm.create_model("eva02_tiny_patch14_336", pretrained=False, **options).eval()


KINDS = ("SwiGLU", "GluMlp", "SwiGLUPacked")


@pytest.fixture(scope="module", params=KINDS)
def teacher(request):
    return as_teacher(gated(request.param), HOST, name="gated")


def mlps(teacher):
    return [site for site in teacher.sites if site.kind == "mlp"]


def test_gated_mlps_are_sites(teacher):
    assert teacher.rejected == ()
    sites = mlps(teacher)
    assert [site.name for site in sites] == ["blocks.0.mlp", "blocks.1.mlp"]
    for site in sites:
        module = teacher.model.get_submodule(site.name)
        assert (site.gated, site.activation, site.hidden) == (True, "silu", module.fc2.in_features)
        assert site.norm is not None


def test_the_whole_slice_is_the_teachers_own_mlp(teacher):
    """Weights, order of gate and value, activation: nothing is mixed up."""
    x = torch.randn(2, 17, 24)
    for site in mlps(teacher):
        module = teacher.model.get_submodule(site.name)
        with torch.no_grad():
            assert torch.allclose(as_mixer(teacher, module, site)(x), module(x), atol=1e-5)


def test_slices_keep_the_most_important_units_and_more_of_them_are_better(teacher):
    captured = capture(teacher, tiny.tiny_batches(80), 80).sites["blocks.1.mlp"]
    site, spec = teacher.site("blocks.1.mlp"), get_registry().mixers.get("mlp_slice")
    assert captured.view.gate_weight.shape == (site.hidden, site.dim)
    found = {width: distill(spec, width, site, captured, Recipe()) for width in (0.25, 0.5, 0.75)}
    assert all(not one.failed for one in found.values())
    assert found[0.75].nmse < found[0.5].nmse < found[0.25].nmse < 1
    # The second layer is solved again for what is left: better than the teacher's columns of it.
    assert found[0.5].nmse < found[0.5].nmse_start
    mixer = spec.make(site, 0.5)
    with torch.no_grad():
        spec.inherit(mixer, captured.view)
    best = captured.view.importance.topk(mixer.fc2.in_features).indices.sort().values
    assert torch.equal(mixer.fc2.weight, captured.view.out_weight[:, best])


def test_a_student_with_slices_is_refitted_saved_and_loaded(teacher, tmp_path):
    captured = capture(teacher, tiny.tiny_batches(40), 40).sites
    spec, candidate = get_registry().mixers.get("mlp_slice"), Candidate("mlp_slice", 0.5)
    modules = {}
    for site in mlps(teacher):
        modules[site.name] = make_replacement(candidate, site)
        with torch.no_grad():
            spec.inherit(modules[site.name].mixer, captured[site.name].view)
    judge = Judge(teacher, tiny.tiny_batches(40, seed=4), None)
    stitched = judge.evaluate_modules(modules).loss
    model = refit(teacher, modules, dict.fromkeys(modules, "mlp_slice"), tiny.tiny_batches(60))
    assert judge.evaluate(model).loss < stitched
    plan = Plan.of(dict.fromkeys(modules, candidate), teacher.sites)
    save_student(tmp_path, Student(plan=plan, model=model), teacher)
    images = tiny.tiny_images(2)
    again = load_student(tmp_path, model=assemble(teacher.model, {}))
    assert torch.equal(again.model(images), model(images))


def test_gated_units_are_pruned(teacher):
    student = all_kept(teacher)
    sites = prunables(teacher, student)
    small = smaller(teacher, student, sites, {"blocks.0.mlp": {"hidden": 16}})
    assert small.model.blocks[0].mlp.mixer.fc1.weight.shape == (2 * 16, 24)
    assert str(small.plan["blocks.0.mlp"]) == "mlp_slice@1[hidden=16]"
    assert small.model(tiny.tiny_images(2)).shape == (2, 10)


def test_the_mlps_of_eva_are_sites_that_can_be_refitted():
    teacher = as_teacher(eva(), HOST, name="eva")
    assert [(site.name, site.gated, site.norm) for site in teacher.sites] == [
        (f"blocks.{i}.mlp", True, f"blocks.{i}.norm2") for i in range(2)
    ]
    assert all("rope" in rejected.reason for rejected in teacher.rejected)
    student = all_kept(teacher)
    small = smaller(teacher, student, prunables(teacher, student), {"blocks.0.mlp": {"hidden": 16}})
    images = torch.randn(2, 3, 28, 28)
    assert small.model(images).shape == teacher.model(images).shape


def test_norms_among_the_hidden_units_are_said():
    tiny.guard_torchvision()
    from timm.layers import SwiGLU

    _, rejected = HOST.find_sites(tiny.tiny_vit(mlp_layer=SwiGLU, scale_mlp_norm=True))
    assert all("more than fc2(act(gate) * value)" in one.reason for one in rejected)
    assert len(rejected) == 2
