"""One process at a time in a directory."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from mlx_blockskip.engine import listing
from mlx_blockskip.engine.errors import UserError

WITHOUT_LOCKS = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS)
"""What shares and some disks say that have none."""


@contextmanager
def lock(path: Path, kept: bool = False) -> Iterator[bool]:
    """Hold an exclusive lock on a file; yields whether it is held, which it is not where the disk has no locks.

    kept: the file stays when it is let go; else it goes, and its directory where that was made for it and is empty.
    Raises UserError where another process holds it, with its process id.
    """
    made = not path.parent.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _opened(path) as (file, held):
            if held:
                file.seek(0)
                file.truncate()
                file.write(str(os.getpid()))
                file.flush()
            try:
                yield held
            finally:
                if not kept:
                    path.unlink(missing_ok=True)
                    listing.companion(path).unlink(missing_ok=True)
    finally:
        if made:
            with suppress(OSError):  # it holds something
                path.parent.rmdir()


@contextmanager
def _opened(path: Path) -> Iterator[tuple[TextIO, bool]]:
    """The file, and whether it is locked now; not one that its holder has removed since it was opened."""
    while True:
        with path.open("a+") as file:
            held = _take(path, file.fileno())
            if not held or _is_there(path, file.fileno()):
                yield file, held
                return


def _take(path: Path, descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = path.read_text().strip() or "unknown"
        raise UserError(f"{path.parent}: in use by process {holder}; wait for it or stop it") from None
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise UserError(f"{path}: cannot be locked ({error.strerror}); choose another disk") from None
        return False
    return True


def _is_there(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
