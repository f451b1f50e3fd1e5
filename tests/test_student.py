"""Students on disk: saved, loaded, and what happens when a file is not what it should be."""

import json
import shutil
import sys
from dataclasses import replace

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import mixerzoo
from mixerzoo import MixerSpec, hookimpl
from mixerzoo.errors import MixerzooError
from mixerzoo.files import read_json, write_json
from mixerzoo.hosts import as_teacher, assemble, fingerprint
from mixerzoo.hosts.timm_vit import TimmVitHost, _timm
from mixerzoo.opening import open_teacher
from mixerzoo.plan import Candidate, Plan
from mixerzoo.registry import BrokenPlugin, Origin, get_registry, temporary_plugin
from mixerzoo.student import (
    PLAN_FILE,
    WEIGHTS_FILE,
    Student,
    image_config,
    load,
    load_student,
    make_replacement,
    read_plan,
    save_student,
)


def student_of(teacher, choices):
    torch.manual_seed(0)
    modules = {name: make_replacement(candidate, teacher.site(name)) for name, candidate in choices.items()}
    return Student(plan=Plan.of(choices, teacher.sites), model=assemble(teacher.model, modules))


def tiny_student(teacher):
    return student_of(
        teacher,
        {
            "blocks.0.attn": Candidate("static", 0.5),
            "blocks.0.mlp": Candidate("mlp_slice", 0.25),
            "blocks.1.attn": Candidate("none"),
        },
    )


@pytest.fixture(scope="module")
def named():
    """A teacher that timm can build by name."""
    model = _timm().create_model("test_vit", num_classes=4, img_size=48).eval()
    return as_teacher(model, TimmVitHost(), name="test_vit")


@pytest.fixture(scope="module")
def original(named, tmp_path_factory):
    folder = tmp_path_factory.mktemp("student") / "best"
    student = student_of(
        named,
        {
            "blocks.0.attn": Candidate("linear_attention"),
            "blocks.1.attn": Candidate("pool"),
            "blocks.2.mlp": Candidate("mlp_slice", 0.5),
        },
    )
    save_student(folder, student, named)
    return folder, student


@pytest.fixture
def saved(original, tmp_path):
    folder, student = original
    shutil.copytree(folder, tmp_path / "best")
    return tmp_path / "best", student


def outputs(model, size=(3, 48, 48)):
    x = torch.randn(2, *size, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        return model(x)


def change(folder, **fields):
    write_json(folder / PLAN_FILE, read_json(folder / PLAN_FILE) | fields)


# Round trips


def test_a_student_comes_back(saved):
    folder, student = saved
    back = load_student(folder)
    assert back.plan == student.plan
    assert not back.model.training
    assert torch.equal(outputs(back.model), outputs(student.model))


def test_it_may_be_saved_again(saved, named, tmp_path):
    folder, student = saved
    save_student(tmp_path / "again", load_student(folder), named)
    assert (tmp_path / "again" / WEIGHTS_FILE).read_bytes() == (folder / WEIGHTS_FILE).read_bytes()
    assert torch.equal(outputs(load(tmp_path / "again")), outputs(student.model))


@pytest.mark.parametrize("how", ["run", "best", "text"])
def test_the_run_directory_will_do(saved, how):
    folder, student = saved
    path = {"run": folder.parent, "best": folder, "text": str(folder)}[how]
    assert torch.equal(outputs(mixerzoo.load(path)), outputs(student.model))


def test_a_plan_that_keeps_everything_is_the_teacher(named, tmp_path):
    save_student(tmp_path, student_of(named, {}), named)
    assert fingerprint(load(tmp_path)) == named.fingerprint
    assert read_json(tmp_path / PLAN_FILE)["plugins"] == {}


def test_the_embedded_teacher_s_students_need_nothing_else(tmp_path):
    teacher = open_teacher("digits_vit")
    student = student_of(teacher, {"blocks.3.attn": Candidate("pool")})
    save_student(tmp_path, student, teacher)
    assert torch.equal(outputs(load(tmp_path), (1, 32, 32)), outputs(student.model, (1, 32, 32)))


def test_every_mixer_comes_back(named, tmp_path):
    for spec in get_registry().mixers:
        site = next(site for site in named.sites if site.kind in spec.kinds)
        student = student_of(named, {site.name: Candidate(spec.name, min(spec.widths))})
        save_student(tmp_path, student, named)
        assert torch.equal(outputs(load(tmp_path)), outputs(student.model)), spec.name


def test_what_is_written(saved, named):
    folder, student = saved
    content = json.loads((folder / PLAN_FILE).read_text())
    assert content["teacher"] == "test_vit"
    assert content["architecture"] == named.host.architecture(named.model)
    assert content["plan"] == student.plan.to_json()
    assert set(content["plugins"]) == {"linear_attention", "pool", "mlp_slice"}
    assert content["plugins"]["pool"] == str(get_registry().mixers.origin("pool"))
    assert content["image"]["size"] == [3, 48, 48]
    assert sorted(path.name for path in folder.iterdir()) == [WEIGHTS_FILE, PLAN_FILE]


def test_how_images_are_prepared_is_written(saved, named, tmp_path):
    folder, student = saved
    squash = replace(named, image=replace(named.image, crop_mode="squash"))
    save_student(tmp_path, student, squash)
    assert image_config(read_plan(tmp_path)) == squash.image
    content = read_plan(folder)
    del content["image"]["crop_mode"]  # as older ones have none
    assert image_config(content) == named.image


def test_the_plan_is_written_last(named, tmp_path, monkeypatch):
    from mixerzoo import student as module

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        save_student(tmp_path, student_of(named, {}), named)
    assert [path.name for path in tmp_path.iterdir()] == [WEIGHTS_FILE]


# Teachers that no name builds


def test_a_teacher_that_cannot_be_built_must_be_given(tmp_path):
    teacher = tiny.tiny_teacher()
    student = tiny_student(teacher)
    save_student(tmp_path, student, teacher)
    with pytest.raises(
        MixerzooError, match=r"'tiny' cannot be built by name; .*load\(folder, model=\.\.\.\)"
    ):
        load(tmp_path)
    other = tiny.tiny_vit(seed=9)
    before = fingerprint(other)
    back = load(tmp_path, model=other)
    assert torch.equal(outputs(back, (1, 16, 16)), outputs(student.model, (1, 16, 16)))
    assert fingerprint(other) == before  # it is copied
    assert type(other.blocks[0].attn).__name__ == "Attention"
    assert torch.equal(outputs(load(tmp_path, model=other), (1, 16, 16)), outputs(student.model, (1, 16, 16)))


def test_another_architecture_does_not_fit(tmp_path):
    teacher = tiny.tiny_teacher()
    save_student(tmp_path, tiny_student(teacher), teacher)
    with pytest.raises(MixerzooError, match=r"model\.safetensors' does not fit its plan \(.+\)"):
        load(tmp_path, model=tiny.tiny_vit(img_size=32))
    with pytest.raises(MixerzooError, match=r"the model has no site 'blocks\.1\.attn'"):
        load(tmp_path, model=tiny.tiny_vit(depth=1))


def test_a_teacher_that_timm_builds_no_longer(saved):
    folder, _ = saved
    architecture = read_json(folder / PLAN_FILE)["architecture"]
    change(folder, architecture=architecture | {"img_size": [7, 7, 7]})
    with pytest.raises(MixerzooError, match=r"its teacher cannot be rebuilt .* pass an instance of it"):
        load(folder)


# Files that are not what they should be


def test_a_missing_plugin_is_named_with_its_version(tmp_path):
    class Mine(nn.Module):
        def __init__(self, dim):
            super().__init__()
            self.layer = nn.Linear(dim, dim)

        def forward(self, x):
            return self.layer(x)

    class Plugin:
        @hookimpl
        def register_mixers(self, register):
            register(MixerSpec(name="mine", build=Mine, summary="mine"))

    teacher = tiny.tiny_teacher()
    with temporary_plugin(Plugin(), name="mixerzoo-mine"):
        save_student(tmp_path, student_of(teacher, {"blocks.0.attn": Candidate("mine")}), teacher)
        load(tmp_path, model=tiny.tiny_vit())
    with pytest.raises(
        MixerzooError, match="needs mixer 'mine' of mixerzoo-mine 0; install that distribution"
    ):
        load(tmp_path, model=tiny.tiny_vit())


def test_all_missing_plugins_are_named(saved):
    folder, _ = saved
    change(folder, plugins={"a": "mixerzoo-one 1.0", "b": "mixerzoo-two 2.0", "pool": "mixerzoo 0.1.0"})
    with pytest.raises(
        MixerzooError, match=r"needs mixer 'a' of mixerzoo-one 1.0, mixer 'b' of mixerzoo-two 2.0; "
    ) as e:
        load(folder)
    assert str(e.value).endswith("install those distributions")


def test_a_plugin_that_is_there_and_broken_is_told_from_a_missing_one(saved, monkeypatch):
    folder, _ = saved
    change(folder, plugins={"a": "mixerzoo-one 1.0"})
    origin = Origin(plugin="one", distribution="mixerzoo-one", version="1.1")
    broken = [BrokenPlugin(origin=origin, error="ImportError: no module named 'x'")]
    monkeypatch.setattr(get_registry(), "broken", broken)
    with pytest.raises(
        MixerzooError, match=r"plugin mixerzoo-one 1.1 is there and does not load: ImportError: no"
    ):
        load(folder)


def test_a_missing_host_is_named_with_its_distribution(saved):
    folder, _ = saved
    assert read_json(folder / PLAN_FILE)["host_plugin"] == str(get_registry().hosts.origin("timm"))
    change(folder, host="theirs", host_plugin="mixerzoo-theirs 1.2")
    with pytest.raises(
        MixerzooError, match=r"unknown host 'theirs': .* needs it of mixerzoo-theirs 1.2; install"
    ):
        load(folder)


def test_another_version_of_a_plugin_is_named_where_the_weights_do_not_fit(saved, named):
    folder, _ = saved
    content = read_json(folder / PLAN_FILE)
    change(folder, plugins=content["plugins"] | {"pool": "mixerzoo 0.0.1"})
    load(folder)  # it does no harm by itself
    plan = content["plan"] | {"blocks.0.attn": "pool@1"}
    change(folder, plan=plan)
    with pytest.raises(
        MixerzooError, match=r"not fit its plan .*; it was made with mixerzoo 0\.0\.1, here is mixerzoo"
    ):
        load(folder)


# One file


def test_one_file_with_the_plan_in_it_will_do(saved):
    folder, student = saved
    write_one_file(folder, json.dumps(read_json(folder / PLAN_FILE)))
    assert torch.equal(outputs(load(folder.parent / "one.safetensors")), outputs(student.model))
    assert load_student(folder.parent / "one.safetensors").plan == student.plan


def write_one_file(folder, text):
    metadata = {} if text is None else {"mixerzoo": text}
    save_file(load_file(folder / WEIGHTS_FILE), folder.parent / "one.safetensors", metadata=metadata)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"one\.safetensors': weights without a plan; give a student's folder"),
        ("{", r"one\.safetensors': not readable as a student"),
        ("[]", r"one\.safetensors': not a plan of mixerzoo \(it holds a list\)"),
        ("{}", r"one\.safetensors': not a plan of mixerzoo \(KeyError"),
    ],
)
def test_one_file_without_a_plan(saved, text, message):
    folder, _ = saved
    write_one_file(folder, text)
    with pytest.raises(MixerzooError, match=message):
        load(folder.parent / "one.safetensors")


def test_one_file_that_is_none(saved):
    folder, _ = saved
    (folder.parent / "one.safetensors").write_bytes(b"words")
    with pytest.raises(MixerzooError, match=r"one\.safetensors': not readable as a student"):
        load(folder.parent / "one.safetensors")


def test_nothing_there(tmp_path):
    with pytest.raises(MixerzooError, match=r"plan\.json': no such file"):
        load(tmp_path)


def test_weights_missing(saved):
    folder, _ = saved
    (folder / WEIGHTS_FILE).unlink()
    with pytest.raises(MixerzooError, match=r"model\.safetensors': not readable"):
        load(folder)


@pytest.mark.parametrize("how", ["empty", "truncated", "pickle", "header"])
def test_weights_that_are_none(saved, how):
    folder, _ = saved
    path = folder / WEIGHTS_FILE
    content = path.read_bytes()
    if how == "pickle":
        torch.save({"a": torch.ones(1)}, path)
    else:
        broken = {"empty": b"", "truncated": content[:-100], "header": content[:8] + b"x" + content[9:]}
        path.write_bytes(broken[how])
    with pytest.raises(MixerzooError, match=r"model\.safetensors': not readable"):
        load(folder)


def test_weights_of_another_student(saved, named):
    folder, _ = saved
    save_student(folder.parent / "other", student_of(named, {"blocks.0.attn": Candidate("pool")}), named)
    shutil.copy(folder.parent / "other" / WEIGHTS_FILE, folder / WEIGHTS_FILE)
    with pytest.raises(MixerzooError, match=r"model\.safetensors' does not fit its plan"):
        load(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "null", '"plan"', '{"plan": {}, "sites": []}'])
def test_plans_that_are_none(saved, content):
    folder, _ = saved
    (folder / PLAN_FILE).write_text(content)
    with pytest.raises(MixerzooError, match=r"plan\.json': not (?:a plan of mixerzoo|readable as JSON)"):
        load(folder)


@pytest.mark.parametrize(
    "fields",
    [
        {"plan": ["blocks.0.attn"]},
        {"sites": ["x"]},
        {"sites": [{}]},
        {"sites": [{"name": "a", "unheard": 1}]},
        {"sites": None},
        {"plugins": ["pool"]},
        {"plugins": None},
    ],
    ids=str,
)
def test_fields_that_are_none(saved, fields):
    folder, _ = saved
    change(folder, **fields)
    with pytest.raises(MixerzooError, match=r"plan\.json': not a plan of mixerzoo"):
        load(folder)


def test_a_grid_that_is_none(saved):
    folder, _ = saved
    content = read_json(folder / PLAN_FILE)
    content["sites"][0]["grid"] = [1]
    change(folder, sites=content["sites"])
    with pytest.raises(MixerzooError, match="not a plan of mixerzoo"):
        load(folder)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"blocks.0.attn": "pooll@1"}, "unknown mixer 'pooll': did you mean 'pool'"),
        ({"blocks.0.atn": "pool@1"}, r"'blocks\.0\.atn' is not a site of its teacher: did you mean"),
        ({"": "pool@1"}, "'' is not a site of its teacher"),
        ({"blocks.0.attn": "pool@-1"}, "candidate 'pool@-1': write mixer@width"),
        ({"blocks.0.attn": 7}, "candidate '7': write mixer@width"),
        ({"blocks.0.attn": "mlp_slice@0.5"}, "mlp_slice.* cannot be built for site"),
        ({"blocks.0.attn": "pool@1", "blocks.1.attn": "pool@1"}, "does not fit its plan"),
    ],
    ids=str,
)
def test_plans_that_were_tampered_with(saved, plan, message):
    folder, _ = saved
    change(folder, plan=plan)
    with pytest.raises(MixerzooError, match=message):
        load(folder)


@pytest.mark.parametrize(
    "name", ["os.system", "antigravity", "antigravity.fly", "__import__", "builtins:eval", "../../x"]
)
@pytest.mark.parametrize("where", ["plan", "architecture", "host", "plugins"])
def test_a_plan_imports_nothing(saved, name, where, monkeypatch):
    folder, _ = saved
    monkeypatch.setattr("os.system", lambda *_: pytest.fail("it was called"))
    load(folder)  # all that is needed is imported by now
    content = read_json(folder / PLAN_FILE)
    change(
        folder,
        **{
            "plan": {"plan": content["plan"] | {"blocks.0.attn": f"{name}@1"}},
            "architecture": {"architecture": content["architecture"] | {"model": name}},
            "host": {"host": name},
            "plugins": {"plugins": {name: f"{name} 1.0"}},
        }[where],
    )
    before = set(sys.modules)
    with pytest.raises(
        MixerzooError, match=r"candidate|unknown mixer|installed timm|unknown host|needs mixer"
    ):
        load(folder)
    assert set(sys.modules) == before


def test_weights_that_do_not_fit_a_mixer_are_named():
    site = tiny.tiny_teacher().sites[0]
    with pytest.raises(
        MixerzooError, match=r"pool@1 at blocks\.0\.attn: its weights do not fit \(Missing key"
    ):
        make_replacement(Candidate("pool"), site, {"other": torch.ones(1)})
    with pytest.raises(MixerzooError, match="unknown mixer 'poool'"):
        make_replacement(Candidate("poool"), site)
