"""`cache`: what models this tool has converted for itself, and their removal."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_blockskip.engine import files
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.engine.leftovers import TEMPORARY, remove_tree
from mlx_blockskip.events import Note, Table, emit
from mlx_blockskip.settings import CacheSettings
from mlx_blockskip.tasks.alone import alone
from mlx_blockskip.tasks.checkpoint.resolve import cache_directory

DAY = 86400.0


@dataclass(frozen=True)
class Kept:
    """A directory in the cache. source: what it was converted from; None where its conversion was killed. size: bytes.
    age: seconds since it was last used.
    """

    path: Path
    source: str | None
    size: int
    age: float

    @property
    def name(self) -> str:
        return self.path.name


def cache(settings: CacheSettings) -> list[Kept]:
    """List the conversions in the cache directory, or remove some; returns those that it is about. Raises UserError for
    a name that is none of them.
    """
    found = wanted(kept(cache_directory()), settings)
    if settings.action == "clear":
        for one in found:
            remove(one)
        emit(Note(f"removed {len(found)} of {cache_directory()}, {_size(sum(one.size for one in found))}"))
    elif not found:
        emit(Note(f"{cache_directory()}: holds no conversions"))
    else:
        title = f"{cache_directory()}: {_size(sum(one.size for one in found))}"
        rows = [
            (one.name, _size(one.size), _age(one.age), one.source or "a conversion that was killed") for one in found
        ]
        emit(Table(title, ("name", "size", "last used", "converted from"), tuple(rows)))
    return found


def kept(directory: Path) -> list[Kept]:
    """What in the directory is this tool's, by name: its conversions, and what killed ones left."""
    found = []
    for path in sorted(directory.iterdir()) if directory.is_dir() else []:
        if path.is_dir() and not path.is_symlink() and (ours := _ours(path)):
            size = sum(file.lstat().st_size for file in path.rglob("*") if not file.is_dir())
            found.append(Kept(path, ours[0], size, max(0.0, time.time() - path.stat().st_mtime)))
    return found


def _ours(path: Path) -> tuple[str | None] | None:
    """What a conversion was made from, as a tuple; None for a directory that is no conversion."""
    if path.name.startswith("."):
        return (None,) if path.name.endswith(TEMPORARY) and _lock(path).is_file() else None
    try:
        config = files.read_json(path / "config.json")
    except UserError:
        return None
    return (str(config["source"]),) if isinstance(config, dict) and {"format", "source"} <= config.keys() else None


def _lock(path: Path) -> Path:
    """The lock of a conversion, or of the one that left the hidden `.NAME.xyz.blockskip-tmp`."""
    name = path.name[1:].rsplit(".", 2)[0] if path.name.startswith(".") else path.name
    return path.with_name(f"{name}.lock")


def wanted(found: Sequence[Kept], settings: CacheSettings) -> list[Kept]:
    """Those of the given names, not used for so many days. Raises UserError."""
    names = {one.name for one in found}
    for name in settings.names:
        if name not in names:
            raise UserError(
                f"{name}: is no conversion in {cache_directory()}; `mlx-blockskip cache list` has their names"
            )
    least = (settings.older_than or 0) * DAY
    return [one for one in found if one.age >= least and (not settings.names or one.name in settings.names)]


def remove(one: Kept) -> None:
    """Remove a conversion, unless a process is at it. Raises UserError then."""
    lock = _lock(one.path)
    with alone(lock):
        doomed = one.path.with_name(f".{lock.stem}.{os.getpid():08d}{TEMPORARY}")
        one.path.replace(doomed)  # no reader takes a half of it for a whole
        remove_tree(doomed)


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _age(seconds: float) -> str:
    days = int(seconds / DAY)
    return "today" if days < 1 else "1 day ago" if days == 1 else f"{days} days ago"
