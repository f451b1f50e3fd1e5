"""The timm host: which modules are sites, what is known of them, and how teachers are loaded and rebuilt."""

import math

import pytest
import tiny
import torch
from safetensors.torch import save_file
from torch import nn

from mixerzoo.errors import MixerzooError
from mixerzoo.hosts import Replacement, as_teacher, assemble, fingerprint, run_stages
from mixerzoo.hosts.timm_vit import TimmVitHost, _timm
from mixerzoo.opening import adopt_teacher, open_teacher
from mixerzoo.spec import AttentionView, MlpView
from mixerzoo.teachers import digits_vit

HOST = TimmVitHost()
SMALL = "test_vit"  # timm's own model for tests: 160 px, patch 16, width 64
SMALL_CLASSES = 7


def images(model, count=2):
    return torch.randn(count, *HOST.image_config(model).size)


def reasons(model):
    _, rejected = HOST.find_sites(model)
    return {one.name: one.reason for one in rejected}


def distilled():
    _timm()
    from timm.models.deit import VisionTransformerDistilled

    return tiny.seeded(lambda: VisionTransformerDistilled(**tiny.SHAPE))


VARIANTS = {
    "plain": (tiny.tiny_vit, 1, False),
    "distilled": (distilled, 2, False),
    "scaled, registers": (lambda: tiny.tiny_vit(init_values=0.1, reg_tokens=2), 3, True),
    "no class token": (lambda: tiny.tiny_vit(class_token=False, global_pool="avg"), 0, False),
    "normalised q and k": (lambda: tiny.tiny_vit(qk_norm=True), 1, False),
    "no q, k, v bias": (lambda: tiny.tiny_vit(qkv_bias=False), 1, False),
    "embedding": (lambda: tiny.tiny_vit(num_classes=0), 1, False),
}
variants = pytest.mark.parametrize(("make", "prefix", "scaled"), VARIANTS.values(), ids=VARIANTS)


@variants
def test_the_sites_of_plain_transformers(make, prefix, scaled):
    sites, rejected = HOST.find_sites(make())
    assert rejected == []
    assert [site.name for site in sites] == [
        "blocks.0.attn",
        "blocks.0.mlp",
        "blocks.1.attn",
        "blocks.1.mlp",
    ]
    for index, site in enumerate(sites):
        block, attention = index // 2, index % 2 == 0
        number = 1 if attention else 2
        assert site.to_json() == {
            "name": site.name,
            "kind": "attention" if attention else "mlp",
            "index": index,
            "stage": block + 1,
            "dim": 24,
            "heads": 3 if attention else 1,
            "tokens": 16 + prefix,
            "prefix": prefix,
            "grid": (4, 4),
            "causal": False,
            "hidden": None if attention else 96,
            "activation": None if attention else "gelu",
            "gated": False,
            "norm": f"blocks.{block}.norm{number}",
            "scale": f"blocks.{block}.ls{number}" if scaled else None,
        }


@variants
def test_the_stages_compose_to_the_model(make, prefix, scaled):
    model = make()
    stages = HOST.stages(model)
    assert len(stages) == 4
    x = images(model, 3)
    with torch.inference_mode():
        torch.testing.assert_close(run_stages(stages, x), model(x))
        hidden = run_stages(stages[:2], x)
        torch.testing.assert_close(run_stages(stages, hidden, first=2), model(x))


def test_stages_are_those_of_the_student_even_when_it_has_gone_to_nan():
    teacher = tiny.tiny_teacher()

    class Nan(nn.Module):
        def forward(self, x):
            return x * float("nan")

    site = teacher.sites[0]
    student = assemble(teacher.model, {site.name: Replacement(Nan(), site, masks=False)})
    assert len(HOST.stages(student)) == len(HOST.stages(teacher.model))


def test_a_model_that_is_more_than_its_stages_is_one_stage():
    model = tiny.tiny_vit()
    head = model.forward_head

    class Twice(type(model)):
        def forward(self, x):
            return 2 * super().forward(x)

    model.__class__ = Twice
    stages = HOST.stages(model)
    assert stages == [model]
    assert head is not None
    assert {site.stage for site in HOST.find_sites(model)[0]} == {0}


@variants
def test_maps_and_view_reproduce_the_attention(make, prefix, scaled):
    model = make()
    for site in HOST.find_sites(model)[0]:
        if site.kind != "attention":
            continue
        module = model.get_submodule(site.name)
        x = torch.randn(2, site.tokens, site.dim)
        with torch.no_grad():
            maps = HOST.attention_maps(module, x)
            assert maps.shape == (2, 3, site.tokens, site.tokens)
            torch.testing.assert_close(maps.sum(-1), torch.ones_like(maps[..., 0]))
            view = AttentionView(**HOST.weights(module, site), mean_attention=maps.mean(0))
            v = (x @ view.v_weight.T + view.v_bias).view(2, site.tokens, 3, 8).transpose(1, 2)
            y = (maps @ v).transpose(1, 2).flatten(2) @ view.out_weight.T + view.out_bias
            torch.testing.assert_close(y, module(x), rtol=1e-4, atol=1e-4)


def test_q_and_k_of_the_view_give_the_maps():
    model = tiny.tiny_vit()
    site = HOST.find_sites(model)[0][0]
    module = model.get_submodule(site.name)
    x = torch.randn(2, site.tokens, site.dim)
    view = AttentionView(**HOST.weights(module, site), mean_attention=torch.empty(0))
    q, k = (
        (x @ weight.T + bias).view(2, site.tokens, 3, 8).transpose(1, 2)
        for weight, bias in ((view.q_weight, view.q_bias), (view.k_weight, view.k_bias))
    )
    with torch.no_grad():
        expected = HOST.attention_maps(module, x)
    torch.testing.assert_close((q @ k.mT / math.sqrt(8)).softmax(-1), expected, rtol=1e-4, atol=1e-5)


def test_hidden_units_and_view_reproduce_the_mlp():
    model = tiny.tiny_vit()
    site = HOST.find_sites(model)[0][1]
    module = model.get_submodule(site.name)
    x = torch.randn(2, site.tokens, site.dim)
    view = MlpView(**HOST.weights(module, site), importance=torch.empty(0))
    with torch.no_grad():
        hidden = HOST.hidden_units(module, x)
        torch.testing.assert_close(hidden, nn.functional.gelu(x @ view.in_weight.T + view.in_bias))
        torch.testing.assert_close(hidden @ view.out_weight.T + view.out_bias, module(x))


def test_the_view_is_a_copy():
    model = tiny.tiny_vit()
    before = fingerprint(model)
    for site in HOST.find_sites(model)[0]:
        for tensor in HOST.weights(model.get_submodule(site.name), site).values():
            tensor.zero_()
    assert fingerprint(model) == before


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (nn.GELU, "gelu"),
        (lambda: nn.GELU(approximate="tanh"), "gelu_tanh"),
        (nn.ReLU, "relu"),
        (nn.SiLU, "silu"),
        (nn.Hardtanh, "hardtanh"),
    ],
)
def test_activations_have_names(layer, name):
    model = tiny.tiny_vit()
    model.blocks[0].mlp.act = layer()
    assert HOST.find_sites(model)[0][1].activation == name


# What only looks like a site


def test_rotary_embeddings_are_not_for_us():
    _timm()
    from timm.models.eva import Eva

    model = tiny.seeded(lambda: Eva(**tiny.SHAPE, use_rot_pos_emb=True))
    assert reasons(model) == {
        f"blocks.{block}.attn": "it takes more than the tokens (rope)" for block in (0, 1)
    }
    assert {site.name for site in HOST.find_sites(model)[0]} == {"blocks.0.mlp", "blocks.1.mlp"}


def test_windows_are_not_for_us():
    _timm()
    from timm.models.swin_transformer import SwinTransformer

    model = tiny.seeded(
        lambda: SwinTransformer(
            img_size=16,
            patch_size=2,
            in_chans=1,
            num_classes=10,
            embed_dim=12,
            depths=(2,),
            num_heads=(3,),
            window_size=4,
        )
    )
    why = reasons(model)
    assert why["layers.0.blocks.0.attn"] == "it works on windows: (8, 16, 12) for 2 images"
    assert "layers.0.blocks.1.attn" in why
    assert all(site.kind == "mlp" for site in HOST.find_sites(model)[0])


def test_one_window_for_the_whole_image_still_has_its_position_bias():
    _timm()
    from timm.models.swin_transformer import SwinTransformer

    model = tiny.seeded(
        lambda: SwinTransformer(
            img_size=8,
            patch_size=2,
            in_chans=1,
            num_classes=10,
            embed_dim=12,
            depths=(1,),
            num_heads=(3,),
            window_size=4,
        )
    )
    model.pretrained_cfg["input_size"] = (1, 8, 8)
    assert "is more than softmax(q k) v" in reasons(model)["layers.0.blocks.0.attn"]


@pytest.mark.parametrize("shared", [False, True])
def test_relative_positions_are_not_for_us(shared):
    _timm()
    from timm.models.beit import Beit

    options = {"use_shared_rel_pos_bias": True} if shared else {"use_rel_pos_bias": True}
    model = tiny.seeded(lambda: Beit(**tiny.SHAPE, **options))
    why = reasons(model)
    assert set(why) == {"blocks.0.attn", "blocks.1.attn"}
    expected = "it takes more than the tokens (shared_rel_pos_bias)" if shared else "Attention is more than"
    assert why["blocks.0.attn"].startswith(expected)


def test_attention_over_channels_is_not_for_us():
    _timm()
    from timm.models.xcit import Xcit

    model = tiny.seeded(
        lambda: Xcit(
            img_size=16, patch_size=8, in_chans=1, num_classes=10, embed_dim=24, depth=1, num_heads=3
        )
    )
    why = reasons(model)
    assert "XCA is built differently" in why["blocks.0.attn"]
    assert "not (B, N, D) to (B, N, D)" in why["cls_attn_blocks.0.attn"]


def test_a_pooling_attention_is_not_for_us():
    why = reasons(tiny.tiny_vit(global_pool="map"))
    assert why["attn_pool"] == "it maps (2, 16, 24) to (2, 24), not (B, N, D) to (B, N, D)"


def test_a_module_used_twice_is_not_for_us():
    model = tiny.tiny_vit()
    model.blocks[1].attn = model.blocks[0].attn
    sites, rejected = HOST.find_sites(model)
    assert {one.name: one.reason for one in rejected} == {
        "blocks.0.attn": "it is called more than once in a forward pass"
    }
    assert [site.name for site in sites] == ["blocks.0.mlp", "blocks.1.mlp"]


def test_a_module_that_is_not_called_is_not_for_us():
    model = tiny.tiny_vit()
    model.spare = _attention(24)
    assert reasons(model) == {"spare": "it is not called in a forward pass"}


def test_an_attention_that_does_more_is_not_for_us():
    model = tiny.tiny_vit()
    ordinary = model.blocks[0].attn

    class Gated(type(ordinary)):
        def forward(self, x, attn_mask=None, is_causal=False):
            return super().forward(x, attn_mask) * 1.01

    ordinary.__class__ = Gated
    assert reasons(model) == {
        "blocks.0.attn": "Gated is more than softmax(q k) v (relative difference 0.01)",
    }


def test_an_mlp_that_does_more_is_not_for_us():
    model = tiny.tiny_vit()
    model.blocks[1].mlp.norm = nn.LayerNorm(96)
    assert "is more than fc2(act(fc1(x)))" in reasons(model)["blocks.1.mlp"]


def test_sites_off_the_residual_stream_have_no_norm():
    _timm()
    from timm.models.vision_transformer import ResPostBlock

    sites, _ = HOST.find_sites(tiny.tiny_vit(block_fn=ResPostBlock))
    assert len(sites) == 4
    assert {(site.norm, site.scale) for site in sites} == {(None, None)}


def test_looking_leaves_the_model_as_it_is():
    model = tiny.tiny_vit()
    before = fingerprint(model)
    HOST.find_sites(model)
    assert fingerprint(model) == before
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("broken", [False, True])
def test_a_model_without_sites_says_why(broken):
    model = tiny.tiny_vit()
    for number, block in enumerate(model.blocks):
        block.mlp = nn.Identity()
        if broken:
            block.attn.register_forward_hook(lambda _m, _a, out: out * 2)
        else:
            model.blocks[number].attn = Recorder()
    expected = (
        r"no site to replace in it \(blocks\.0\.attn: Attention is more" if broken else "in it; a plain"
    )
    with pytest.raises(MixerzooError, match=f"model 'mine': .*{expected}"):
        as_teacher(model, HOST, name="mine")


def test_convolutions_are_no_teacher():
    _timm()
    from timm.models.resnet import BasicBlock, ResNet

    model = tiny.seeded(lambda: ResNet(BasicBlock, (1, 1, 1, 1), in_chans=1, num_classes=10))
    with pytest.raises(MixerzooError, match="no site to replace"):
        as_teacher(model, HOST, name="resnet")


# Teachers


def test_a_teacher_is_frozen_and_described():
    teacher = tiny.tiny_teacher()
    assert not teacher.model.training
    assert not any(p.requires_grad for p in teacher.model.parameters())
    assert teacher.classifier
    assert not tiny.tiny_teacher(num_classes=0).classifier
    assert teacher.params == sum(p.numel() for p in teacher.model.parameters())
    assert teacher.image.size == (1, 16, 16)
    assert (teacher.image.mean, teacher.image.std) == ((0.5,), (0.5,))
    assert teacher.site("blocks.1.mlp").index == 3
    with pytest.raises(MixerzooError, match=r"unknown site 'block\.0\.attn'.*blocks\.0\.attn"):
        teacher.site("block.0.attn")


def test_adopting_leaves_the_object_alone():
    model = tiny.tiny_vit().train()
    teacher = adopt_teacher(model)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert teacher.model is not model
    assert teacher.name == "VisionTransformer"
    with pytest.raises(MixerzooError, match="model of class Linear: no host knows it"):
        adopt_teacher(nn.Linear(2, 2))


def test_the_image_size_is_what_the_model_is_built_for():
    model = tiny.tiny_vit(img_size=24)
    model.pretrained_cfg["crop_pct"] = 0.9
    config = HOST.image_config(model)
    assert config.size == (1, 24, 24)
    assert config.crop_pct == 1.0
    model = tiny.tiny_vit()
    model.pretrained_cfg["crop_pct"] = 0.9
    assert HOST.image_config(model).crop_pct == 0.9


@pytest.mark.parametrize(("said", "mode"), [("squash", "squash"), (None, "center")])
def test_images_are_resized_as_the_weights_were_trained(said, mode):
    model = tiny.tiny_vit()
    if said is not None:
        model.pretrained_cfg["crop_mode"] = said
    assert HOST.image_config(model).crop_mode == mode


def test_the_fingerprint_is_of_every_weight():
    model = tiny.tiny_vit()
    seen = {fingerprint(model)}
    assert seen == {fingerprint(tiny.tiny_vit())}
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.view(-1)[-1] += 1e-3
        seen.add(fingerprint(model))
    assert len(seen) == 1 + len(list(model.parameters()))


def test_the_fingerprint_sees_buffers_and_names():
    a, b = nn.Module(), nn.Module()
    a.register_buffer("one", torch.tensor(1))
    b.register_buffer("two", torch.tensor(1))
    assert fingerprint(a) != fingerprint(b)
    before = fingerprint(a)
    a.one += 1
    assert fingerprint(a) != before


def test_assembling_shares_all_but_the_new():
    teacher = tiny.tiny_teacher()
    mixer = nn.Identity()
    student = assemble(teacher.model, {"blocks.0.attn": mixer})
    assert student.blocks[0].attn is mixer
    assert student.blocks[1].attn is not teacher.model.blocks[1].attn
    assert student.blocks[1].attn.qkv.weight is teacher.model.blocks[1].attn.qkv.weight
    assert type(teacher.model.blocks[0].attn).__name__ == "Attention"


# Loading


def test_unknown_models_are_answered_with_a_suggestion():
    with pytest.raises(MixerzooError, match="unknown model 'digit_vit': did you mean 'digits_vit'"):
        open_teacher("digit_vit")


def test_weights_that_cannot_be_had_name_the_way_out(monkeypatch):
    def offline(*_, **__):
        raise OSError("no route\n  to host")

    monkeypatch.setattr(_timm(), "create_model", offline)
    with pytest.raises(MixerzooError, match=r"cannot be had \(no route to host\); give .* --checkpoint"):
        HOST.load("vit_tiny_patch16_224", None)


@pytest.fixture(scope="module")
def small():
    return _timm().create_model(SMALL, num_classes=SMALL_CLASSES, img_size=64).eval()


@pytest.fixture
def saved(small, tmp_path):
    path = tmp_path / "w.safetensors"

    def save(change=lambda state: None):
        state = {name: tensor.clone() for name, tensor in small.state_dict().items()}
        change(state)
        save_file(state, path)
        return path

    return save


def test_a_checkpoint_shows_its_image_size_and_classes(small, saved):
    teacher = open_teacher(SMALL, saved())
    assert teacher.image.size == (3, 64, 64)
    assert teacher.model.num_classes == SMALL_CLASSES
    assert teacher.fingerprint == fingerprint(small)
    assert teacher.sites[0].grid == (4, 4)


def test_a_checkpoint_may_be_in_half_precision(small, saved):
    def halve(state):
        for name, tensor in state.items():
            state[name] = tensor.half()

    model = HOST.load(SMALL, saved(halve))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    torch.testing.assert_close(model.head.weight, small.head.weight, rtol=1e-3, atol=1e-4)


def test_a_checkpoint_without_a_head_is_an_embedding(saved):
    teacher = open_teacher(SMALL, saved(lambda state: [state.pop(f"head.{n}") for n in ("weight", "bias")]))
    assert not teacher.classifier


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("blocks.1.mlp.fc1.bias"), r"'blocks\.1\.mlp\.fc1\.bias' is missing in it"),
        (lambda s: s.update({"blocks.0.extra": torch.ones(1)}), r"it has an extra 'blocks\.0\.extra'"),
        (lambda s: s.update({"norm.bias": torch.ones(3)}), r"'norm\.bias' is \(3,\), not \(64,\)"),
        (
            lambda s: [s.pop("norm.bias"), s.pop("blocks.0.norm1.bias"), s.update({"a": torch.ones(1)})],
            "it has an extra 'a'",
        ),
        (
            lambda s: [s.update({f"backbone.{name}": s.pop(name)}) for name in list(s)],
            r"it has an extra 'backbone\.blocks\.0\.attn\.proj\.bias'",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_names_the_first_difference(saved, change, message):
    with pytest.raises(MixerzooError, match=f"w.safetensors' does not fit model '{SMALL}': {message}"):
        open_teacher(SMALL, saved(change))


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04 a pickle", b"\xff" * 100], ids=["empty", "pickle", "noise"]
)
def test_a_checkpoint_of_another_kind_names_the_way_out(tmp_path, content):
    path = tmp_path / "w.pt"
    path.write_bytes(content)
    with pytest.raises(MixerzooError, match=r"w\.pt': not a safetensors file .*save_file"):
        open_teacher(SMALL, path)


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(MixerzooError, match=r"none\.safetensors': no such file"):
        open_teacher("digits_vit", tmp_path / "none.safetensors")


def test_the_embedded_teacher_takes_a_checkpoint_too(tmp_path):
    model = digits_vit.build()
    save_file(model.state_dict(), tmp_path / "d.safetensors")
    assert open_teacher("digits_vit", tmp_path / "d.safetensors").fingerprint == fingerprint(model)


# Rebuilding


@pytest.mark.parametrize("classes", [0, 5])
def test_a_timm_model_is_rebuilt_from_its_description(classes):
    model = _timm().create_model(SMALL, num_classes=classes, img_size=48).eval()
    described = HOST.architecture(model)
    assert described == {"host": "timm", "model": SMALL, "num_classes": classes, "img_size": [48, 48]}
    rebuilt = HOST.create(described)
    rebuilt.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 48, 48)
    with torch.inference_mode():
        torch.testing.assert_close(rebuilt(x), model(x))


@pytest.fixture
def grey():
    return _timm().create_model(SMALL, num_classes=5, img_size=48, in_chans=1).eval()


def test_a_model_for_grey_images_has_sites_and_is_rebuilt(grey, tmp_path):
    assert grey.pretrained_cfg["input_size"][0] == 3
    teacher = adopt_teacher(grey)
    assert teacher.image.size == (1, 48, 48)
    colour = HOST.image_config(_timm().create_model(SMALL))
    for found, of in ((teacher.image.mean, colour.mean), (teacher.image.std, colour.std)):
        assert found == pytest.approx([sum(of) / 3])
    described = HOST.architecture(grey)
    assert described["in_chans"] == 1
    rebuilt = HOST.create(described)
    rebuilt.load_state_dict(grey.state_dict())
    save_file(grey.state_dict(), tmp_path / "grey.safetensors")
    assert open_teacher(SMALL, tmp_path / "grey.safetensors").fingerprint == fingerprint(grey)


def test_a_model_for_images_of_other_channels_is_refused():
    with pytest.raises(MixerzooError, match=r"images of 4 channels: images have 1 \(grey\) or 3"):
        adopt_teacher(_timm().create_model(SMALL, img_size=48, in_chans=4))


def test_the_embedded_teacher_is_rebuilt_by_its_name():
    described = HOST.architecture(digits_vit.load())
    assert described == {"host": "timm", "model": "digits_vit"}
    assert not HOST.create(described).training


def test_a_model_that_no_name_builds_is_not_described():
    assert HOST.architecture(tiny.tiny_vit()) is None


@pytest.mark.parametrize("change", ["heads", "activation"])
def test_a_model_of_the_same_shapes_that_works_differently_is_not_described(change):
    model = digits_vit.load()
    for block in model.blocks:
        if change == "heads":
            block.attn.num_heads, block.attn.head_dim, block.attn.scale = 6, 16, 16**-0.5
        else:
            block.mlp.act = nn.ReLU()
    assert HOST.architecture(model) is None


@pytest.mark.parametrize("name", ["hf-hub:someone/model", "local-dir:/tmp/model", "os.system", "", None])
def test_only_models_of_the_installed_timm_are_created(name, monkeypatch):
    def called(*_, **__):
        raise AssertionError("asked timm to build it")

    monkeypatch.setattr(_timm(), "create_model", called)
    with pytest.raises(MixerzooError, match="not a model of the installed timm"):
        HOST.create({"model": name})


# Replacements and their call signature


class Recorder(nn.Module):
    def forward(self, x, mask=None, **_):
        self.mask = mask
        return x


def replacement(*, masks, causal=False):
    site = tiny.tiny_teacher().sites[0]
    site = type(site)(**{**vars(site), "causal": causal})
    return Replacement(Recorder(), site, masks=masks)


def test_a_replacement_without_arguments_is_its_mixer():
    module = replacement(masks=False)
    x = torch.randn(2, 5, 24)
    assert module(x) is x
    assert module(x, attn_mask=None, is_causal=False) is x
    assert module.mixer.mask is None


def test_a_mixer_without_masks_refuses_them():
    with pytest.raises(MixerzooError, match=r"site 'blocks\.0\.attn': called with attn_mask, but its mixer"):
        replacement(masks=False)(torch.randn(2, 5, 24), attn_mask=torch.ones(2, 1, 1, 5, dtype=torch.bool))


@pytest.mark.parametrize("shape", [(3, 1, 1, 5), (1, 1, 1, 5), (1, 5), (5,), (1, 1, 5)])
def test_a_mixer_with_masks_gets_the_padding(shape):
    module = replacement(masks=True)
    mask = torch.rand(shape) > 0.5
    module(torch.randn(3, 5, 24), attn_mask=mask)
    assert torch.equal(module.mixer.mask, mask.view(-1, 5).expand(3, 5))


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(3, 1, 5, 5, dtype=torch.bool),  # a different one for each token
        torch.ones(5, 5, dtype=torch.bool),
        torch.ones(3, 1, 1, 4, dtype=torch.bool),  # another length
        torch.ones(2, 1, 1, 5, dtype=torch.bool),  # another batch
        torch.ones(1, 3, 1, 5, dtype=torch.bool),  # a different one for each head
        torch.zeros(3, 1, 1, 5),  # added to the scores
        torch.ones((), dtype=torch.bool),
    ],
    ids=lambda mask: f"{tuple(mask.shape)} {mask.dtype}",
)
def test_a_mask_that_is_not_padding_is_refused(mask):
    with pytest.raises(MixerzooError, match=r"not a padding mask; give bool of shape \(3, 1, 1, 5\)"):
        replacement(masks=True)(torch.randn(3, 5, 24), attn_mask=mask)


def test_causality_is_refused_where_the_mixer_looks_both_ways():
    x = torch.randn(2, 5, 24)
    with pytest.raises(MixerzooError, match="is_causal=True, but its mixer was built to look both ways"):
        replacement(masks=True)(x, is_causal=True)
    assert replacement(masks=True, causal=True)(x, is_causal=True) is x


def test_masks_reach_the_mixer_through_the_model():
    teacher = tiny.tiny_teacher()
    site = teacher.sites[0]
    for masks in (True, False):
        student = assemble(teacher.model, {site.name: Replacement(Recorder(), site, masks=masks)})
        x, mask = torch.randn(2, 17, 24), torch.rand(2, 1, 1, 17) > 0.3
        if masks:
            student.blocks[0](x, attn_mask=mask)
            assert torch.equal(student.blocks[0].attn.mixer.mask, mask[:, 0, 0])
        else:
            with pytest.raises(MixerzooError, match="does not take masks"):
                student.blocks[0](x, attn_mask=mask)


def _attention(dim):
    from timm.models.vision_transformer import Attention

    return Attention(dim, num_heads=3)
