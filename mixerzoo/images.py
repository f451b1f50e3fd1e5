"""Images as people have them: any mode and depth, broken ones named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

DEEP = frozenset({"I", "I;16", "I;16L", "I;16B", "I;16N", "F"})  # modes that Pillow would cut off at 255


def open_image(path: Path) -> Image.Image:
    """Return an image with 8 bits a channel, in whatever mode; of several frames, the first.

    Deep grey is scaled by its depth: 65,535 becomes 255. Float images are in [0, 1], or in [0, 255].

    Raises:
        OSError: with the reason, for anything that is not an image.
    """
    if path.is_dir():
        raise OSError("it is a folder; name the images in it")
    try:
        with Image.open(path) as file:
            file.load()
            return eight_bit(file)
    except FileNotFoundError:
        raise OSError("no such file") from None
    except UnidentifiedImageError:
        raise OSError("not an image that Pillow knows") from None
    except Exception as error:  # Pillow raises a different type for every way a file can be broken
        said = " ".join(str(error).split()) or type(error).__name__
        raise OSError(said) from None


def eight_bit(image: Image.Image) -> Image.Image:
    """Return an image whose channels have 8 bits, a copy."""
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA")  # Pillow warns of any other way
    if image.mode == "LAB":
        return image.convert("RGB")  # from which there is a way to grey, too
    if image.mode not in DEEP:
        return image.copy()
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("it has values that are not finite")
    return Image.fromarray(
        np.clip(np.round(values * (255 / _white(image.mode, values))), 0, 255).astype(np.uint8)
    )


def _white(mode: str, values: np.ndarray[Any, Any]) -> float:
    """Return the value that is white."""
    most = float(values.max(initial=0))
    if mode.startswith("I;16"):
        return 65535.0
    if mode == "F" and most <= 1:
        return 1.0
    return next((white for white in (255.0, 65535.0) if most <= white), most)
