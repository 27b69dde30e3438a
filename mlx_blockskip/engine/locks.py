"""One process at a time in a directory."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlx_blockskip.engine.errors import UserError

WITHOUT_LOCKS = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS)
"""What shares and some disks say that have none."""


@contextmanager
def lock(path: Path) -> Iterator[bool]:
    """Hold an exclusive lock on a file; yields whether it is held, which it is not where the disk has no locks.

    Raises UserError where another process holds it, with its process id.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        held = _take(path, file.fileno())
        if held:
            file.seek(0)
            file.truncate()
            file.write(str(os.getpid()))
            file.flush()
        yield held


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
