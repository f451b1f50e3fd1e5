"""Images and, where there are any, labels: embedded digits, a folder, or an .npz file.

Every data set hands out PIL images; timm's evaluation transform turns them into what the teacher was trained
on. Labels are optional everywhere: the search compares a student with its teacher.
"""

from __future__ import annotations

import hashlib
import io
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from PIL import Image

from mixerzoo.compat import guard_torchvision
from mixerzoo.errors import MixerzooError
from mixerzoo.images import eight_bit

IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
)
SPLIT_SEED = 0
MIN_IMAGES = 24  # four to validate on, of which candidates, students and finalists take two at least


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """What a teacher expects of an image.

    Attributes:
        size: channels, height and width in pixels.
        mean: per channel, subtracted after scaling to [0, 1].
        std: per channel, divided by.
        interpolation: timm's name of the resampling filter.
        crop_pct: share of the resized image that the centre crop keeps.
        crop_mode: timm's name of how the image is resized before: `center` covers the crop and keeps proportions,
            `squash` scales each side on its own.
    """

    size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    crop_mode: str = "center"


@dataclass(frozen=True, kw_only=True)
class Splits:
    """Disjoint image indices: to distil on, to search on, and to report on. Nothing is chosen on `test`."""

    calibration: tuple[int, ...]
    validation: tuple[int, ...]
    test: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Images by index.

    Attributes:
        name: as the user said it.
        fingerprint: hash of the images and labels; part of every library key.
        image: index to PIL image, of any mode.
        labels: (n,) int64, or None.
        splits: which images serve what.
        classes: names of the labels, where known.
        skipped: images that could not be read, by name.
    """

    name: str
    fingerprint: str
    image: Callable[[int], Image.Image]
    labels: torch.Tensor | None
    splits: Splits
    classes: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """What a plugin registers: how to recognise a `--data` value and open it.

    Attributes:
        name: of the kind of data.
        accepts: whether a `--data` value is of this kind.
        open: the value to a Dataset; raises MixerzooError.
        summary: one line for the help text.
    """

    name: str
    accepts: Callable[[str], bool]
    open: Callable[[str], Dataset]
    summary: str = ""


def load_images(data: Dataset, indices: Sequence[int], config: ImageConfig) -> torch.Tensor:
    """Return images (B, C, H, W) float32, resized, cropped and normalised as `config` says.

    Deep grey, such as a PNG of 16 bits, is scaled to 8 bits before.
    """
    guard_torchvision()
    from timm.data import create_transform

    transform = create_transform(
        config.size,
        is_training=False,
        interpolation=config.interpolation,
        mean=config.mean,
        std=config.std,
        crop_pct=config.crop_pct,
        crop_mode=config.crop_mode,
    )
    mode = "L" if config.size[0] == 1 else "RGB"
    batch = torch.empty(len(indices), *config.size)
    for row, index in enumerate(indices):
        batch[row] = transform(eight_bit(data.image(index)).convert(mode))
    return batch


def load_labels(data: Dataset, indices: Sequence[int]) -> torch.Tensor | None:
    """Return labels (B,) int64, or None for unlabelled data."""
    return None if data.labels is None else data.labels[list(indices)]


def shuffled_splits(count: int) -> Splits:
    """Split `count` images 60/15/25 by a fixed permutation."""
    order = np.random.default_rng(SPLIT_SEED).permutation(count).tolist()
    first, second = round(count * 0.6), round(count * 0.75)
    return Splits(
        calibration=tuple(order[:first]), validation=tuple(order[first:second]), test=tuple(order[second:])
    )


def open_digits(source: str = "digits") -> Dataset:
    """scikit-learn's 1,797 handwritten digits, 8x8: 1,137 to train and distil on, 300 to search, 360 to report."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = np.round(np.asarray(bunch.images) * (255 / 16)).astype(np.uint8)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(pixels)).tolist()
    return Dataset(
        name=source,
        fingerprint=_digest(pixels.tobytes(), np.asarray(bunch.target).tobytes()),
        image=lambda index: Image.fromarray(pixels[index]),
        labels=torch.from_numpy(np.asarray(bunch.target, dtype=np.int64)),
        splits=Splits(
            calibration=tuple(order[:1137]), validation=tuple(order[1137:1437]), test=tuple(order[1437:])
        ),
        classes=tuple("0123456789"),
    )


def open_npz(source: str) -> Dataset:
    """An .npz with images `x`, uint8 (n, H, W) or (n, H, W, 3), and optionally labels `y` (n,), integers from 0 on.

    Its classes have no names.
    """
    path = Path(source)
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays: dict[str, np.ndarray[Any, Any]] = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, TypeError, BadZipFile, zlib.error) as error:
        raise MixerzooError(f"data '{source}': not a readable .npz file ({error})") from None
    if "x" not in arrays:
        raise MixerzooError(f"data '{source}': no array 'x' in it (found: {', '.join(arrays) or 'nothing'})")
    x, y = arrays["x"], arrays.get("y")
    if x.dtype != np.uint8 or not (x.ndim == 3 or (x.ndim == 4 and x.shape[3] in (1, 3))):
        raise MixerzooError(
            f"data '{source}': x is {x.dtype} {x.shape}; give uint8 images of shape (n, H, W) or (n, H, W, 3)"
        )
    x = x[..., 0] if x.ndim == 4 and x.shape[3] == 1 else x
    _demand_enough(source, len(x))
    if y is not None and (y.shape != (len(x),) or not np.issubdtype(y.dtype, np.integer)):
        raise MixerzooError(f"data '{source}': y is {y.dtype} {y.shape}; give one integer label an image")
    if y is not None and y.min() < 0:
        raise MixerzooError(
            f"data '{source}': y has the label {y.min()}; labels count from 0, and y is left out where there are none"
        )
    labels = None if y is None else torch.from_numpy(y.astype(np.int64))
    return Dataset(
        name=source,
        fingerprint=_digest(x.tobytes(), b"" if y is None else y.tobytes()),
        image=lambda index: Image.fromarray(x[index]),
        labels=labels,
        splits=shuffled_splits(len(x)),
    )


def open_folder(source: str) -> Dataset:
    """A folder of images, flat (no labels) or with one folder a class. Unreadable images are skipped and named.

    Links are followed, also those to folders.
    """
    root = Path(source)
    if not root.is_dir():
        raise MixerzooError(
            f"data '{source}': no such folder; give a folder of images, an .npz file or 'digits'"
        )
    found = sorted(path for path in _files_below(root) if path.suffix.lower() in IMAGE_SUFFIXES)
    if not found:
        raise MixerzooError(
            f"data '{source}': no image in it (looked for {', '.join(sorted(IMAGE_SUFFIXES))})"
        )
    paths: list[Path] = []
    skipped: list[str] = []
    hasher = hashlib.sha256()
    for path in found:
        try:
            content = path.read_bytes()
            eight_bit(Image.open(io.BytesIO(content))).convert("RGB")
        except Exception:  # PIL raises a different type for every way a file can be broken
            skipped.append(_readable(path.relative_to(root)))
            continue
        paths.append(path)
        hasher.update(os.fsencode(path.relative_to(root)) + b"\0" + hashlib.sha256(content).digest())
    if not paths:
        raise MixerzooError(
            f"data '{source}': none of its {len(found)} images can be read (first: {skipped[0]})"
        )
    _demand_enough(source, len(paths))
    # Class folders are labels only where every image is in one: a mixture is taken as unlabelled.
    parents = [path.relative_to(root).parts[:-1] for path in paths]
    folders = sorted({parts[0] for parts in parents}) if all(parents) else []
    labels = torch.tensor([folders.index(parts[0]) for parts in parents]) if len(folders) > 1 else None
    return Dataset(
        name=source,
        fingerprint=hasher.hexdigest(),
        image=lambda index: Image.open(paths[index]),
        labels=labels,
        splits=shuffled_splits(len(paths)),
        classes=() if labels is None else tuple(map(_readable, folders)),
        skipped=tuple(skipped),
    )


# The last registered that accepts a value opens it, so that the folder, which accepts any, comes first.
BUILTIN_DATASETS = (
    DatasetSpec(
        name="folder",
        accepts=lambda source: True,
        open=open_folder,
        summary="a folder of images, with or without class folders",
    ),
    DatasetSpec(
        name="npz",
        accepts=lambda source: source.lower().endswith(".npz"),
        open=open_npz,
        summary="an .npz file with images x and, optionally, labels y",
    ),
    DatasetSpec(
        name="digits",
        accepts=lambda source: source == "digits",
        open=open_digits,
        summary="1,797 real handwritten digits (scikit-learn)",
    ),
)


def image_batches(
    data: Dataset, indices: Sequence[int], config: ImageConfig, batch_size: int = 32
) -> Iterable[torch.Tensor]:
    """Return prepared images (B, C, H, W) in order, loaded anew each time they are gone through."""
    return _ImageBatches(data=data, indices=tuple(indices), config=config, batch_size=batch_size)


@dataclass(frozen=True, kw_only=True)
class _ImageBatches:
    data: Dataset
    indices: tuple[int, ...]
    config: ImageConfig
    batch_size: int

    def __iter__(self) -> Iterator[torch.Tensor]:
        for first in range(0, len(self.indices), self.batch_size):
            yield load_images(self.data, self.indices[first : first + self.batch_size], self.config)


def _files_below(folder: Path, above: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Yield the files below a folder. A link to a folder that it is in is not followed: that would never end."""
    here = os.path.realpath(folder)
    if here in above:
        return
    try:
        inner = list(folder.iterdir())
    except OSError:  # it may not be read
        return
    for path in inner:
        if os.path.isdir(path):
            yield from _files_below(path, above | {here})
        elif os.path.isfile(path):
            yield path


def _readable(name: str | Path) -> str:
    """Return a name that can be printed: what is not UTF-8 in it is replaced."""
    return os.fsencode(name).decode(errors="replace")


def _demand_enough(source: str, count: int) -> None:
    if count < MIN_IMAGES:
        raise MixerzooError(f"data '{source}': {count} readable images; at least {MIN_IMAGES} are needed")


def _digest(*parts: bytes) -> str:
    hasher = hashlib.sha256()
    for part in parts:
        hasher.update(hashlib.sha256(part).digest())
    return hasher.hexdigest()
