"""The embedded teacher is what its card says."""

from importlib import resources

import pytest
import torch
from safetensors.torch import load as load_tensors

from mixerzoo.data import load_images, load_labels
from mixerzoo.opening import open_data, open_teacher
from mixerzoo.teachers import digits_vit


@pytest.fixture(scope="module")
def teacher():
    return open_teacher("digits_vit")


@pytest.mark.parametrize("part", ["calibration", "validation", "test"])
def test_the_accuracy_on_its_card_is_what_it_reaches(teacher, part):
    data = open_data("digits")
    indices = getattr(data.splits, part)
    with torch.inference_mode():
        logits = torch.cat(
            [teacher.model(batch) for batch in load_images(data, indices, teacher.image).split(64)]
        )
    accuracy = float((logits.argmax(-1) == load_labels(data, indices)).float().mean())
    # One image more or less: another processor rounds differently.
    assert accuracy == pytest.approx(digits_vit.card()["accuracy"][part], abs=1.5 / len(indices))
    assert accuracy > 0.97


def test_it_is_small():
    content = (resources.files("mixerzoo.teachers") / "digits_vit.safetensors").read_bytes()
    assert 1.8e6 < len(content) < 2.1e6
    assert {tensor.dtype for tensor in load_tensors(content).values()} == {torch.float16}


def test_its_shape(teacher):
    card = digits_vit.card()
    assert card["name"] == teacher.name == digits_vit.NAME
    assert card["parameters"] == teacher.params
    assert round(teacher.params / 1e6, 2) == 0.92
    assert len(teacher.sites) == 16
    assert teacher.rejected == ()
    for index, site in enumerate(teacher.sites):
        assert (site.tokens, site.prefix, site.grid, site.dim) == (257, 1, (16, 16), 96)
        assert site.kind == ("mlp" if index % 2 else "attention")
        assert site.heads == (1 if index % 2 else 3)
        assert site.stage == index // 2 + 1


def test_its_images(teacher):
    assert teacher.image.size == (1, 32, 32)
    assert (teacher.image.mean, teacher.image.std) == ((0.5,), (0.5,))
    assert (teacher.image.interpolation, teacher.image.crop_pct) == ("bilinear", 1.0)
    assert teacher.classifier


def test_it_is_the_same_every_time(teacher):
    assert open_teacher("digits_vit").fingerprint == teacher.fingerprint
