"""What has to be on the disk itself: flushing to it, and how fast it is read past what the system keeps in memory."""

import errno
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from mlx_blockskip.engine.leftovers import temporary_file

SAMPLE_BYTES = 256 << 20
PIECE = 8 << 20
THREADS = 4
"""As many as MLX reads weights with."""


def read_speed(directory: Path, nbytes: int = SAMPLE_BYTES) -> float:
    """Bytes a second that are read from the disk of `directory`, as a walk reads weights: some tensors side by side.

    Writes a sample of so many bytes there, and removes it.
    """
    with temporary_file(directory / "read-speed") as path:
        _write(path, nbytes)
        with path.open("rb", buffering=0) as file, ThreadPoolExecutor(THREADS) as pool:
            past_memory(file.fileno())
            started = time.perf_counter()
            read = sum(pool.map(lambda start: len(os.pread(file.fileno(), PIECE, start)), range(0, nbytes, PIECE)))
            return read / (time.perf_counter() - started)


def _write(path: Path, nbytes: int) -> None:
    """Random bytes, on the disk when this returns."""
    with path.open("wb") as file:
        past_memory(file.fileno())
        for start in range(0, nbytes, PIECE):
            file.write(os.urandom(min(PIECE, nbytes - start)))
        file.flush()
        flush(file.fileno())


def past_memory(descriptor: int) -> None:
    """What is written or read here from now on does not stay in memory (macOS, where this has to be said on the writing
    side too); what of the file is there and on the disk as well is dropped (Linux).
    """
    if sys.platform == "darwin":
        import fcntl

        fcntl.fcntl(descriptor, fcntl.F_NOCACHE, 1)
    else:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def flush(descriptor: int) -> None:
    """Wait until what was written to a file, or the names in a directory, would outlive a power loss.

    On macOS fsync leaves it in the drive's own cache. A descriptor that is open for reading only will do.
    """
    if sys.platform == "darwin":
        import fcntl

        try:
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
        except OSError as error:
            if error.errno == errno.EIO:
                raise
    os.fsync(descriptor)  # shares and some disks have nothing more


def flush_file(path: Path) -> None:
    """The same for a file by its name."""
    with path.open("rb") as file:
        flush(file.fileno())


@contextmanager
def flushing() -> Iterator[Callable[[Path], object]]:
    """Yield what takes a file that is whole and sends it to the drive by a thread beside: a later `flush_tree` then
    finds little to do. The last is sent when the block ends.
    """
    with ThreadPoolExecutor(1, "flush") as pool:
        yield lambda path: pool.submit(_send, path)


def _send(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def flush_directory(path: Path) -> None:
    """The same for the names in a directory, where the file system has that."""
    with suppress(OSError), _descriptor(path) as descriptor:
        flush(descriptor)


def flush_tree(path: Path) -> None:
    """The same for a directory with all files in it: each goes to the drive, and the drive is flushed once."""
    for folder, _, names in os.walk(path):
        for name in names:
            _send(Path(folder) / name)
        with suppress(OSError), _descriptor(Path(folder)) as descriptor:
            os.fsync(descriptor)
    flush_directory(path)


@contextmanager
def _descriptor(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
