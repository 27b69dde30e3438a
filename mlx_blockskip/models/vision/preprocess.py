"""From an image to an encoder's input, as its preprocessor_config.json says.

Source: transformers' Pillow image processors of ViT, CLIP and BiT, and the configs of those before them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mlx_blockskip.engine import files
from mlx_blockskip.engine.errors import UserError

FILE = "preprocessor_config.json"
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SQUARE = {"size": 224, "resample": 2, "image_mean": (0.5,) * 3, "image_std": (0.5,) * 3, "do_center_crop": False}
SHORTEST = {"size": 224, "resample": 3, "image_mean": CLIP_MEAN, "image_std": CLIP_STD, "do_center_crop": True}
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "ViT": SQUARE | {"square": True},
    "CLIP": SHORTEST | {"square": False},
    "Bit": SHORTEST | {"square": False},
}
"""What the class of a config has where the config says nothing. square: what a `size` that is one number means."""


@dataclass(frozen=True)
class Preprocessing:
    """What is done to an image, in this order; None leaves a step out.

    shortest: what its shorter side becomes. size, crop: (height, width). resample: Pillow's number of a filter.
    factor: from levels of 255. mean, std: a number a channel.
    """

    shortest: int | None
    size: tuple[int, int] | None
    resample: int
    crop: tuple[int, int] | None
    factor: float | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None


def read(path: Path) -> Preprocessing:
    """Read preprocessor_config.json. Raises UserError for one that is missing, broken, or of another class."""
    return check(files.read_json(path), path)


def check(config: Any, path: Path) -> Preprocessing:
    """The steps of a config that was read from `path`. Raises UserError naming the file."""
    try:
        return parse(config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: has a value that is missing or of a wrong type ({error}); get it again") from None


def parse(config: Mapping[str, Any]) -> Preprocessing:
    """The steps of a config. Raises UserError for a class or a kind of size that is not implemented."""
    name = config.get("image_processor_type") or config.get("feature_extractor_type") or ""
    known = next((defaults for start, defaults in DEFAULTS.items() if name.startswith(start)), None)
    if known is None:
        raise UserError(f"the image processor {name!r} is not implemented; those of {', '.join(DEFAULTS)} are")
    values = {**known, **{key: value for key, value in config.items() if value is not None}}
    shortest, size = (None, None) if not values.get("do_resize", True) else _size(values["size"], values["square"])
    normalised = values.get("do_normalize", True)
    resample = int(values["resample"])
    Image.Resampling(resample)
    return Preprocessing(
        shortest,
        size,
        resample,
        _crop(values.get("crop_size", 224)) if values["do_center_crop"] else None,
        float(values.get("rescale_factor", 1 / 255)) if values.get("do_rescale", True) else None,
        _channels(values["image_mean"]) if normalised else None,
        _channels(values["image_std"]) if normalised else None,
    )


def _size(size: Any, square: bool) -> tuple[int | None, tuple[int, int] | None]:
    """(shorter side, None) or (None, (height, width))."""
    if isinstance(size, (list, tuple)):
        height, width = size
        return None, (int(height), int(width))
    if not isinstance(size, dict):
        return (None, (int(size), int(size))) if square else (int(size), None)
    if set(size) == {"shortest_edge"}:
        return int(size["shortest_edge"]), None
    if set(size) == {"height", "width"}:
        return None, (int(size["height"]), int(size["width"]))
    raise UserError(f"size {size} is not implemented; shortest_edge alone, or height and width, are")


def _crop(size: Any) -> tuple[int, int]:
    if isinstance(size, dict):
        return int(size["height"]), int(size["width"])
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return int(height), int(width)


def _channels(values: Any) -> tuple[float, ...]:
    if isinstance(values, (int, float)):
        return (float(values),) * 3
    first, second, third = (float(value) for value in values)
    return first, second, third


def pixels(image: Image.Image, how: Preprocessing) -> np.ndarray:
    """(H, W, 3) float32, resized, cropped and normalised."""
    image = image.convert("RGB")
    size = how.size if how.shortest is None else _by_shorter_side(image.height, image.width, how.shortest)
    if size is not None:
        image = image.resize((size[1], size[0]), how.resample)
    levels = np.asarray(image)
    if how.crop is not None:
        levels = centre(levels, how.crop)
    values = levels.astype(np.float64 if how.factor is None else np.float32)
    if how.factor is not None:
        values = (levels * how.factor).astype(np.float32)
    if how.mean is not None and how.std is not None:
        values = (values - np.array(how.mean, values.dtype)) / np.array(how.std, values.dtype)
    return values.astype(np.float32)


def _by_shorter_side(height: int, width: int, shortest: int) -> tuple[int, int]:
    """(height, width), the longer side rounded down. Source: `get_resize_output_image_size`."""
    if width <= height:
        return int(shortest * height / width), shortest
    return shortest, int(shortest * width / height)


def centre(levels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The middle (h, w, C) of (H, W, C), with black around it where it is too small. Source: `center_crop`."""
    pads, starts = [], []
    for have, want in zip(levels.shape[:2], size):
        before = math.ceil(max(want - have, 0) / 2)
        pads.append((before, max(want - have, 0) - before))
        starts.append((have - want) // 2 + before)
    padded = np.pad(levels, [*pads, (0, 0)])
    return padded[starts[0] : starts[0] + size[0], starts[1] : starts[1] + size[1]]
