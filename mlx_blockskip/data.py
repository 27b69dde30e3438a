"""The training set: images as a camera or a phone leaves them, and their captions."""

import functools
import hashlib
import io
import json
import os
import shlex
import warnings as python_warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from mlx_blockskip.engine import files, listing, parsed
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
    """examples: sorted by file name. identity: a checksum of all images and captions.

    short_sides: of each example in pixels. warnings: what the user should hear about these images, a sentence each.
    """

    examples: tuple[Example, ...]
    identity: str
    short_sides: tuple[int, ...]
    warnings: tuple[str, ...] = ()


def load_dataset(
    directory: Path, prompt: str | None = None, *, option: str = "--data", prompt_option: str = "--prompt"
) -> Dataset:
    """Read a directory of images; hidden files and other files are passed over.

    Captions come from metadata.jsonl (`file_name`, `text`), else from train.jsonl (`image`, `prompt`), and then only
    the images it lists are used; without a list from `name.txt` beside `name.jpg`; and from `prompt` where there is no
    caption or an empty one. Names match as they do on a Mac: see `listing.alike`. option, prompt_option: what errors
    call the two. Raises UserError where the directory, a list, an image or a caption is not usable, or in iCloud.
    """
    if not directory.is_dir():
        problem = "not a directory" if directory.exists() else "no such directory"
        raise UserError(f"{directory}: {problem}; {option} takes a directory of images")
    found = [p for p in listing.visible(directory) if _looks_like_image(p) and p.is_file()]
    warnings = []
    for name, image_key, text_key in LISTS:
        _check_here(directory / name)
        if (directory / name).is_file():
            examples = _listed(directory / name, image_key, text_key, prompt, prompt_option)
            if unlisted := set(found) - {example.path for example in examples}:
                warnings.append(f"{directory / name}: {len(unlisted)} images beside it are not listed and not used")
            break
    else:
        _check_here(*(p for p in listing.awaited(directory) if _looks_like_image(p) or p.suffix.lower() == ".txt"))
        texts = _texts(directory, found)
        examples = [Example(path, _caption(path, texts[path], prompt, prompt_option)) for path in found]
    if not examples:
        raise UserError(f"{directory}: holds no images ({', '.join(s[1:] for s in SUFFIXES)})")
    state = hashlib.sha256()
    sides = []
    for example in examples:
        image, problems = _read(example.path)
        warnings += problems
        sides.append(min(image.size))
        state.update(f"{files.sha256(example.path)} {example.caption!r}\n".encode())
    return Dataset(tuple(examples), state.hexdigest(), tuple(sides), tuple(dict.fromkeys(warnings)))


def metadata_line(name: str, caption: str) -> str:
    """A line of metadata.jsonl."""
    return json.dumps({"file_name": name, "text": caption}, ensure_ascii=False) + "\n"


def _looks_like_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


def _check_here(*paths: Path) -> None:
    """Raise UserError where one of these files is still in iCloud."""
    away = [path for path in paths if listing.in_icloud(path)]
    if away:
        more = f", and {len(away) - 1} more like it" if len(away) > 1 else ""
        raise UserError(
            f"{away[0]}: is in iCloud and not on this Mac{more}; choose Download Now in Finder, or run: "
            f"brctl download {shlex.quote(str(away[0].parent))}"
        )


def _texts(directory: Path, images: Sequence[Path]) -> dict[Path, Path]:
    """Where the caption of each image is, or would be: in the text of its name, else of a name alike that is no other
    image's.
    """
    own = {image: image.with_suffix(".txt") for image in images}
    texts = {p for p in listing.visible(directory) if p.suffix.lower() == ".txt" and p.is_file()}
    others = listing.by_spelling(sorted(texts - set(own.values())))
    return {image: text if text.is_file() else listing.spelled(text, others) for image, text in own.items()}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; save it again as UTF-8") from None


def _caption(path: Path, beside: Path, prompt: str | None, prompt_option: str) -> str:
    caption = " ".join(_text(beside).split()) if beside.is_file() else ""
    if caption:
        return caption
    if prompt is None:
        raise UserError(f"{path}: has no caption; write one into {beside.name} beside it, or give {prompt_option}")
    return prompt


def _listed(path: Path, image_key: str, text_key: str, prompt: str | None, prompt_option: str) -> list[Example]:
    directory, examples = path.parent, []
    spellings = functools.cache(lambda folder: listing.by_spelling(listing.visible(folder)))
    for number, line in enumerate(_text(path).split("\n"), 1):  # not splitlines: JSON strings may hold U+2028
        if not line.strip():
            continue
        try:
            fields = parsed.parse(line.encode("utf-8", "surrogatepass"))
            name, text = fields[image_key], fields[text_key]
            if not isinstance(name, str) or not isinstance(text, str) or "\0" in name:
                raise TypeError
        except (ValueError, KeyError, TypeError):
            raise UserError(f'{path}:{number}: should be {{"{image_key}": ..., "{text_key}": ...}}') from None
        # by name, not resolved: the Hub's cache keeps a data set's files as links to elsewhere
        inside = os.path.normpath(name)
        if os.path.isabs(inside) or inside.split(os.sep)[0] == os.pardir:
            raise UserError(f"{path}:{number}: {name} is outside of {directory}; move it there")
        image = listing.spelled(directory / inside, spellings((directory / inside).parent))
        _check_here(image)
        if not image.is_file():
            raise UserError(f"{path}:{number}: {name} does not exist; correct or remove the line")
        if not text.strip() and prompt is None:
            raise UserError(f'{path}:{number}: "{text_key}" is empty; write a caption, or give {prompt_option}')
        examples.append(Example(image, text if text.strip() else prompt or ""))
    if not examples:
        raise UserError(f"{path}: lists no images; add lines or remove the file")
    return sorted(examples, key=lambda example: (example.path, example.caption))


def load_image(path: Path) -> Image.Image:
    """An image as RGB in sRGB, upright, on white where it is transparent. Raises UserError where it cannot be read."""
    return _read(path)[0]


def _read(path: Path) -> tuple[Image.Image, list[str]]:
    """The image and warnings about it."""
    try:
        with path.open("rb") as file:
            if file.read(12)[4:8] == b"ftyp":  # HEIC by its content: phones and sites rename it to .jpg
                import pillow_heif

                pillow_heif.register_heif_opener()
        # Pillow warns about EXIF that is not needed
        with python_warnings.catch_warnings(action="ignore"), Image.open(path) as opened:
            opened.load()
            upright = ImageOps.exif_transpose(opened)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnidentifiedImageError:
        raise UserError(f"{path}: not an image that Pillow can read; remove it or replace it") from None
    except Image.DecompressionBombError:
        raise UserError(f"{path}: has too many pixels to be a photo; make it smaller") from None
    except Exception as error:  # decoders raise whatever a broken file makes of them
        reason = "truncated file" if "truncated" in str(error).lower() else " ".join(str(error).split())
        raise UserError(f"{path}: not an image that Pillow can read ({reason}); remove it or replace it") from None
    image, applied = _to_srgb(upright)
    problem = f"{path}: its colour profile is broken or of another kind; its colours are taken as sRGB"
    return image, [] if applied else [problem]


def _to_srgb(image: Image.Image) -> tuple[Image.Image, bool]:
    """RGB in sRGB on white, and whether the colour profile, if there is one, was applied."""
    profile = image.info.get("icc_profile")
    alpha = None
    if image.mode.startswith(("I", "F")):
        image = _from_wide_gray(image)
    elif image.has_transparency_data:
        image = image.convert("LA" if image.mode in ("1", "L", "LA", "La") else "RGBA")
        alpha = image.getchannel("A")
        image = image.convert(image.mode[:-1])
    elif image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    converted = _apply_profile(image, profile) if profile else None
    result = image.convert("RGB") if converted is None else converted
    if alpha is not None:
        white = Image.new("RGB", result.size, "white")
        white.paste(result, mask=alpha)
        result = white
    return result, converted is not None or not profile


def _apply_profile(image: Image.Image, profile: bytes) -> Image.Image | None:
    """The colours of the profile in sRGB; None where the profile is broken or of other channels than the image's."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if image.mode == "L" and source.profile.xcolor_space.strip() == "RGB":
            image = image.convert("RGB")
        return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None


def _from_wide_gray(image: Image.Image) -> Image.Image:
    """16-bit, 32-bit and float gray as 8-bit gray: full scale is 65535 or 1, or the largest value where that is more.

    A value that PNG declares transparent becomes white.
    """
    values = np.nan_to_num(np.asarray(image).astype(np.float64))
    top = max(65535.0 if image.mode.startswith("I") else 1.0, float(values.max()))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        values[values == transparent] = top
    return Image.fromarray(np.clip(values / top * 255 + 0.5, 0, 255).astype(np.uint8))


def to_pixels(image: Image.Image) -> np.ndarray:
    """(H, W, 3) float32 in [-1, 1]."""
    return np.asarray(image, np.float32) / 127.5 - 1.0


def to_image(pixels: np.ndarray) -> Image.Image:
    """The inverse, clipped and rounded. Source: diffusers VaeImageProcessor."""
    scaled = np.clip(pixels.astype(np.float32) / 2 + 0.5, 0, 1) * 255
    return Image.fromarray(np.round(scaled).astype(np.uint8))


def fitted(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    """(H, W, 3) float32 scaled until it covers this size, and its middle cut out; itself where it has it.

    Source: diffusers PixArtImageProcessor.resize_and_crop_tensor (bilinear between pixel centres, no averaging).
    """
    rows, columns = pixels.shape[:2]
    if (columns, rows) == (width, height):
        return pixels
    ratio = max(width / columns, height / rows)
    across, down = int(columns * ratio), int(rows * ratio)
    steps = (columns / across, 0, 0, 0, rows / down, 0)
    left, top = (across - width) // 2, (down - height) // 2
    channels = [
        Image.fromarray(channel).transform((across, down), Image.Transform.AFFINE, steps, Image.Resampling.BILINEAR)
        for channel in np.ascontiguousarray(pixels.transpose(2, 0, 1))
    ]
    return np.stack([np.asarray(c)[top : top + height, left : left + width] for c in channels], axis=-1)


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
