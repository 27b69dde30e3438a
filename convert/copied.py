"""Folders of a checkpoint that are copied as they are: tokenizers and the scheduler."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

from mlx_blockskip.engine import files, foreign, listing
from mlx_blockskip.engine.errors import UserError

TOKENIZERS = ({"tokenizer.json"}, {"vocab.json", "merges.txt"}, {"spiece.model"}, {"tokenizer.model"})
"""The forms that a tokenizer comes in: the files of one of them have to be there."""


MAX_PARTS = 10_000_000
"""Of a JSON file that is copied: a vocabulary has millions."""


def check(folder: Path) -> None:
    """Raise UserError where a folder is missing, holds something in the place of its files, or no whole tokenizer."""
    if not folder.is_dir():
        raise UserError(f"{folder}: this part of the checkpoint is missing; download it again")
    for path in folder.rglob("*"):
        if path.is_dir() and path.is_symlink():
            raise UserError(f"{path}: is a link to another folder, which is not copied; do not use this checkpoint")
    for path in listing.awaited(folder) + [path for path in listing.visible(folder) if path.is_file()]:
        if reason := foreign.absence(path) or foreign.kind(path):
            raise UserError(f"{path}: {reason}")
    held = {path.name for path in listing.visible(folder)}
    if folder.name.startswith("tokenizer") and not any(form <= held for form in TOKENIZERS):
        forms = " nor ".join(" with ".join(sorted(form, reverse=True)) for form in TOKENIZERS)
        raise UserError(f"{folder}: has no tokenizer, neither {forms}; download it again")


def copy_folder(source: Path, target: Path) -> None:
    """A copy without hidden files, in which what is called JSON is JSON."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(".*"), copy_function=copy_file, dirs_exist_ok=True)


def copy_file(source: str | Path, target: str | Path) -> None:
    """A copy; of a JSON file that says Infinity or NaN, which JSON does not have, without these options.

    Published schedulers have `"lambda_min_clipped": -Infinity`. diffusers reads a file without it as one with it:
    that is what its class takes where nothing is said.
    """
    if Path(source).suffix == ".json":
        value = files.read_any_json(Path(source), MAX_PARTS)
        if finite(value) != value:
            Path(target).write_text(json.dumps(finite(value), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            return
    shutil.copyfile(source, target)


def finite(value: Any) -> Any:
    """JSON without the members of objects that are infinite or not numbers."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items() if not _infinite(item)}
    return [finite(item) for item in value] if isinstance(value, list) else value


def _infinite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
