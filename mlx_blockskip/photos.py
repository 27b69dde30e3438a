"""Photos as a camera or a phone leaves them: read as RGB in sRGB, upright, on white where they are transparent."""

import io
import warnings as python_warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from mlx_blockskip.engine.errors import UserError

LARGE = 90_000_000
"""Pixels above which a photo is made smaller while it is decoded, or once it is."""

MOST, MOST_JPEG = 256_000_000, 1_000_000_000
"""Pixels that no photo has. A JPEG is decoded at an eighth of its sides without being made whole."""

JPEGS = ("JPEG", "MPO")


def load_image(path: Path) -> Image.Image:
    """An image as RGB in sRGB, upright, on white where it is transparent. Raises UserError where it cannot be read."""
    return read(path)[0]


def read(path: Path) -> tuple[Image.Image, list[str]]:
    """The image and warnings about it. One of more than LARGE pixels is made smaller. Raises UserError."""
    try:
        with path.open("rb") as file:
            if file.read(12)[4:8] == b"ftyp":  # HEIC by its content: phones and sites rename it to .jpg
                import pillow_heif

                pillow_heif.register_heif_opener()
        # Pillow warns about EXIF that is not needed
        with python_warnings.catch_warnings(action="ignore"), _of_any_size(), Image.open(path) as opened:
            factor = _made_smaller(path, opened)
            opened.load()
            upright = ImageOps.exif_transpose(opened.reduce(factor) if factor > 1 else opened)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnidentifiedImageError:
        raise UserError(f"{path}: not an image that Pillow can read; remove it or replace it") from None
    except Exception as error:  # decoders raise whatever a broken file makes of them
        reason = "truncated file" if "truncated" in str(error).lower() else " ".join(str(error).split())
        raise UserError(f"{path}: not an image that Pillow can read ({reason}); remove it or replace it") from None
    image, applied = _to_srgb(upright)
    problem = f"{path}: its colour profile is broken or of another kind; its colours are taken as sRGB"
    return image, [] if applied else [problem]


@contextmanager
def _of_any_size() -> Iterator[None]:
    """Inside, Pillow opens images of any size; what is too large is refused before it is decoded."""
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _made_smaller(path: Path, opened: Image.Image) -> int:
    """By what the sides of a large image are to be divided once it is decoded; a JPEG is decoded smaller. Raises
    UserError for what is no photo.
    """
    pixels = opened.width * opened.height
    if pixels > (MOST_JPEG if opened.format in JPEGS else MOST):
        raise UserError(
            f"{path}: has too many pixels to be a photo ({opened.width} x {opened.height}); make it smaller"
        )
    factor = 1
    while pixels > LARGE * factor**2:
        factor *= 2
    if factor > 1 and opened.format in JPEGS:
        opened.draft(opened.mode, (opened.width // factor, opened.height // factor))
        return 1
    return factor


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
