"""Temporaries, and those that a killed process left. Who writes one holds a lock on it, so what nobody holds is removed
by the next run that writes beside it.
"""

import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

TEMPORARY, REPLACED = ".blockskip-tmp", ".blockskip-old"
"""How the hidden names end that only this tool gives: of what is being written, and of a directory whose place is being
taken.
"""

RANDOM = 8
"""Letters that tempfile puts before the ending."""

NAME_BYTES = 200
"""Of the target's name that a temporary's has at most: file systems take 255 bytes."""

Tell = Callable[[Path, str], None]
"""What hears of a temporary, and what became of it."""


class _Sweeping:
    def __init__(self, tell: Tell):
        self.tell, self.seen = tell, set[Path]()


_sweeping: ContextVar[_Sweeping | None] = ContextVar("sweeping", default=None)


@contextmanager
def sweeping(tell: Tell) -> Iterator[None]:
    """Inside, every directory is swept before the first temporary of this run is made in it."""
    token = _sweeping.set(_Sweeping(tell))
    try:
        yield
    finally:
        _sweeping.reset(token)


@contextmanager
def temporary_file(target: Path) -> Iterator[Path]:
    """A new empty file beside `target`, for the time of the block, unless it was renamed by then."""
    _sweep_once(target.parent)
    while True:
        descriptor, name = tempfile.mkstemp(prefix=_prefix(target), suffix=TEMPORARY, dir=target.parent)
        if _held(descriptor, Path(name)):
            break
        os.close(descriptor)
    try:
        yield Path(name)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(name)
        os.close(descriptor)


@contextmanager
def temporary_directory(target: Path) -> Iterator[Path]:
    """A new directory beside `target`, likewise."""
    _sweep_once(target.parent)
    while True:
        path = Path(tempfile.mkdtemp(prefix=_prefix(target), suffix=TEMPORARY, dir=target.parent))
        descriptor = os.open(path, os.O_RDONLY)
        if _held(descriptor, path):
            break
        os.close(descriptor)
    try:
        yield path
    finally:
        if path.exists():
            remove_tree(path)
        os.close(descriptor)


@contextmanager
def scratch_directory() -> Iterator[Path]:
    """A directory for the time of the block, where the system keeps temporaries."""
    with temporary_directory(Path(tempfile.gettempdir(), "mlx-blockskip")) as path:
        yield path


@contextmanager
def set_aside(path: Path) -> Iterator[None]:
    """Inside, a directory has another name; then it is removed. Where the process is killed before something else has
    its name, the next run gives it back.
    """
    descriptor = os.open(path, os.O_RDONLY)
    aside = path.with_name(f".{path.name}.{os.urandom(RANDOM // 2).hex()}{REPLACED}")
    try:
        _lock(descriptor)
        path.replace(aside)
        yield
        if path.exists():
            remove_tree(aside)
    finally:
        if aside.exists() and not path.exists():
            aside.replace(path)
        os.close(descriptor)


def sweep(directory: Path, tell: Tell) -> None:
    """Remove from a directory the temporaries of processes that are no more."""
    with suppress(OSError), os.scandir(directory) as found:
        names = [entry.name for entry in found if entry.name.startswith(".")]
        for name in names:
            if name.endswith((TEMPORARY, REPLACED)):
                _take(directory / name, tell)


def remove_tree(path: Path) -> None:
    """Remove a directory and what is in it, also where some of that goes by itself: on disks without extended
    attributes (exFAT, shares) macOS removes a file's companion `._name` with the file. There shutil.rmtree fails before
    Python 3.13.
    """
    for folder, folders, names in os.walk(path, topdown=False):
        for name in names:
            Path(folder, name).unlink(missing_ok=True)
        for name in folders:
            below = Path(folder, name)
            below.unlink() if below.is_symlink() else below.rmdir()
    path.rmdir()


def _sweep_once(directory: Path) -> None:
    under_way = _sweeping.get()
    if under_way is not None and directory not in under_way.seen:
        under_way.seen.add(directory)
        sweep(directory, under_way.tell)


def _take(path: Path, tell: Tell) -> None:
    """Remove a temporary, or give a directory its name back, unless its owner lives or no one can tell."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return
    try:
        if not _lock(descriptor):
            return
        target = path.with_name(path.name[1 : -len(REPLACED) - RANDOM - 1])
        if path.name.endswith(REPLACED) and not target.exists():
            path.rename(target)
            return tell(target, "has its name again, which a run that was killed had taken away")
        size = _size(path)
        if path.is_dir():
            remove_tree(path)
        else:
            path.unlink()
        tell(path, f"removed, {_said(size)} of a run that was killed")
    except OSError:  # what cannot be removed does not keep a run from its work
        return
    finally:
        os.close(descriptor)


def _held(descriptor: int, path: Path) -> bool:
    """Whether the new temporary is locked and still there: another process may have swept in between."""
    _lock(descriptor)
    try:
        return os.fstat(descriptor).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held by another, or the disk has no locks
        return False
    return True


def _prefix(target: Path) -> str:
    name = target.name.encode()[:NAME_BYTES].decode(errors="ignore")
    return f".{name}."


def _size(path: Path) -> int:
    return sum(p.lstat().st_size for p in (path, *path.rglob("*")) if not p.is_dir())


def _said(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
