"""The training set: images as a camera or a phone leaves them, and their captions."""

import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from mlx_blockskip.engine import files
from mlx_blockskip.engine.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".heic", ".heif", ".avif")
LISTS = (("metadata.jsonl", "file_name", "text"), ("train.jsonl", "image", "prompt"))


@dataclass(frozen=True)
class Example:
    """One image and what it shows."""

    path: Path
    caption: str


@dataclass(frozen=True)
class Dataset:
    """examples: sorted by file name. identity: a checksum of all images and captions."""

    examples: tuple[Example, ...]
    identity: str


def load_dataset(directory: Path, prompt: str | None = None) -> Dataset:
    """Read a directory of images.

    Captions come from metadata.jsonl (`file_name`, `text`) or train.jsonl (`image`, `prompt`) where there is one, and
    then only the images it lists are used; else from `name.txt` beside `name.jpg`; else from `prompt`.
    Raises UserError where the directory, a list, an image or a caption is not usable.
    """
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; --data takes a directory of images")
    for name, image_key, text_key in LISTS:
        if (directory / name).is_file():
            examples = _listed(directory, directory / name, image_key, text_key)
            break
    else:
        paths = sorted(p for p in directory.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
        examples = [Example(path, _caption(path, prompt)) for path in paths]
    if not examples:
        raise UserError(f"{directory}: holds no images ({', '.join(s[1:] for s in SUFFIXES)})")
    state = hashlib.sha256()
    for example in examples:
        load_image(example.path)
        state.update(f"{files.sha256(example.path)} {example.caption!r}\n".encode())
    return Dataset(tuple(examples), state.hexdigest())


def _caption(path: Path, prompt: str | None) -> str:
    beside = path.with_suffix(".txt")
    if beside.is_file():
        try:
            return " ".join(beside.read_text(encoding="utf-8-sig").split())
        except UnicodeDecodeError:
            raise UserError(f"{beside}: not UTF-8 text; save it again as UTF-8") from None
    if prompt is None:
        raise UserError(f"{path}: has no caption; write one into {beside.name} beside it, or give --prompt")
    return prompt


def _listed(directory: Path, path: Path, image_key: str, text_key: str) -> list[Example]:
    examples = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            name, text = fields[image_key], fields[text_key]
            if not isinstance(name, str) or not isinstance(text, str):
                raise TypeError
        except (ValueError, KeyError, TypeError):
            raise UserError(f'{path}:{number}: should be {{"{image_key}": ..., "{text_key}": ...}}') from None
        image = directory / name
        if not image.resolve().is_relative_to(directory.resolve()):
            raise UserError(f"{path}:{number}: {name} is outside of {directory}; move it there")
        if not image.is_file():
            raise UserError(f"{path}:{number}: {name} does not exist; correct or remove the line")
        examples.append(Example(image, text))
    return sorted(examples, key=lambda e: (e.path.name, e.caption))


def load_image(path: Path) -> Image.Image:
    """An image as RGB in sRGB, upright, on white where it is transparent. Raises UserError where it cannot be read."""
    if path.suffix.lower() in (".heic", ".heif"):
        import pillow_heif

        pillow_heif.register_heif_opener()
    try:
        with Image.open(path) as opened:
            opened.load()
            upright = ImageOps.exif_transpose(opened)
            upright.info.setdefault("icc_profile", opened.info.get("icc_profile"))
        return _to_srgb(upright)
    except UnidentifiedImageError:
        raise UserError(f"{path}: not an image that Pillow can read; remove it or replace it") from None
    except Image.DecompressionBombError:
        raise UserError(f"{path}: has too many pixels to be a photo; make it smaller") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise UserError(f"{path}: not an image that Pillow can read ({error}); remove it or replace it") from None


def _to_srgb(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    if image.mode.startswith(("I", "F")):
        return _from_wide_gray(image).convert("RGB")
    if image.mode == "P" or (image.mode in ("L", "RGB", "1") and "transparency" in image.info):
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    alpha = image.getchannel("A") if image.mode in ("RGBA", "LA", "PA") else None
    if image.mode in ("RGBA", "PA", "1"):
        image = image.convert("RGB")
    elif image.mode == "LA":
        image = image.convert("L")
    image = _apply_profile(image, profile)
    if alpha is not None:
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=alpha)
        return white
    return image


def _apply_profile(image: Image.Image, profile: bytes | None) -> Image.Image:
    """The colours of the embedded profile in sRGB. A profile that is broken or of other colours is not applied."""
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            target = ImageCms.createProfile("sRGB")
            converted = ImageCms.profileToProfile(image, source, target, outputMode="RGB")
            if converted is not None:
                return converted
        except (ImageCms.PyCMSError, OSError, ValueError):
            pass
    return image.convert("RGB")


def _from_wide_gray(image: Image.Image) -> Image.Image:
    """16-bit, 32-bit and float gray as 8-bit gray."""
    values = np.asarray(image).astype(np.float64)
    top = 65535.0 if image.mode.startswith("I") else max(1.0, float(values.max(initial=1.0)))
    return Image.fromarray(np.clip(values / top * 255 + 0.5, 0, 255).astype(np.uint8))


def to_pixels(image: Image.Image) -> np.ndarray:
    """(H, W, 3) float32 in [-1, 1]."""
    return np.asarray(image, np.float32) / 127.5 - 1.0


def to_image(pixels: np.ndarray) -> Image.Image:
    """The inverse, clipped and rounded. Source: diffusers VaeImageProcessor."""
    scaled = np.clip(pixels.astype(np.float32) / 2 + 0.5, 0, 1) * 255
    return Image.fromarray(np.round(scaled).astype(np.uint8))


def grid(rows: list[list[Image.Image]], labels: list[Any] | None = None) -> Image.Image:
    """Images of one size in rows, each row with its label above."""
    from PIL import ImageDraw, ImageFont

    width, height = rows[0][0].size
    band = 22 if labels else 0
    gap = 4
    columns = max(map(len, rows))
    sheet = Image.new("RGB", (columns * (width + gap) + gap, len(rows) * (height + band + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for r, row in enumerate(rows):
        top = gap + r * (height + band + gap)
        if labels:
            draw.text((gap, top + 3), str(labels[r]), fill="black", font=ImageFont.load_default(14))
        for c, image in enumerate(row):
            sheet.paste(image.resize((width, height)), (gap + c * (width + gap), top + band))
    return sheet
