"""What the system refuses, as a sentence with the path and the way out."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlx_blockskip.engine.leftovers import TEMPORARY

SENTENCES = {
    errno.ENOSPC: "the disk is full; make room on it, or choose another",
    errno.EDQUOT: "no more may be stored there (a quota); make room, or choose another disk",
    errno.EFBIG: "the disk takes no file of this size; choose another",
    errno.EACCES: "permission denied; choose another place, or change its permissions",
    errno.EPERM: "the system does not permit that; choose another place, or change its permissions",
    errno.EROFS: "the disk is read-only; choose another place",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
    errno.ENOENT: "is not there, or not any more; see where it went, and give the command again",
    errno.EISDIR: "is a directory, and a file is needed; choose another name",
    errno.ENOTDIR: "is in a path in which a file stands where a directory is needed; choose another place",
    errno.EEXIST: "is there already; choose another name, or remove it",
    errno.ENOTEMPTY: "holds something that was not expected there; look at it, and give the command again",
    errno.ELOOP: "is a link that leads back to itself; remove it",
    errno.EIO: "the disk could not read or write it; check the disk",
    errno.EMFILE: "too many files are open; raise the limit with `ulimit -n 4096`",
    errno.ENFILE: "too many files are open on this machine; close other programs",
    errno.ENOMEM: "the system has no memory left; close other programs",
    errno.ESTALE: "the share it is on has lost it; connect it again, and give the command again",
}
"""By the number of an error, what is said after the path."""


def sentence(error: OSError) -> str:
    """One sentence: the path where it is known, what is wrong, and what to do about it."""
    reason = SENTENCES.get(error.errno or 0)
    if reason is None:
        reason = f"{error.strerror or error}; choose another place, or give the command again"
    return f"{_named(error.filename)}: {reason}" if error.filename is not None else reason


def is_unread(error: RuntimeError) -> bool:
    """Whether MLX could not read a file, or Python found no home directory for a `~`."""
    return str(error).startswith(("[load", "[Load", "[read]")) or "home directory" in str(error)


def _named(given: object) -> str:
    """A path as the user knows it: that of a temporary is its target's."""
    path = Path(given.decode(errors="replace") if isinstance(given, bytes) else str(given))
    return str(Path(*(part[1:].rsplit(".", 2)[0] if part.endswith(TEMPORARY) else part for part in path.parts)))


@contextmanager
def about(path: Path) -> Iterator[None]:
    """Inside, an OSError that names no file is about this one."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise
