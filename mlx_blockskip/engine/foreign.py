"""What a file is that should be a whole safetensors file and is not, as a sentence with the way out."""

import os
from pathlib import Path

from mlx_blockskip.engine import listing
from mlx_blockskip.engine.errors import UserError

PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
INCOMPLETE = (".incomplete", ".part", ".crdownload", ".download", ".aria2")
"""What clients of the Hub, browsers and aria2 call a file while they are getting it."""

BEGINNINGS = (
    (b"version https://git-lfs", "is git-lfs's pointer to the file, not the file; run `git lfs pull` in its repo"),
    (b"GGUF", "is a GGUF file, whose weights are quantized for llama.cpp; get the checkpoint in safetensors format"),
    (b"<!DOCTYPE", "is a web page, not the file; download it with `hf download`, or log in first"),
    (b"<html", "is a web page, not the file; download it with `hf download`, or log in first"),
    (b"\x00\x05\x16\x07", "is what macOS keeps beside a file, not the file itself; give the one without `._`"),
)
PICKLE = "is a pickled file, which can run code when it is opened; get the checkpoint in safetensors format"


def check_name(path: Path) -> None:
    """Raise UserError for a name that no file can have, as a damaged list of files may give one."""
    try:
        possible = b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        possible = False
    if not possible:
        raise UserError(f"{path}: no file can have this name; get the list that has it again")


def kind(path: Path) -> str | None:
    """What another file this is, by its name and its first bytes; None where neither tells."""
    if path.suffix in INCOMPLETE:
        return "is not downloaded to its end; get it again"
    with path.open("rb") as file:
        first = file.read(32)
    for beginning, sentence in BEGINNINGS:
        if first.startswith(beginning):
            return sentence
    pickled = first.startswith(b"\x80") and first[1:2] in (b"\2", b"\3", b"\4", b"\5")
    return PICKLE if pickled or first.startswith(b"PK\3\4") or path.suffix in PICKLED else None


def absence(path: Path) -> str | None:
    """Why a file is not there, where what lies beside it tells."""
    if listing.in_icloud(path):
        return "is in iCloud and not on this disk; open it in Finder, or run `brctl download` with its path"
    if any(path.with_name(path.name + end).exists() for end in INCOMPLETE):
        return "is not downloaded to its end; get it again"
    return None
