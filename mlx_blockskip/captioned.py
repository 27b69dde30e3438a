"""Where captions of a directory of images are: in a list of all, beside each image, or in the name of its folder."""

import csv
import functools
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_blockskip.engine import listing, parsed
from mlx_blockskip.engine.errors import UserError

SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".mpo", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"),
    *(".heic", ".heif", ".avif"),
)
JPEG = b"\xff\xd8\xff"
"""How a JPEG begins, whatever it is called."""

LISTS = (
    ("metadata.jsonl", "file_name", "text"),
    ("train.jsonl", "image", "prompt"),
    ("metadata.csv", "file_name", "text"),
)
"""Lists of images, the first that is there: its name, and what the image and its caption are called in it."""

CAPTION = "caption"
"""What a caption is called in any list, too."""

TEXTS = (".txt", ".caption")
KOHYA = re.compile(r"(\d+)_(\S.*)")
"""Folders of sd-scripts: how often its images are used, and how they are called."""

MOST_LIST, MOST_CAPTION = 64 << 20, 64 << 10
"""Bytes of a list and of a caption."""

RICH_TEXT = "{\\rtf"


@dataclass(frozen=True)
class Example:
    """One image and what it shows."""

    path: Path
    caption: str


@dataclass(frozen=True)
class Options:
    """What was given for images without a caption, and what errors call the options."""

    prompt: str | None
    data: str = "--data"
    prompt_option: str = "--prompt"


def is_image(path: Path) -> bool:
    """Whether a file is an image by its name, or a JPEG by its content."""
    if path.suffix.lower() in SUFFIXES:
        return path.is_file()
    if path.suffix.lower() in (*TEXTS, ".jsonl", ".csv") or not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            return file.read(len(JPEG)) == JPEG
    except OSError:  # it is passed over, and named
        return False


def check_here(*paths: Path) -> None:
    """Raise UserError where one of these files is still in iCloud."""
    away = [path for path in paths if listing.in_icloud(path)]
    if away:
        more = f", and {len(away) - 1} more like it" if len(away) > 1 else ""
        raise UserError(
            f"{away[0]}: is in iCloud and not downloaded to this Mac{more}; choose Download Now in Finder, or run: "
            f"brctl download {shlex.quote(str(away[0].parent))}"
        )


def text_of(path: Path, most: int = MOST_CAPTION) -> str:
    """What a text file says, in UTF-8 or, with its mark at the beginning, in UTF-16. Raises UserError for another."""
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise UserError(f"{path}: is larger than {most >> 10} KB, which is no caption; make it shorter or remove it")
    wide = content.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        text = content.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise UserError(f"{path}: not UTF-8 text; save it again as UTF-8")
    if text.startswith(RICH_TEXT):
        raise UserError(f"{path}: is rich text; save it again as plain text")
    return text


# beside the images


def captioned(images: Sequence[Path], options: Options, called: str | None = None) -> tuple[list[Example], set[Path]]:
    """The images of a directory with the captions beside them, and the files of these. called: what an image shows that
    has no caption where no prompt was given. Raises UserError.
    """
    found = _beside(images)
    prompt = options.prompt if options.prompt is not None else called
    examples = [Example(image, _caption(image, found[image], prompt, options)) for image in images]
    return examples, set(found.values())


def _beside(images: Sequence[Path]) -> dict[Path, Path]:
    """Where the caption of each image is, or would be: in a text of its name, with or without its suffix, else of a
    name alike that is no other image's.
    """
    places = {
        image: [*map(image.with_suffix, TEXTS), *(image.with_name(image.name + end) for end in TEXTS)]
        for image in images
    }
    folders = {image.parent for image in images}
    visible = (path for folder in folders for path in listing.visible(folder))
    texts = {path for path in visible if path.suffix.lower() in TEXTS and path.is_file()}
    own = {place for some in places.values() for place in some}
    others = listing.by_spelling(sorted(texts - own))
    found = {}
    for image, some in places.items():
        alike = (listing.spelled(place, others) for place in some)
        found[image] = next((path for path in (*some, *alike) if path in texts), some[0])
    return found


def _caption(path: Path, beside: Path, prompt: str | None, options: Options) -> str:
    caption = " ".join(text_of(beside).split()) if beside.is_file() else ""
    if caption:
        return caption
    if prompt is None:
        raise UserError(
            f"{path}: has no caption; write one into {beside.name} beside it, or give {options.prompt_option}"
        )
    return prompt


def kohya_folders(directory: Path) -> dict[Path, tuple[int, str]]:
    """Folders as sd-scripts has them: of each how often its images are to be used, and how they are called."""
    folders = (path for path in listing.visible(directory) if path.is_dir())
    found = ((path, KOHYA.fullmatch(path.name)) for path in folders)
    return {path: (int(match[1]), match[2].replace("_", " ")) for path, match in found if match}


# lists


def listed(path: Path, image_key: str, text_key: str, options: Options) -> list[Example]:
    """The images and captions of a list, sorted. Raises UserError, with the number of the line that is wrong."""
    directory, examples = path.parent, []
    spellings = functools.cache(lambda folder: listing.by_spelling(listing.visible(folder)))
    for number, fields in (_csv_rows if path.suffix == ".csv" else _json_rows)(path):
        name, text = fields.get(image_key), fields.get(text_key, fields.get(CAPTION))
        if not isinstance(name, str) or not isinstance(text, str) or "\0" in name + text:
            raise UserError(f"{path}:{number}: {_shape(path, image_key, text_key)}")
        inside = _inside(name, directory)
        if inside is None:
            raise UserError(f"{path}:{number}: {name} is outside of {directory}; move it there")
        image = listing.spelled(directory / inside, spellings((directory / inside).parent))
        check_here(image)
        if not image.is_file():
            raise UserError(f"{path}:{number}: {name} does not exist; correct or remove the line")
        if not text.strip() and options.prompt is None:
            raise UserError(f'{path}:{number}: "{text_key}" is empty; write a caption, or give {options.prompt_option}')
        examples.append(Example(image, text if text.strip() else options.prompt or ""))
    if not examples:
        raise UserError(f"{path}: lists no images; add lines or remove the file")
    return sorted(examples, key=lambda example: (example.path, example.caption))


def _shape(path: Path, image_key: str, text_key: str) -> str:
    if path.suffix == ".csv":
        return f"should have the columns {image_key} and {text_key}, which the first line names"
    return f'should be {{"{image_key}": ..., "{text_key}": ...}}'


def _json_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(text_of(path, MOST_LIST).split("\n"), 1):  # JSON strings may hold U+2028
        if not line.strip():
            continue
        try:
            fields = parsed.parse(line.encode("utf-8", "surrogatepass"))
        except (ValueError, RecursionError):
            fields = None
        yield number, fields if isinstance(fields, dict) else {}


def _csv_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    lines = text_of(path, MOST_LIST).splitlines()
    delimiter = ";" if lines and ";" in lines[0] and "," not in lines[0] else ","
    rows = csv.DictReader(lines, delimiter=delimiter, skipinitialspace=True)
    try:
        for row in rows:
            yield rows.line_num, row
    except csv.Error as error:
        raise UserError(f"{path}:{rows.line_num}: not readable as CSV ({error})") from None


def _inside(name: str, directory: Path) -> str | None:
    """A listed name from the directory on; None where it is outside. By name, not resolved: the Hub's cache keeps a
    data set's files as links to elsewhere.
    """
    inside = os.path.normpath(name)
    if os.path.isabs(inside):
        places = (directory.absolute(), directory.resolve())
        held = (os.path.relpath(inside, place) for place in places)
        return next((path for path in held if path.split(os.sep)[0] != os.pardir), None)
    return None if inside.split(os.sep)[0] == os.pardir else inside
