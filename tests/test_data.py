"""Images and labels: what is opened, what is refused and how, and that images are prepared as timm does."""

import hashlib
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from mixerzoo import hookimpl
from mixerzoo.classes import fitting_labels
from mixerzoo.compat import guard_torchvision
from mixerzoo.data import (
    Dataset,
    DatasetSpec,
    ImageConfig,
    Splits,
    image_batches,
    load_images,
    load_labels,
    shuffled_splits,
)
from mixerzoo.errors import MixerzooError
from mixerzoo.opening import open_data
from mixerzoo.registry import temporary_plugin

GREY = ImageConfig(size=(1, 16, 16), mean=(0.5,), std=(0.25,), interpolation="bilinear")
COLOUR = ImageConfig(size=(3, 16, 16), mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3), interpolation="bicubic")

SQUASHED = replace(COLOUR, crop_mode="squash")


def picture(seed=0, *, mode="RGB", size=(20, 20)):
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


def fill(folder, count, *, first=0, suffix="png", **options):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        picture(number, **options).save(folder / f"{number:03}.{suffix}")
    return str(folder)


def parts(splits):
    return [splits.calibration, splits.validation, splits.test]


def assert_partition(splits, count):
    indices = [index for part in parts(splits) for index in part]
    assert sorted(indices) == list(range(count))


# Digits


def test_digits_are_split_without_overlap():
    data = open_data("digits")
    assert [len(part) for part in parts(data.splits)] == [1137, 300, 360]
    assert_partition(data.splits, 1797)
    assert data.classes == tuple("0123456789")
    assert data.labels.shape == (1797,)
    for part in parts(data.splits):  # every digit is in every part
        assert set(load_labels(data, part).tolist()) == set(range(10))


def test_digits_are_the_same_every_time():
    one, two = open_data("digits"), open_data("digits")
    assert one.fingerprint == two.fingerprint
    assert one.splits == two.splits


def test_digits_are_digits():
    from sklearn.datasets import load_digits

    data = open_data("digits")
    bunch = load_digits()
    for index in (0, 800, 1796):
        pixels = np.asarray(data.image(index), dtype=float)
        np.testing.assert_allclose(pixels, bunch.images[index] * 255 / 16, atol=0.51)
        assert data.labels[index] == bunch.target[index]


@pytest.mark.parametrize("count", [24, 25, 30, 100, 1001])
def test_shuffled_splits_are_a_partition(count):
    splits = shuffled_splits(count)
    assert_partition(splits, count)
    sizes = [len(part) for part in parts(splits)]
    assert sizes == pytest.approx([0.6 * count, 0.15 * count, 0.25 * count], abs=1)
    assert min(sizes) >= 4
    assert splits == shuffled_splits(count)
    assert list(splits.calibration) != sorted(splits.calibration)


# Folders


def test_a_flat_folder_has_no_labels(tmp_path):
    data = open_data(fill(tmp_path, 24))
    assert data.labels is None
    assert load_labels(data, [0, 1]) is None
    assert data.classes == ()
    assert data.skipped == ()
    assert_partition(data.splits, 24)
    np.testing.assert_array_equal(np.asarray(data.image(7)), np.asarray(picture(7)))


def test_folders_are_classes(tmp_path):
    fill(tmp_path / "cat", 12)
    fill(tmp_path / "dog" / "small", 12, first=12)
    data = open_data(str(tmp_path))
    assert data.classes == ("cat", "dog")
    assert data.labels.tolist() == [0] * 12 + [1] * 12
    assert load_labels(data, [23, 0]).tolist() == [1, 0]


def test_a_mixture_is_not_labelled(tmp_path):
    fill(tmp_path / "cat", 12)
    fill(tmp_path, 12, first=12)
    data = open_data(str(tmp_path))
    assert data.labels is None
    assert data.classes == ()
    assert_partition(data.splits, 24)


def test_one_class_is_no_class(tmp_path):
    fill(tmp_path / "all", 24)
    data = open_data(str(tmp_path))
    assert data.labels is None
    assert data.classes == ()


def test_other_files_are_passed_over(tmp_path):
    fill(tmp_path, 24, suffix="JPG")
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "folder.png").mkdir()
    data = open_data(str(tmp_path))
    assert_partition(data.splits, 24)
    assert data.skipped == ()


def test_unreadable_images_are_skipped_and_named(tmp_path):
    fill(tmp_path / "a", 24)
    whole = (tmp_path / "a" / "000.png").read_bytes()
    (tmp_path / "a" / "empty.png").write_bytes(b"")
    (tmp_path / "a" / "half.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.jpg").write_text("not an image")
    data = open_data(str(tmp_path))
    assert data.skipped == ("a/empty.png", "a/half.png", "text.jpg")
    assert_partition(data.splits, 24)
    assert load_images(data, range(24), GREY).isfinite().all()


def test_files_that_may_not_be_read_are_skipped_too(tmp_path, monkeypatch):
    source = fill(tmp_path, 25)
    read = Path.read_bytes

    def refuse(self):
        if self.name == "003.png":
            raise PermissionError(13, "Permission denied")
        return read(self)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert open_data(source).skipped == ("003.png",)


def test_links_are_followed_and_never_end_in_themselves(tmp_path):
    fill(tmp_path / "elsewhere", 12)
    fill(tmp_path / "plain" / "cat", 12)
    fill(tmp_path / "plain" / "dog", 12, first=12)
    linked = tmp_path / "linked"
    fill(linked / "dog", 12, first=12)
    (linked / "cat").symlink_to(tmp_path / "elsewhere")
    data = open_data(str(linked))
    assert (data.classes, data.labels.tolist()) == (("cat", "dog"), [0] * 12 + [1] * 12)
    assert data.fingerprint == open_data(str(tmp_path / "plain")).fingerprint
    (linked / "dog" / "up").symlink_to(linked)
    (tmp_path / "elsewhere" / "other").symlink_to(linked / "dog")
    (linked / "dog" / "other").symlink_to(tmp_path / "elsewhere")
    (linked / "dog" / "nowhere.png").symlink_to(tmp_path / "nowhere.png")
    assert open_data(str(linked)).skipped == ()


def test_names_that_are_not_utf8_are_names_too(tmp_path):
    for number in range(24):
        folder = os.fsencode(tmp_path) + (b"/caf\xe9" if number % 2 else b"/bar")
        os.makedirs(folder, exist_ok=True)
        picture(number).save(os.fsdecode(folder + b"/%02d\xff.png" % number))
    with open(folder + b"/\xfe.png", "wb"):
        pass
    data = open_data(str(tmp_path))
    assert data.classes == ("bar", "caf\N{REPLACEMENT CHARACTER}")
    assert data.labels.tolist() == [0] * 12 + [1] * 12
    assert data.skipped == ("caf\N{REPLACEMENT CHARACTER}/\N{REPLACEMENT CHARACTER}.png",)


def test_the_fingerprint_of_a_folder_stays_what_it_was(tmp_path):
    for name in ("b/\N{LATIN SMALL LETTER E WITH ACUTE}", "a", "b c/d", "b/a"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        picture(len(name)).save(tmp_path / f"{name}.ppm")
    source = fill(tmp_path, 24, first=10, suffix="ppm")
    paths = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    hasher = hashlib.sha256()
    for path in paths:
        hasher.update(str(path.relative_to(tmp_path)).encode() + b"\0")
        hasher.update(hashlib.sha256(path.read_bytes()).digest())
    assert open_data(source).fingerprint == hasher.hexdigest()


@pytest.mark.parametrize("mode", ["LAB", "HSV", "YCbCr", "PA", "RGBX", "I", "F"])
@pytest.mark.parametrize("config", [GREY, COLOUR], ids=["grey", "colour"])
def test_any_mode_will_do(mode, config):
    (prepared,) = load_images(data_of([Image.new(mode, (20, 20))]), [0], config)
    assert prepared.isfinite().all()


def test_deep_grey_is_scaled_as_predict_does(tmp_path):
    grey = np.asarray(picture(mode="L", size=(16, 16)))
    source = fill(tmp_path, 24)
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "x16.png")
    Image.fromarray(grey.astype(np.int32) * 257).save(tmp_path / "x32.tiff")
    Image.fromarray(grey.astype(np.float32) / 255).save(tmp_path / "xf.tiff")
    Image.fromarray(np.full((16, 16), np.nan, dtype=np.float32)).save(tmp_path / "xnan.tiff")
    data = open_data(source)
    assert data.skipped == ("xnan.tiff",)
    (expected,) = load_images(data_of([Image.fromarray(grey)]), [0], GREY)
    for prepared in load_images(data, [24, 25, 26], GREY):
        torch.testing.assert_close(prepared, expected, atol=0.02, rtol=0)


def test_no_image_left(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(b"x")
    with pytest.raises(MixerzooError, match=r"none of its 3 images can be read \(first: 0\.png\)"):
        open_data(str(tmp_path))


def test_an_empty_folder(tmp_path):
    with pytest.raises(MixerzooError, match=r"no image in it \(looked for \.bmp, "):
        open_data(str(tmp_path))


def test_a_missing_folder(tmp_path):
    with pytest.raises(MixerzooError, match=r"nowhere': no such folder; give a folder of images"):
        open_data(str(tmp_path / "nowhere"))


def test_too_few_images(tmp_path):
    with pytest.raises(MixerzooError, match="23 readable images; at least 24 are needed"):
        open_data(fill(tmp_path, 23))


def test_the_fingerprint_is_of_the_content_and_the_names(tmp_path):
    source = fill(tmp_path / "data", 24)
    seen = [open_data(source).fingerprint]
    assert seen == [open_data(source).fingerprint]
    picture(77).save(tmp_path / "data" / "000.png")
    seen.append(open_data(source).fingerprint)
    (tmp_path / "data" / "001.png").rename(tmp_path / "data" / "zzz.png")
    seen.append(open_data(source).fingerprint)
    fill(tmp_path / "data", 1, first=50)
    seen.append(open_data(source).fingerprint)
    assert len(set(seen)) == 4


# .npz files


def arrays(count=24, shape=(9, 11)):
    generator = np.random.default_rng(0)
    return {
        "x": generator.integers(0, 256, (count, *shape), dtype=np.uint8),
        "y": generator.integers(0, 4, count),
    }


def archive(folder, **content):
    np.savez(folder / "d.npz", **content)
    return str(folder / "d.npz")


@pytest.mark.parametrize("shape", [(9, 11), (9, 11, 1), (9, 11, 3)])
@pytest.mark.parametrize("labelled", [False, True])
def test_archives(tmp_path, shape, labelled):
    content = arrays(shape=shape)
    if not labelled:
        del content["y"]
    data = open_data(archive(tmp_path, **content))
    assert_partition(data.splits, 24)
    np.testing.assert_array_equal(np.asarray(data.image(3)), content["x"][3].squeeze())
    if labelled:
        assert data.labels.tolist() == content["y"].tolist()
        assert data.labels.dtype == torch.int64
    else:
        assert data.labels is None
    assert data.classes == ()  # which a number does not name


def test_labels_are_part_of_the_fingerprint(tmp_path):
    content = arrays()
    labelled = open_data(archive(tmp_path, **content)).fingerprint
    assert labelled != open_data(archive(tmp_path, x=content["x"])).fingerprint
    content["y"][0] += 1
    assert labelled != open_data(archive(tmp_path, **content)).fingerprint


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"images": arrays()["x"]}, r"no array 'x' in it \(found: images\)"),
        ({}, r"no array 'x' in it \(found: nothing\)"),
        ({"x": arrays()["x"].astype(np.float32)}, r"x is float32 \(24, 9, 11\); give uint8 images"),
        ({"x": arrays()["x"][0]}, r"x is uint8 \(9, 11\); give uint8 images"),
        ({"x": arrays(shape=(3, 9, 11))["x"]}, r"x is uint8 \(24, 3, 9, 11\); give uint8 images"),
        ({"x": arrays(count=5)["x"]}, "5 readable images; at least 24 are needed"),
        (arrays() | {"y": np.arange(23)}, r"y is int64 \(23,\); give one integer label an image"),
        (arrays() | {"y": np.zeros(24)}, r"y is float64 \(24,\); give one integer label"),
        (arrays() | {"y": np.zeros((24, 10), int)}, r"y is int64 \(24, 10\); give one integer label"),
        (arrays() | {"y": np.full(24, -1)}, "y has the label -1; labels count from 0"),
        ({"x": np.array([{"a": 1}] * 24, dtype=object)}, "not a readable .npz file .*allow_pickle=False"),
        (arrays() | {"y": np.array([[]] * 24, dtype=object)}, "allow_pickle=False|y is object"),
    ],
)
def test_archives_that_are_not_what_they_should_be(tmp_path, content, message):
    with pytest.raises(MixerzooError, match=f"data '.*d.npz': .*(?:{message})"):
        open_data(archive(tmp_path, **content))


def test_a_pickle_in_an_archive_is_never_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "run",))

    trapped = np.empty(24, dtype=object)
    trapped[:] = [Trap() for _ in range(24)]
    source = archive(tmp_path, **arrays() | {"y": trapped})
    with pytest.raises(MixerzooError, match="allow_pickle=False"):
        open_data(source)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["missing", "empty", "truncated", "text", "array", "flipped", "folder"])
def test_archives_that_are_none(tmp_path, kind):
    path = Path(archive(tmp_path, **arrays()))
    content = path.read_bytes()
    path.unlink()
    if kind == "array":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    elif kind == "folder":
        path.mkdir()
    elif kind != "missing":
        middle = len(content) // 2
        path.write_bytes(
            {
                "empty": b"",
                "truncated": content[:middle],
                "text": b"hello",
                "flipped": content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :],
            }[kind]
        )
    with pytest.raises(MixerzooError, match=r"d\.npz': not a readable \.npz file"):
        open_data(str(path))


# Labels that are the teacher's classes


@pytest.mark.parametrize(
    ("labels", "names", "fit"),
    [
        (range(10), (), True),
        (range(9), (), True),  # the last class may be missing
        ([0] * 9 + [10], (), False),
        ([0] * 9 + [-1], (), False),
        (range(10), "abcdefghij", True),
        (range(9), "abcdefghi", False),
        (None, (), False),
    ],
)
def test_labels_are_taken_where_they_can_be_the_teacher_s_classes(labels, names, fit):
    data = data_of([picture(seed) for seed in range(10)])
    labels = None if labels is None else torch.tensor(list(labels))
    data = replace(data, labels=labels, classes=tuple(names))
    found = fitting_labels(tiny.tiny_teacher(), data, [3, 0])
    assert found is None if not fit else torch.equal(found, labels[[3, 0]])
    assert fitting_labels(tiny.tiny_teacher(num_classes=0), data, [3, 0]) is None


# Preparation


def reference(image, config):
    """What timm's own evaluation transform makes of an image, taken apart."""
    guard_torchvision()
    from timm.data.transforms import str_to_pil_interp

    _, height, width = config.size
    image = image.convert("L" if config.size[0] == 1 else "RGB")
    scale = int(height / config.crop_pct) / min(image.size)
    size = tuple(max(round(side * scale), 1) for side in image.size)
    image = image.resize(size, str_to_pil_interp(config.interpolation))
    left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
    image = image.crop((left, top, left + width, top + height))
    pixels = torch.from_numpy(np.array(image)).float() / 255
    pixels = pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (config.mean, config.std))
    return (pixels - mean) / std


def data_of(images):
    return Dataset(
        name="test",
        fingerprint="",
        image=lambda index: images[index],
        labels=None,
        splits=Splits(calibration=(), validation=(), test=()),
    )


@pytest.mark.parametrize("config", [GREY, COLOUR], ids=["grey", "colour"])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "CMYK"])
@pytest.mark.parametrize("side", [5, 16, 40])
def test_square_images_are_resized_and_normalised(config, mode, side):
    image = picture(mode=mode, size=(side, side))
    (prepared,) = load_images(data_of([image]), [0], config)
    torch.testing.assert_close(prepared, reference(image, config), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(40, 20), (20, 40), (60, 17), (8, 10)])
def test_the_centre_of_other_images_is_taken(size):
    image = picture(size=size)
    (prepared,) = load_images(data_of([image]), [0], COLOUR)
    assert prepared.shape == (3, 16, 16)
    inner = reference(image, COLOUR)
    # Where the centre falls between two pixels, either may be taken.
    shifts = [torch.roll(inner, (dy, dx), (1, 2)) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    assert min(float((prepared - one)[:, 1:-1, 1:-1].abs().max()) for one in shifts) < 1e-4


def test_the_crop_is_of_the_larger_image():
    config = ImageConfig(size=(1, 16, 16), mean=(0.5,), std=(0.5,), interpolation="bilinear", crop_pct=0.8)
    image = picture(mode="L", size=(20, 20))
    (prepared,) = load_images(data_of([image]), [0], config)
    torch.testing.assert_close(prepared, reference(image, config), atol=1e-5, rtol=0)
    assert not torch.equal(prepared, load_images(data_of([image]), [0], GREY)[0])


@pytest.mark.parametrize("config", [GREY, COLOUR, SQUASHED], ids=["grey", "colour", "squashed"])
def test_it_is_timm_s_own_transform(config):
    guard_torchvision()
    from timm.data import create_transform

    transform = create_transform(
        input_size=config.size,
        is_training=False,
        interpolation=config.interpolation,
        mean=config.mean,
        std=config.std,
        crop_pct=config.crop_pct,
        crop_mode=config.crop_mode,
    )
    images = [picture(seed, size=(30 - seed, 12 + seed)) for seed in range(5)]
    mode = "L" if config.size[0] == 1 else "RGB"
    expected = torch.stack([transform(image.convert(mode)) for image in images])
    assert torch.equal(load_images(data_of(images), range(5), config), expected)


def test_a_squashed_image_is_whole():
    image = picture(size=(40, 20))
    whole = image.resize((16, 16), Image.Resampling.BICUBIC)
    prepared = load_images(data_of([image, whole]), [0, 1], SQUASHED)
    torch.testing.assert_close(prepared[0], prepared[1], atol=1e-5, rtol=0)


def test_batches_are_the_images_in_order():
    data = data_of([picture(seed) for seed in range(7)])
    order = [6, 0, 3, 1, 2]
    batches = list(image_batches(data, order, GREY, batch_size=2))
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert torch.equal(torch.cat(batches), load_images(data, order, GREY))


# Other people's data


class Plugin:
    opened: list[str] = []  # noqa: RUF012

    @hookimpl
    def register_datasets(self, register):
        register(
            DatasetSpec(
                name="stripes",
                accepts=lambda source: source.startswith("stripes:"),
                open=self.open,
                summary="stripes",
            )
        )

    def open(self, source):
        self.opened = [*self.opened, source]
        return data_of([picture(0)])


def test_a_registered_kind_of_data_wins_over_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "stripes:3", 24)  # a folder of that name is there too
    plugin = Plugin()
    with temporary_plugin(plugin):
        assert open_data("stripes:3").name == "test"
        assert plugin.opened == ["stripes:3"]
        assert open_data("digits").name == "digits"
    assert len(open_data("stripes:3").splits.calibration) == 14
    assert plugin.opened == ["stripes:3"]
