"""The training set: images as a camera or a phone leaves them, and their captions."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mlx_blockskip.captioned import (
    LISTS,
    SUFFIXES,
    TEXTS,
    Example,
    Options,
    captioned,
    check_here,
    is_image,
    kohya_folders,
    listed,
)
from mlx_blockskip.engine import files, listing
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.photos import load_image, read

__all__ = [
    "Dataset",
    "Example",
    "fitted",
    "grid",
    "load_dataset",
    "load_image",
    "metadata_line",
    "to_image",
    "to_pixels",
]

LITTER = ("Thumbs.db", "desktop.ini")
"""What Windows leaves in folders of photos."""

NAMED = 4
"""Files that a sentence names; the others are counted."""

ALIKE = 8.0
"""Mean difference of small gray copies, of 255, below which two files show the same picture."""


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
    """Read a directory of images; hidden files are passed over, and what else is not used is named in a warning.

    Captions come from a list, one of LISTS, and then only the images it lists are used; without a list from `name.txt`
    or `name.caption` beside `name.jpg`, also as `name.jpg.txt`; and from `prompt` where there is no caption or an empty
    one. Without images of its own, folders such as `10_sks dog` are read, whose name is the caption where there is no
    other. Names match as they do on a Mac: see `listing.alike`. option, prompt_option: what errors call the two. Raises
    UserError where the directory, a list, an image or a caption is not usable, or in iCloud.
    """
    if not directory.is_dir():
        problem = "not a directory" if directory.exists() else "no such directory"
        raise UserError(f"{directory}: {problem}; {option} takes a directory of images")
    options = Options(prompt, option, prompt_option)
    found = [path for path in listing.visible(directory) if is_image(path)]
    for name, image_key, text_key in LISTS:
        check_here(directory / name)
        if (directory / name).is_file():
            examples = listed(directory / name, image_key, text_key, options)
            unlisted = set(found) - {example.path for example in examples}
            left = (
                [f"{directory / name}: {len(unlisted)} images beside it are not listed and not used"]
                if unlisted
                else []
            )
            return _whole(examples, left, distinct=True)
    if not found and (folders := kohya_folders(directory)):
        return _whole(*_of_folders(directory, folders, options), distinct=False)
    examples, left = _of_folder(directory, found, options)
    if not examples:
        more = f"; {left[0].partition(': ')[2]}" if left else ""
        raise UserError(f"{directory}: holds no images ({', '.join(s[1:] for s in SUFFIXES)}){more}")
    return _whole(examples, left, distinct=False)


def _of_folder(
    directory: Path, images: Sequence[Path], options: Options, called: str | None = None
) -> tuple[list[Example], list[str]]:
    """The images of one folder, and a sentence on what else is there."""
    check_here(*(p for p in listing.awaited(directory) if p.suffix.lower() in (*SUFFIXES, *TEXTS)))
    examples, texts = captioned(images, options, called)
    return examples, passed_over(directory, {*images, *texts})


def _of_folders(
    directory: Path, folders: dict[Path, tuple[int, str]], options: Options
) -> tuple[list[Example], list[str]]:
    """The images of folders that are named as sd-scripts has them."""
    examples: list[Example] = []
    warnings: list[str] = []
    for folder, (_, called) in folders.items():
        images = [path for path in listing.visible(folder) if is_image(path)]
        some, left = _of_folder(folder, images, options, called)
        examples, warnings = examples + some, warnings + left
    if len({repeats for repeats, _ in folders.values()}) > 1:
        warnings.append(
            f"{directory}: its folders are to be used {_of_each(folders)} times; here every image counts once"
        )
    if not examples:
        raise UserError(f"{directory}: holds no images in {_some(sorted(folders))}")
    return examples, warnings + passed_over(directory, set(folders))


def _of_each(folders: dict[Path, tuple[int, str]]) -> str:
    return ", ".join(str(repeats) for repeats, _ in folders.values())


def passed_over(directory: Path, used: set[Path]) -> list[str]:
    """A sentence on what a directory holds and is not used, if there is any."""
    left = [path for path in listing.visible(directory) if path not in used and path.name not in LITTER]
    if not left:
        return []
    counted = f"{len(left)} files are" if len(left) > 1 else "1 file is"
    return [f"{directory}: {counted} passed over: {_some(left)}"]


def _some(paths: Sequence[Path]) -> str:
    names = [_described(path) for path in paths[:NAMED]]
    return ", ".join(names) + (f" and {len(paths) - NAMED} more" if len(paths) > NAMED else "")


def _described(path: Path) -> str:
    if path.is_symlink() and not path.exists():
        return f"{path.name} (a broken link)"
    return f"{path.name} (a directory)" if path.is_dir() else path.name


def _whole(examples: Sequence[Example], warnings: Iterable[str], *, distinct: bool) -> Dataset:
    """Read every image once. distinct: whether nothing is to be said of the same picture in two files."""
    state = hashlib.sha256()
    sides, said, small, sums = [], list(warnings), {}, {}
    for example in examples:
        image, problems = read(example.path)
        said += problems
        sides.append(min(image.size))
        sums[example.path] = files.sha256(example.path)
        small[example.path] = _small(image)
        state.update(f"{sums[example.path]} {example.caption!r}\n".encode())
    if not distinct:
        said += _twice(sums, small)
    return Dataset(tuple(examples), state.hexdigest(), tuple(sides), tuple(dict.fromkeys(said)))


def _small(image: Image.Image) -> np.ndarray:
    """(16, 16) gray, float32."""
    return np.asarray(image.resize((16, 16), Image.Resampling.BOX, reducing_gap=2.0).convert("L"), np.float32)


def _twice(sums: dict[Path, str], small: dict[Path, np.ndarray]) -> list[str]:
    """A sentence on pictures that two files hold: of the same bytes, or of one name in two formats."""
    pairs: list[str] = []
    by_sum: dict[str, Path] = {}
    by_name: dict[tuple[Path, str], Path] = {}
    for path, checksum in sums.items():
        name = path.parent, listing.alike(path.stem)
        other = by_sum.get(checksum) or by_name.get(name)
        if other is not None and float(np.abs(small[path] - small[other]).mean()) < ALIKE:
            pairs.append(f"{other.name} and {path.name}")
        by_sum.setdefault(checksum, path)
        by_name.setdefault(name, path)
    if not pairs:
        return []
    more = f" and {len(pairs) - NAMED} more" if len(pairs) > NAMED else ""
    place = next(iter(sums)).parent
    return [f"{place}: the same picture is there twice, and counts twice: {', '.join(pairs[:NAMED])}{more}; remove one"]


def metadata_line(name: str, caption: str) -> str:
    """A line of metadata.jsonl."""
    return json.dumps({"file_name": name, "text": caption}, ensure_ascii=False) + "\n"


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
