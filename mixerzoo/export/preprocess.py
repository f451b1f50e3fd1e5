"""From an image to a model's input, with Pillow and numpy alone: what is written beside an exported file.

It does what timm's evaluation transform does, to the bit but for the rounding of float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image

from mixerzoo.data import ImageConfig
from mixerzoo.errors import MixerzooError

CROP_MODES = ("center", "squash")  # timm has `border` too, which none of its plain vision transformers wants


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """Steps, in the order of the attributes; the result is (C, H, W) float32.

    Attributes:
        mode: of Pillow, `L` or `RGB`: the image is converted to it, with 8 bits a channel.
        crop_mode: `center` or `squash`, see `resize`.
        resize: height and width in pixels. In mode `squash` the image is scaled to just that; in mode `center` to cover
            it, keeping its proportions: of a square, its shorter side becomes that, and the longer one is rounded down.
        interpolation: Pillow's name of the filter, in lower case.
        crop: height and width in pixels that are cut out of the middle.
        scale: what the pixels are multiplied by.
        mean: per channel, subtracted.
        std: per channel, divided by.
    """

    mode: str
    crop_mode: str
    resize: tuple[int, int]
    interpolation: str
    crop: tuple[int, int]
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, config: ImageConfig) -> Preprocess:
        """Return the steps that prepare images as a teacher expects them.

        Raises:
            MixerzooError: for another crop mode of timm.
        """
        if config.crop_mode not in CROP_MODES:
            raise MixerzooError(
                f"crop mode '{config.crop_mode}': images of this teacher cannot be prepared without timm "
                f"(known: {', '.join(CROP_MODES)}); use --format safetensors"
            )
        channels, height, width = config.size
        share = config.crop_pct or 0.875  # timm's own, where there is none
        return cls(
            mode="L" if channels == 1 else "RGB",
            crop_mode=config.crop_mode,
            resize=(math.floor(height / share), math.floor(width / share)),
            interpolation=config.interpolation,
            crop=(height, width),
            scale=1 / 255,
            mean=tuple(config.mean),
            std=tuple(config.std),
        )

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Preprocess:
        """Rebuild the steps.

        Raises:
            LookupError, TypeError, ValueError: for anything else.
        """
        (rows, columns), (height, width) = data["resize"], data["crop"]
        steps = cls(
            mode=str(data["mode"]),
            crop_mode=str(data.get("crop_mode", "center")),  # older files have none
            resize=(int(rows), int(columns)),
            interpolation=str(data["interpolation"]),
            crop=(int(height), int(width)),
            scale=float(data["scale"]),
            mean=tuple(map(float, data["mean"])),
            std=tuple(map(float, data["std"])),
        )
        known = (
            steps.mode in ("L", "RGB")
            and steps.crop_mode in CROP_MODES
            and steps.interpolation.upper() in Image.Resampling.__members__
        )
        if not known:
            raise ValueError(
                f"mode {steps.mode}, crop mode {steps.crop_mode}, interpolation {steps.interpolation}"
            )
        return steps

    def __call__(self, image: Image.Image) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Return an image as (C, H, W)."""
        image = image.convert(self.mode)
        size = self._scaled(image.height, image.width)
        if size != (image.height, image.width):
            image = image.resize(size[::-1], Image.Resampling[self.interpolation.upper()])
        height, width = self.crop
        top, left = round((image.height - height) / 2), round((image.width - width) / 2)
        image = image.crop((left, top, left + width, top + height))
        pixels = np.asarray(image, dtype=np.float32).reshape(height, width, -1) * np.float32(self.scale)
        mean, std = (np.asarray(values, dtype=np.float32) for values in (self.mean, self.std))
        normal = (pixels - mean) / std
        return np.ascontiguousarray(normal.transpose(2, 0, 1))

    def _scaled(self, height: int, width: int) -> tuple[int, int]:
        rows, columns = self.resize
        if self.crop_mode == "squash":
            return rows, columns
        if rows != columns:
            ratio = min(height / rows, width / columns)
            return round(height / ratio), round(width / ratio)
        if height <= width:
            return rows, int(rows * width / height)
        return int(rows * height / width), rows
