"""The capture pass against hooks on the model: activations, mean maps, importances, contributions."""

import gc
import math

import pytest
import tiny
import torch
from torch import nn

from mixerzoo.capture import SAMPLE_IMAGES, capture
from mixerzoo.elimination import importance
from mixerzoo.spec import AttentionView, MlpView

IMAGES = 11
BATCH = 4


def batches():
    return tiny.tiny_batches(IMAGES, batch_size=BATCH)


@pytest.fixture(scope="module", params=[{}, {"init_values": 0.3, "reg_tokens": 2}], ids=["plain", "scaled"])
def both(request):
    """A teacher, its capture, and what hooks see of it: site -> (x, y, residual stream before it)."""
    teacher = tiny.tiny_teacher(**request.param)
    seen = {site.name: [[], [], []] for site in teacher.sites}
    handles = []
    for site in teacher.sites:
        kept = seen[site.name]
        handles += [
            teacher.model.get_submodule(site.name).register_forward_hook(
                lambda _m, args, out, kept=kept: (kept[0].append(args[0]), kept[1].append(out), None)[-1]
            ),
            teacher.model.get_submodule(site.norm).register_forward_pre_hook(
                lambda _m, args, kept=kept: kept[2].append(args[0])
            ),
        ]
    with torch.no_grad():
        teacher.model(torch.cat(batches()))
    for handle in handles:
        handle.remove()
    direct = {name: tuple(torch.cat(part) for part in kept) for name, kept in seen.items()}
    return teacher, capture(teacher, batches(), IMAGES), direct


def test_activations_are_those_of_the_model(both):
    teacher, found, direct = both
    assert list(found.sites) == [site.name for site in teacher.sites]
    for site in teacher.sites:
        x, y, _ = direct[site.name]
        kept = found.sites[site.name]
        for tensor, expected in ((kept.x, x), (kept.y, y)):
            assert tensor.dtype == torch.bfloat16
            assert tensor.shape == (IMAGES, site.tokens, site.dim)
            torch.testing.assert_close(tensor.float(), expected, rtol=2**-7, atol=1e-4)


def test_mean_maps_are_the_mean_of_the_maps(both):
    teacher, found, direct = both
    for site in teacher.sites:
        if site.kind != "attention":
            continue
        module = teacher.model.get_submodule(site.name)
        maps = teacher.host.attention_maps(module, direct[site.name][0])
        view = found.sites[site.name].view
        assert isinstance(view, AttentionView)
        torch.testing.assert_close(view.mean_attention, maps.mean(0), rtol=1e-4, atol=1e-6)
        assert torch.equal(view.out_weight, module.proj.weight)


def test_importance_is_what_is_lost_with_a_unit(both):
    teacher, found, direct = both
    for site in teacher.sites:
        if site.kind != "mlp":
            continue
        module = teacher.model.get_submodule(site.name)
        hidden = teacher.host.hidden_units(module, direct[site.name][0])
        expected = importance(hidden.flatten(0, 1).double().T.cov(correction=0), module.fc2.weight)
        view = found.sites[site.name].view
        assert isinstance(view, MlpView)
        torch.testing.assert_close(view.importance, expected, rtol=1e-2, atol=1e-4)


def test_contribution_is_what_is_added_over_what_it_is_added_to(both):
    teacher, found, direct = both
    for site in teacher.sites:
        _, y, residual = direct[site.name]
        if site.scale is not None:
            y = teacher.model.get_submodule(site.scale)(y)
        expected = float(y.norm() / residual.norm())
        assert found.statistics[site.name]["contribution"] == pytest.approx(expected, rel=1e-4)


def test_without_a_residual_stream_there_is_no_contribution():
    from timm.models.vision_transformer import ResPostBlock

    teacher = tiny.tiny_teacher(block_fn=ResPostBlock)
    found = capture(teacher, batches(), IMAGES)
    assert all(math.isnan(one["contribution"]) for one in found.statistics.values())


def test_statistics_are_json_ready_numbers(both):
    _, found, _ = both
    for statistics in found.statistics.values():
        assert all(type(value) is float for value in statistics.values())


def test_maps_are_not_recomputed_for_ever(monkeypatch):
    teacher = tiny.tiny_teacher()
    seen = []
    maps = type(teacher.host).attention_maps

    def counted(self, module, x):
        seen.append(len(x))
        return maps(self, module, x)

    monkeypatch.setattr(type(teacher.host), "attention_maps", counted)
    count = SAMPLE_IMAGES + 40
    capture(teacher, tiny.tiny_batches(count, batch_size=32), count)
    assert sum(seen) == 2 * SAMPLE_IMAGES  # two attention sites


def test_progress_counts_images(both):
    teacher, _, _ = both
    seen = []
    capture(teacher, batches(), IMAGES, on_batch=seen.append)
    assert seen == [4, 8, 11]


def test_hooks_are_gone_afterwards_even_after_an_error(both, tmp_path):
    teacher, _, _ = both

    def broken():
        yield batches()[0]
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="disk on fire"):
        capture(teacher, broken(), IMAGES, memory_limit_gb=0, spill_dir=tmp_path)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in teacher.model.modules())
    assert list(tmp_path.iterdir()) == []


def test_spilling_to_disk_changes_nothing(both, tmp_path):
    teacher, found, _ = both
    spilled = capture(teacher, batches(), IMAGES, memory_limit_gb=0, spill_dir=tmp_path)
    (folder,) = tmp_path.iterdir()
    assert folder == spilled.spill.folder
    assert list(folder.iterdir()) == []  # mapped files have no name any more
    assert sum(map(len, spilled.spill._maps)) == sum(
        2 * IMAGES * site.tokens * site.dim * 2 for site in teacher.sites
    )
    for name, kept in found.sites.items():
        assert torch.equal(spilled.sites[name].x, kept.x)
        assert torch.equal(spilled.sites[name].y, kept.y)
        spilled.sites[name].release()
        assert torch.equal(spilled.sites[name].x, kept.x)  # from the file
    x = spilled.sites[teacher.sites[0].name].x
    expected = x.clone()
    del spilled
    gc.collect()
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(x, expected)  # what is still in use stays


def test_small_captures_stay_in_memory(both, tmp_path):
    teacher, _, _ = both
    assert capture(teacher, batches(), IMAGES, spill_dir=tmp_path).spill is None
    assert list(tmp_path.iterdir()) == []


def test_a_mixer_may_train_what_it_took_from_the_view(both):
    _, found, _ = both
    for kept in found.sites.values():
        weight = kept.view.out_weight
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.weight = nn.Parameter(weight)
        target = kept.y[:2].float()
        loss = (layer(torch.ones(*target.shape[:2], weight.shape[1])) - target).square().mean()
        loss.backward()
        assert layer.weight.grad.isfinite().all()


def test_the_teacher_is_left_as_it_is(both):
    from mixerzoo.hosts import fingerprint

    teacher, found, _ = both
    for kept in found.sites.values():
        kept.view.out_weight.zero_()
    assert fingerprint(teacher.model) == teacher.fingerprint
