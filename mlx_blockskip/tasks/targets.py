"""Where a command writes: what is there already stays, and what cannot be written is refused before work begins."""

import itertools
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from mlx_blockskip.engine import files, oserrors
from mlx_blockskip.engine.errors import UserError

Written = Callable[[Path], Sequence[Path]]
"""`file -> all files that a command writes when it is given this one`."""


def chosen(given: str | None, usual: str, option: str, overwrite: bool, written: Written = lambda path: [path]) -> Path:
    """The file to write: the one that is given, or the first of `usual`, `usual-2`, ... of which nothing is there.

    Raises UserError where the given one, or what goes with it, is there and `overwrite` is not given, and where it
    cannot be written.
    """
    path = Path(given or usual).expanduser()
    if given is None and not overwrite:
        path = free(path, written)
    for target in written(path):
        check(target, option, overwrite)
    return path


def free(path: Path, written: Written = lambda path: [path]) -> Path:
    """The path itself, or the first of `name-2.end`, `name-3.end`, ... for which nothing is there."""
    for number in itertools.count(1):
        counted = path if number == 1 else path.with_name(f"{path.stem}-{number}{path.suffix}")
        if not any(map(os.path.lexists, written(counted))):
            return counted
    raise AssertionError


def check(path: Path, option: str, overwrite: bool = False) -> None:
    """Raise UserError where a file or directory is there and not to be replaced, or cannot be written."""
    if path.is_dir() and overwrite:
        raise UserError(f"{option} {path}: is a directory, which --overwrite does not replace; choose another name")
    if os.path.lexists(path) and not overwrite:
        raise UserError(f"{option} {path}: already exists; choose another name, or give --overwrite to replace it")
    check_writable(path, option)


def check_writable(path: Path, option: str) -> None:
    """Raise UserError where a file or directory of this name cannot be made. Nothing is left behind."""
    existing = next(p for p in (path.parent, *path.parent.parents) if p.exists())
    try:
        for name in path.relative_to(existing).parts:
            with suppress(FileNotFoundError):
                (existing / name).lstat()  # says where a name is too long
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        error.filename = str(path)
        raise UserError(f"{option} {oserrors.sentence(error)}") from None


def check_room(path: Path, need: int) -> None:
    """Raise UserError where the disk has not so many bytes free."""
    free_bytes = files.free_space(path)
    if need > free_bytes:
        raise UserError(
            f"{path}: {need / 2**30:.2f} GiB are needed and {free_bytes / 2**30:.2f} GiB are free; choose another disk"
        )
