"""The sequential refit: closer to the teacher on images it has not seen, exact where it can be."""

import copy
import math
from contextlib import contextmanager

import pytest
import tiny
import torch
from torch import nn

from mixerzoo import MixerSpec, hookimpl
from mixerzoo.capture import capture
from mixerzoo.data import image_batches
from mixerzoo.distill import Recipe, distill
from mixerzoo.hosts import Replacement, as_teacher, assemble, fingerprint, run_stages
from mixerzoo.hosts.timm_vit import TimmVitHost
from mixerzoo.opening import open_data, open_teacher
from mixerzoo.pairs import held_out_rows
from mixerzoo.plan import Candidate
from mixerzoo.readout import FeatureTap, solve_classifier
from mixerzoo.refit import Stitched, refit, refit_students, stitch
from mixerzoo.registry import get_registry, temporary_plugin
from mixerzoo.ridge import PENALTIES
from mixerzoo.score import Judge
from mixerzoo.student import make_replacement

IMAGES = 96
TEACHERS = {
    "plain": {},
    "scaled": {"init_values": 0.3},
    "registers": {"init_values": 0.5, "reg_tokens": 2},
    "embedding": {"num_classes": 0},
}


def calibration():
    return tiny.tiny_batches(IMAGES, batch_size=16)


def held_out():
    return tiny.tiny_batches(32, batch_size=16, seed=77)


def stitched(teacher, names, batches=None):
    """Distil a mixer for every named site, teacher-forced."""
    batches = calibration() if batches is None else batches
    captured = capture(teacher, batches, sum(map(len, batches)))
    modules = {}
    for name, mixer in names.items():
        site, spec = teacher.site(name), get_registry().mixers.get(mixer)
        width = max(spec.widths)
        result = distill(spec, width, site, captured.sites[name], Recipe())
        assert not result.failed
        modules[name] = make_replacement(Candidate(mixer, width), site, result.state)
    return modules


@torch.inference_mode()
def drift(teacher, student, batches):
    """Return the relative error of a student's hidden state behind the last block."""
    if isinstance(student, dict):
        student = assemble(teacher.model, student)
    stages, others = (teacher.host.stages(model)[:-1] for model in (teacher.model, student))
    x = torch.cat(batches)
    true, given = run_stages(stages, x), run_stages(others, x)
    return float((given - true).square().sum() / (true - true.mean((0, 1))).square().sum())


def attention_sites(teacher):
    return [site for site in teacher.sites if site.kind == "attention"]


def states(modules):
    return {name: {k: v.clone() for k, v in m.state_dict().items()} for name, m in modules.items()}


def changed(before, after):
    return {
        name for name in before if any(not torch.equal(before[name][k], after[name][k]) for k in before[name])
    }


@pytest.mark.parametrize("options", TEACHERS.values(), ids=TEACHERS)
@pytest.mark.parametrize("mixer", ["static", "linear_attention", "pool", "linear"])
def test_a_refitted_student_is_closer_to_its_teacher(options, mixer):
    teacher = tiny.tiny_teacher(**options)
    names = {site.name: mixer for site in attention_sites(teacher)}
    modules = stitched(teacher, names)
    before = drift(teacher, modules, held_out())
    after = drift(teacher, refit(teacher, modules, names, calibration()), held_out())
    assert after < before


@pytest.mark.parametrize("options", TEACHERS.values(), ids=TEACHERS)
def test_with_narrower_mlps_too(options):
    teacher = tiny.tiny_teacher(**options)
    names = {site.name: "static" if site.kind == "attention" else "mlp_slice" for site in teacher.sites}
    modules = stitched(teacher, names)
    before = drift(teacher, modules, held_out())
    student = refit(teacher, modules, names, calibration())
    assert drift(teacher, student, held_out()) < before


def test_the_loss_of_a_trained_teacher_falls():
    teacher, data = open_teacher("digits_vit"), open_data("digits")
    batches, others = (
        list(image_batches(data, part, teacher.image, 16))
        for part in (data.splits.calibration[:64], data.splits.validation[:48])
    )
    names = {site.name: "pool" for site in attention_sites(teacher)}
    modules = stitched(teacher, names, batches)
    the_judge = Judge(teacher, others, None)
    before = the_judge.evaluate_modules(modules)
    after = the_judge.evaluate(refit(teacher, modules, names, batches))
    assert after.loss < 0.9 * before.loss


def test_a_site_corrects_the_drift_before_it():
    teacher = tiny.tiny_teacher()
    first, last = teacher.sites[0], teacher.sites[-1]
    names = {first.name: "none", last.name: "mlp_slice"}
    modules = stitched(teacher, names)
    alone = drift(teacher, {first.name: modules[first.name]}, held_out())
    student = refit(teacher, modules, names, calibration())
    assert drift(teacher, student, held_out()) < alone


def test_sites_without_a_readout_are_left_alone():
    teacher = tiny.tiny_teacher()
    names = dict(
        zip([site.name for site in teacher.sites], ["none", "mlp_slice", "static", "none"], strict=True)
    )
    modules = stitched(teacher, names)
    before = states(modules)
    refit(teacher, modules, names, calibration())
    assert changed(before, states(modules)) == {teacher.sites[1].name, teacher.sites[2].name}


def test_sites_off_the_residual_stream_are_left_alone():
    from timm.models.vision_transformer import ResPostBlock

    teacher = tiny.tiny_teacher(block_fn=ResPostBlock)
    names = {site.name: "pool" for site in attention_sites(teacher)}
    modules = stitched(teacher, names)
    before = states(modules)
    refit(teacher, modules, names, calibration())
    assert changed(before, states(modules)) == set()


def test_a_teacher_in_one_piece_can_be_refitted():
    class OneStage(TimmVitHost):
        def stages(self, model):
            return [model]

    whole = tiny.tiny_teacher()
    teacher = as_teacher(tiny.tiny_vit(), OneStage(), name="one")
    assert {site.stage for site in teacher.sites} == {0}
    names = {site.name: "pool" for site in attention_sites(teacher)}
    modules, others = stitched(teacher, names), stitched(whole, names)
    refit(teacher, modules, names, calibration())
    refit(whole, others, names, calibration())
    for name in names:
        for key, tensor in modules[name].state_dict().items():
            torch.testing.assert_close(tensor, others[name].state_dict()[key], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("options", [{}, {"init_values": 0.3}], ids=["plain", "scaled"])
def test_whole_mlps_are_exact(options):
    teacher = tiny.tiny_teacher(**options)
    site = teacher.sites[1]
    spec = get_registry().mixers.get("mlp_slice")
    modules = {site.name: Replacement(spec.make(site, 1.0).eval().requires_grad_(False), site, masks=True)}
    mlp, mixer = teacher.model.get_submodule(site.name), modules[site.name].mixer
    mixer.fc1.load_state_dict(mlp.fc1.state_dict())
    mixer.fc2.weight.copy_(torch.randn(24, 96))  # the readout is to be found
    assert drift(teacher, modules, held_out()) > 0.1
    refit(teacher, modules, {site.name: "mlp_slice"}, calibration())
    assert drift(teacher, modules, held_out()) < 1e-6
    torch.testing.assert_close(mixer.fc2.weight, mlp.fc2.weight, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("options", [{}, {"init_values": 0.3}], ids=["plain", "scaled"])
def test_linear_mixers_are_exact_where_the_attention_is_linear(options):
    model = tiny.tiny_vit(**options)
    for block in model.blocks:
        with (
            torch.no_grad()
        ):  # every token looks at itself alone: attention becomes a linear map of the token
            block.attn.qkv.weight[: 2 * 24] = 0
            block.attn.qkv.bias[: 2 * 24] = 0
        block.attn.__class__ = _OnlyItself
    teacher = as_teacher(model, _LinearHost(), name="linear")
    names = {site.name: "linear" for site in attention_sites(teacher)}
    modules = {site.name: make_replacement(Candidate("linear"), site) for site in attention_sites(teacher)}
    assert drift(teacher, modules, held_out()) > 0.1
    student = refit(teacher, modules, names, calibration())
    assert drift(teacher, student, held_out()) < 1e-6


class _OnlyItself(nn.Module):
    def forward(self, x, attn_mask=None, is_causal=False):
        return self.proj(self.qkv(x)[..., 2 * x.shape[-1] :])


class _LinearHost(TimmVitHost):
    """Takes these modules for attention, which they are not."""

    def _misbehaves(self, module, kind, call):
        return None if isinstance(module, _OnlyItself) else super()._misbehaves(module, kind, call)


def test_the_teacher_is_left_alone_and_hooks_are_gone():
    teacher = tiny.tiny_teacher()
    names = {site.name: "static" for site in attention_sites(teacher)}
    modules = stitched(teacher, names)
    refit(teacher, modules, names, calibration())
    assert fingerprint(teacher.model) == teacher.fingerprint
    for model in (teacher.model, *modules.values()):
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("options", TEACHERS.values(), ids=TEACHERS)
def test_students_refitted_beside_one_pass_of_the_teacher_are_as_refitted_alone(options):
    teacher = tiny.tiny_teacher(**options)
    attention = [site.name for site in attention_sites(teacher)]
    plans = [
        dict.fromkeys(attention, "static"),
        {teacher.sites[-1].name: "mlp_slice"},  # begins as the teacher does
        {attention[0]: "none", teacher.sites[1].name: "mlp_slice"},
        {},
    ]
    made = [stitched(teacher, names) for names in plans]
    alone = [
        refit(teacher, copy.deepcopy(modules), names, calibration())
        for modules, names in zip(made, plans, strict=True)
    ]
    together = [stitch(teacher, modules, names) for modules, names in zip(made, plans, strict=True)]
    refit_students(teacher, together, calibration())
    for one, other in zip(alone, together, strict=True):
        for name, tensor in one.state_dict().items():
            assert torch.equal(tensor, other.student.state_dict()[name]), name


def test_progress_counts_sites():
    teacher = tiny.tiny_teacher()
    seen = []
    refit(teacher, {}, {}, calibration()[:2], on_site=seen.append)
    assert seen == [1, 2, 3, 4]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_few_batches_do(count):
    teacher = tiny.tiny_teacher()
    names = {site.name: "linear" for site in attention_sites(teacher)}
    modules = stitched(teacher, names)
    before = drift(teacher, modules, held_out())
    student = refit(teacher, modules, names, tiny.tiny_batches(64 * count, batch_size=64))
    assert drift(teacher, student, held_out()) < before


@pytest.mark.parametrize("count", [2, 5])
def test_the_last_fifth_of_the_images_chooses_the_penalty(count, monkeypatch):
    from mixerzoo import readout as module

    grams = []
    solve = module.solve

    def seen(train, choose, **options):
        grams.append((train.rows, choose.rows))
        return solve(train, choose, **options)

    monkeypatch.setattr(module, "solve", seen)
    teacher = tiny.tiny_teacher()
    site = teacher.sites[0]
    modules = {site.name: make_replacement(Candidate("linear"), site)}
    refit(teacher, modules, {site.name: "linear"}, tiny.tiny_batches(5 * count, batch_size=4))
    # Two MLPs as well, and the classifier, which has a row an image.
    assert grams == [(17 * 4 * count, 17 * count)] * 3 + [(4 * count, count)]


def test_a_site_is_solved_on_all_images_of_a_refit_and_on_those_of_some_tokens_else(monkeypatch):
    from mixerzoo import readout as module
    from mixerzoo import refit as refitting

    rows, given = [], []
    solve, solve_readout = module.solve, module.solve_readout

    def solved(train, choose, **options):
        rows.append(train.rows)
        return solve(train, choose, **options)

    def asked(*args, seen, **options):
        given.append(seen)
        for few in (seen, 17 * 3):
            found = solve_readout(*args, seen=few, **options)
        return found

    monkeypatch.setattr(module, "solve", solved)
    monkeypatch.setattr(refitting, "solve_readout", asked)
    teacher = tiny.tiny_teacher()
    site = teacher.sites[0]
    modules = {site.name: make_replacement(Candidate("linear"), site)}
    refit(teacher, modules, {site.name: "linear"}, tiny.tiny_batches(20, batch_size=4), kept=False)
    assert given == [None]
    assert rows == [17 * 16, 17 * 3]


def test_too_few_images_do_no_harm():
    """More features than rows: what the calibration images say about it is noise."""
    teacher = tiny.tiny_teacher()
    names = {site.name: "mlp_slice" for site in teacher.sites if site.kind == "mlp"}
    spec = get_registry().mixers.get("mlp_slice")
    modules = {}
    for name in names:
        site, mlp = teacher.site(name), teacher.model.get_submodule(name)
        modules[name] = Replacement(spec.make(site, 1.0).eval().requires_grad_(False), site, masks=True)
        modules[name].mixer.load_state_dict(mlp.state_dict())  # nothing is left to be gained
    student = refit(teacher, modules, names, tiny.tiny_batches(3, batch_size=1))
    assert drift(teacher, student, held_out()) < 1e-4


def test_a_readout_without_a_bias():
    class NoBias(nn.Module):
        def __init__(self, dim):
            super().__init__()
            self.readout = nn.Linear(dim, dim, bias=False)

        def forward(self, x):
            return self.readout(x)

    class Plugin:
        @hookimpl
        def register_mixers(self, register):
            register(MixerSpec(name="no_bias", build=NoBias, summary="-", readout="readout"))

    with temporary_plugin(Plugin()):
        teacher = tiny.tiny_teacher()
        names = {site.name: "no_bias" for site in attention_sites(teacher)}
        modules = stitched(teacher, names)
        before = drift(teacher, modules, held_out())
        student = refit(teacher, modules, names, calibration())
        assert drift(teacher, student, held_out()) < before


def watched(model, site, x):
    """Run a model whole; return the residual stream before a site, and the site's input and output."""
    seen = {}
    handles = [
        model.get_submodule(site.norm).register_forward_pre_hook(
            lambda _m, args: seen.__setitem__("residual", args[0])
        ),
        model.get_submodule(site.name).register_forward_hook(
            lambda _m, args, out: seen.update(x=args[0], y=out)
        ),
    ]
    model(x)
    for handle in handles:
        handle.remove()
    return seen["residual"], seen["x"], seen["y"]


@torch.no_grad()
def slow_refit(teacher, modules, names, x, *, kept):
    """Refit as the mathematics have it: whole models for every site, targets over the gain, one solve a penalty."""
    student = copy.deepcopy(assemble(teacher.model, modules))
    first = min(teacher.site(name).index for name in names)
    for site in teacher.sites:
        mixer = student.get_submodule(site.name)
        if site.name in names:
            mixer = mixer.mixer
            layer = mixer.get_submodule(get_registry().mixers.get(names[site.name]).readout)
        elif kept and site.index > first and site.kind == "mlp":
            layer = mixer.fc2
        else:
            continue
        true, _, wanted = watched(teacher.model, site, x)
        given, into, _ = watched(student, site, x)
        gain = 1 if site.scale is None else teacher.model.get_submodule(site.scale).gamma
        with FeatureTap(layer) as tap:
            mixer(into)
        slow_solve(layer, tap.features(), (true + gain * wanted - given) / gain, gain)
    if kept and teacher.classifier:
        with FeatureTap(student.head) as tap:
            student(x)
        slow_solve(student.head, tap.features(), teacher.model(x), 1, clear=2.0)
    return student


def slow_solve(layer, features, target, gain, *, clear=-math.inf):
    """Solve a layer from features and targets of all images, in order; `clear`: standard errors of its gain."""
    images = len(target)
    z = features.reshape(images, -1, layer.in_features).double()
    z, target = (
        torch.cat([z, torch.ones_like(z[..., :1])], -1),
        target.reshape(images, -1, target.shape[-1]).double(),
    )
    train, held_out = held_out_rows(images)
    rows, rest = (part.flatten(0, 1) for part in (z[train], z[held_out]))
    start = torch.cat([layer.weight.T, layer.bias[None]]).double()
    solutions = [start]
    for penalty in (*PENALTIES, 1.0, 10.0):
        ridge = torch.eye(z.shape[-1], dtype=z.dtype) * penalty * rows[:, :-1].square().sum(0).mean()
        ridge[-1, -1] = 1e-9 * len(rows)
        missing = target[train].flatten(0, 1) - rows @ start
        solutions.append(start + torch.linalg.solve(rows.T @ rows + ridge, rows.T @ missing))
    rows_left = [(gain * (rest @ s - target[held_out].flatten(0, 1))).square().sum(-1) for s in solutions]
    errors = [one.sum().item() for one in rows_left]
    best = solutions[errors.index(min(errors))].float()
    gained = rows_left[0] - min(rows_left, key=lambda one: one.sum().item())
    if not gained.mean() > clear * gained.std() / len(gained) ** 0.5:
        return
    layer.weight.copy_(best[:-1].T)
    layer.bias.copy_(best[-1])


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "alone"])
@pytest.mark.parametrize("options", TEACHERS.values(), ids=TEACHERS)
@pytest.mark.parametrize("kinds", [("attention",), ("mlp",), ("attention", "mlp")], ids="+".join)
def test_it_is_what_the_slow_way_gives(options, kinds, kept):
    teacher = tiny.tiny_teacher(**options)
    mixers = {"attention": "static", "mlp": "mlp_slice"}
    names = {site.name: mixers[site.kind] for site in teacher.sites if site.kind in kinds}
    modules, others = stitched(teacher, names), stitched(teacher, names)
    student = refit(teacher, modules, names, calibration(), kept=kept)
    other = slow_refit(teacher, others, names, torch.cat(calibration()), kept=kept)
    x = torch.cat(held_out())
    with torch.no_grad():
        torch.testing.assert_close(student(x), other(x), rtol=1e-3, atol=1e-3)


def count_images(model):
    """Return module -> images that it has seen in batches; of its students' modules too."""
    counts = dict.fromkeys(dict(model.named_modules()), 0)
    for name, module in model.named_modules():

        def seen(_module, args, name=name):
            if len(args[0]) > 1:  # a host looks at one image to see whether its stages are right
                counts[name] += len(args[0])

        module.register_forward_pre_hook(seen)
    return counts


def test_no_more_is_run_than_has_to_be():
    teacher = tiny.tiny_teacher(depth=4)
    names = {site.name: "linear" for site in attention_sites(teacher)[1:3]}
    modules = stitched(teacher, names)
    counts = count_images(teacher.model)
    refit(teacher, modules, names, calibration(), kept=False)
    # The stages before the first site are the teacher's, and nothing behind the last site is needed.
    assert counts["patch_embed"] == counts["blocks.0.mlp"] == IMAGES
    assert counts["blocks.1.attn"] == counts["blocks.2.attn"] == IMAGES
    assert counts["blocks.1.mlp"] == 2 * IMAGES  # of the teacher, and of the student on its way on
    assert counts["blocks.2.mlp"] == counts["blocks.3.attn"] == counts["head"] == 0


def test_the_teacher_runs_once_where_kept_modules_are_refitted_too():
    teacher = tiny.tiny_teacher(depth=4)
    name = attention_sites(teacher)[1].name
    modules = stitched(teacher, {name: "linear"})
    counts = count_images(teacher.model)
    refit(teacher, modules, {name: "linear"}, calibration())
    assert counts["patch_embed"] == counts["blocks.0.mlp"] == counts["blocks.1.attn"] == IMAGES
    assert counts["head"] == 2 * IMAGES  # of the teacher, and of the student


@pytest.mark.parametrize("mixer", ["none", "pool"])
def test_kept_mlps_behind_a_replaced_site_are_corrected_and_no_others(mixer):
    teacher = tiny.tiny_teacher(depth=3, init_values=0.3)
    name = attention_sites(teacher)[1].name
    modules = {name: make_replacement(Candidate(mixer), teacher.site(name))}
    before = drift(teacher, modules, held_out())
    alone = drift(teacher, refit(teacher, modules, {name: mixer}, calibration(), kept=False), held_out())
    student = refit(teacher, modules, {name: mixer}, calibration())
    assert drift(teacher, student, held_out()) < alone <= before
    true, given = teacher.model.state_dict(), student.state_dict()
    layers = ("blocks.1.mlp.fc2", "blocks.2.mlp.fc2")
    changed = {key for key in true.keys() & given.keys() if not torch.equal(true[key], given[key])}
    assert {key for key in changed if not key.startswith("head.")} == {
        f"{layer}.{part}" for layer in layers for part in ("weight", "bias")
    }
    for layer in (*layers, "head"):  # a student goes on to share all else
        assert student.get_submodule(layer).weight is not teacher.model.get_submodule(layer).weight
    assert student.blocks[2].mlp.fc1.weight is teacher.model.blocks[2].mlp.fc1.weight
    assert not any(parameter.requires_grad for parameter in student.parameters())


def test_modules_whose_last_layer_the_host_cannot_name_are_left_alone():
    class Wordless(TimmVitHost):
        def output_layer(self, module, site):
            return None

        def classifier_layer(self, model):
            return None

    teacher = as_teacher(tiny.tiny_vit(), Wordless(), name="wordless")
    name = teacher.sites[0].name
    modules = stitched(teacher, {name: "pool"})
    student = refit(teacher, modules, {name: "pool"}, calibration())
    true, given = teacher.model.state_dict(), student.state_dict()
    assert all(torch.equal(true[key], given[key]) for key in true.keys() & given.keys())


class Curved(nn.Module):
    """A readout behind a hidden layer: there is something to learn before it."""

    def __init__(self, dim):
        super().__init__()
        self.inner = nn.Linear(dim, 4)
        self.readout = nn.Linear(4, dim)

    def forward(self, x):
        return self.readout(torch.tanh(self.inner(x + x.mean(1, keepdim=True))))


class Open(Curved):
    """The same, with the last layer not named."""


class Spoilt(Curved):
    """Was finite when it was distilled, and is not any more."""

    spoilt = False

    def forward(self, x):
        return super().forward(x) * (float("nan") if self.spoilt else 1.0)


@contextmanager
def curved():
    class Plugin:
        @hookimpl
        def register_mixers(self, register):
            for name, build, readout in (
                ("curved", Curved, "readout"),
                ("open", Open, None),
                ("spoilt", Spoilt, "readout"),
            ):
                register(MixerSpec(name=name, build=build, summary="-", readout=readout))

    with temporary_plugin(Plugin()):
        yield


@pytest.mark.parametrize("options", [{}, {"init_values": 0.3}], ids=["plain", "scaled"])
@pytest.mark.parametrize("mixer", ["curved", "open"])
def test_steps_go_on_where_the_closed_form_ends(options, mixer):
    with curved():
        teacher = tiny.tiny_teacher(**options)
        names = {site.name: mixer for site in attention_sites(teacher)}
        closed, stepped = stitched(teacher, names), stitched(teacher, names)
        refit(teacher, closed, names, calibration(), kept=False)
        refit(teacher, stepped, names, calibration(), kept=False, steps=200)
    assert drift(teacher, stepped, held_out()) < 0.95 * drift(teacher, closed, held_out())
    for module in stepped.values():
        assert not any(parameter.requires_grad for parameter in module.parameters())
        assert not any(m.training for m in module.modules())


def test_steps_are_the_same_for_the_same_seed_and_leave_the_generator_alone():
    with curved():
        teacher = tiny.tiny_teacher()
        names = {site.name: "curved" for site in attention_sites(teacher)}
        made = [stitched(teacher, names) for _ in range(3)]
        before = torch.random.get_rng_state()
        for seed, modules in zip((0, 0, 1), made, strict=True):
            refit(teacher, modules, names, calibration(), kept=False, steps=5, seed=seed)
        assert torch.equal(torch.random.get_rng_state(), before)
        one, same, other = map(states, made)
    assert changed(one, same) == set()
    assert changed(one, other) == set(names)


def test_a_mixer_that_is_not_finite_here_stays_as_it_was(monkeypatch):
    with curved():
        teacher = tiny.tiny_teacher()
        names = {site.name: "spoilt" for site in attention_sites(teacher)}
        modules = stitched(teacher, names)
        before = states(modules)
        monkeypatch.setattr(Spoilt, "spoilt", True)
        student = refit(teacher, modules, names, calibration(), steps=3)
        assert changed(before, states(modules)) == set()
        true, given = teacher.model.state_dict(), student.state_dict()
        assert all(torch.equal(true[key], given[key]) for key in true.keys() & given.keys())


def test_steps_train_no_kept_module():
    with curved():
        teacher = tiny.tiny_teacher()
        name = attention_sites(teacher)[0].name
        student = refit(
            teacher, stitched(teacher, {name: "curved"}), {name: "curved"}, calibration(), steps=5
        )
        assert fingerprint(teacher.model) == teacher.fingerprint
        assert student.blocks[0].mlp.fc1.weight is teacher.model.blocks[0].mlp.fc1.weight
        assert not torch.equal(student.blocks[0].mlp.fc2.weight, teacher.model.blocks[0].mlp.fc2.weight)


@pytest.mark.parametrize("tiny_gain", [0.0, 1e-9, 1e-5, -1e-5])
def test_a_gain_near_nothing_does_no_harm(tiny_gain):
    """Divided by it, the drift before the site would drown every other channel."""
    model = tiny.tiny_vit(init_values=0.3)
    with torch.no_grad():
        for block in model.blocks:
            block.ls1.gamma[:6] = tiny_gain
    teacher = as_teacher(model, TimmVitHost(), name="tiny")
    names = {site.name: "static" if site.kind == "attention" else "mlp_slice" for site in teacher.sites}
    modules = stitched(teacher, names)
    before, was = drift(teacher, modules, held_out()), states(modules)
    student = refit(teacher, modules, names, calibration())
    assert drift(teacher, student, held_out()) < before
    for name in (site.name for site in attention_sites(teacher)):
        readout = modules[name].mixer.readout
        assert readout.weight.abs().max() < 1e2
        assert torch.equal(readout.weight[:6], was[name]["mixer.readout.weight"][:6])
        assert not torch.equal(readout.weight[6:], was[name]["mixer.readout.weight"][6:])


def test_one_image_changes_nothing():
    teacher = tiny.tiny_teacher()
    names = {site.name: "linear" for site in attention_sites(teacher)}
    modules = stitched(teacher, names)
    before = states(modules)
    refit(teacher, modules, names, tiny.tiny_batches(1))
    assert changed(before, states(modules)) == set()


def test_large_activations_are_kept_in_bfloat16(monkeypatch):
    from mixerzoo import sides

    monkeypatch.setattr(sides, "LARGE", 0)
    teacher = tiny.tiny_teacher()
    names = {site.name: "static" for site in attention_sites(teacher)}
    modules = stitched(teacher, names)
    before = drift(teacher, modules, held_out())
    student = refit(teacher, modules, names, calibration())
    assert drift(teacher, student, held_out()) < before


@pytest.mark.parametrize("kept", [True, False])
def test_a_student_whose_other_weights_have_changed(kept):
    teacher = tiny.tiny_teacher()
    names = {site.name: "static" for site in attention_sites(teacher)}
    student = copy.deepcopy(assemble(teacher.model, stitched(teacher, names)))
    with torch.no_grad():
        for parameter in student.patch_embed.parameters():
            parameter.mul_(1.1)
    others = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    x = torch.cat(held_out())
    with torch.no_grad():
        before = (student(x) - teacher.model(x)).square().mean()
        refit_students(teacher, [Stitched(student=student, mixers=names)], calibration(), kept=kept)
        assert (student(x) - teacher.model(x)).square().mean() < before
    after = student.state_dict()
    mlps = [f"blocks.{number}.mlp.fc2.{part}" for number in (0, 1) for part in ("weight", "bias")]
    assert {name for name in others if not torch.equal(others[name], after[name])} == {
        *(f"{name}.mixer.readout.{part}" for name in names for part in ("weight", "bias")),
        *((*mlps, "head.weight", "head.bias") if kept else ()),
    }


@torch.inference_mode()
def logits_error(teacher, student, batches):
    true, given = (torch.cat([model(batch) for batch in batches]) for model in (teacher.model, student))
    return float((given - true).square().sum() / (true - true.mean(0)).square().sum())


@pytest.mark.parametrize("one_piece", [False, True])
def test_the_classifier_makes_up_for_what_is_left(one_piece, monkeypatch):
    if one_piece:
        monkeypatch.setattr(TimmVitHost, "stages", lambda self, model: [model])
    teacher, data = open_teacher("digits_vit"), open_data("digits")
    batches, others = (
        list(image_batches(data, part, teacher.image, 16))
        for part in (data.splits.calibration[:256], data.splits.validation[:96])
    )
    before = fingerprint(teacher.model)
    name = attention_sites(teacher)[-1].name
    errors = []
    for alone in (False, True):
        if alone:
            monkeypatch.setattr(TimmVitHost, "classifier_layer", lambda self, model: None)
        modules = {name: make_replacement(Candidate("none"), teacher.site(name))}
        errors.append(logits_error(teacher, refit(teacher, modules, {name: "none"}, batches), others))
    assert errors[0] < 0.95 * errors[1]
    assert fingerprint(teacher.model) == before


def test_a_classifier_that_is_more_than_one_layer_is_left_alone(monkeypatch):
    teacher = tiny.tiny_teacher()
    teacher.model.head = nn.Sequential(teacher.model.head, nn.Tanh())
    names = {site.name: "pool" for site in attention_sites(teacher)}
    assert teacher.host.classifier_layer(teacher.model) is None
    # Nor where a host takes it for one.
    monkeypatch.setattr(TimmVitHost, "classifier_layer", lambda self, model: "head.0")
    student = refit(teacher, stitched(teacher, names), names, calibration())
    assert torch.equal(student.head[0].weight, teacher.model.head[0].weight)


def test_images_that_say_nothing_of_a_classifier_leave_it_as_it_is():
    layer = nn.Linear(16, 3)
    before = layer.weight.clone()
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(40, 16, generator=generator)
    solve_classifier(layer, features, layer(features).detach())  # it is right already
    torch.testing.assert_close(layer.weight, before)
    wanted = layer(features).detach() + torch.randn(40, 3, generator=generator)  # noise
    solve_classifier(layer, features, wanted)
    assert (layer.weight - before).abs().max() < 0.3
    layer = nn.Linear(16, 3, bias=False)
    solve_classifier(layer, features, features[:, :3])
    torch.testing.assert_close(layer.weight, torch.eye(16)[:3], atol=0.05, rtol=0)


@pytest.mark.parametrize("options", TEACHERS.values(), ids=TEACHERS)
def test_the_host_names_the_layer_that_a_module_ends_in(options):
    teacher = tiny.tiny_teacher(**options)
    for site in teacher.sites:
        module = teacher.model.get_submodule(site.name)
        layer = module.get_submodule(teacher.host.output_layer(module, site))
        x = torch.randn(2, site.tokens, site.dim)
        with FeatureTap(layer) as tap, torch.no_grad():
            torch.testing.assert_close(module(x), layer(tap.features()).reshape(x.shape))
