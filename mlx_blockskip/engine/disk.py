"""How fast a disk is read, past what the system keeps of its files in memory."""

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SAMPLE_BYTES = 256 << 20
PIECE = 8 << 20
THREADS = 4
"""As many as MLX reads weights with."""


def read_speed(directory: Path, nbytes: int = SAMPLE_BYTES) -> float:
    """Bytes a second that are read from the disk of `directory`, as a walk reads weights: some tensors side by side.

    Writes a sample of so many bytes there, and removes it.
    """
    path = directory / f".read-speed-{os.getpid()}"
    try:
        _write(path, nbytes)
        with path.open("rb", buffering=0) as file, ThreadPoolExecutor(THREADS) as pool:
            past_memory(file.fileno())
            started = time.perf_counter()
            read = sum(pool.map(lambda start: len(os.pread(file.fileno(), PIECE, start)), range(0, nbytes, PIECE)))
            return read / (time.perf_counter() - started)
    finally:
        path.unlink(missing_ok=True)


def _write(path: Path, nbytes: int) -> None:
    """Random bytes, on the disk when this returns."""
    with path.open("wb") as file:
        past_memory(file.fileno())
        for start in range(0, nbytes, PIECE):
            file.write(os.urandom(min(PIECE, nbytes - start)))
        file.flush()
        os.fsync(file.fileno())


def past_memory(descriptor: int) -> None:
    """What is written or read here from now on does not stay in memory (macOS, where this has to be said on the writing
    side too); what of the file is there and on the disk as well is dropped (Linux).
    """
    if sys.platform == "darwin":
        import fcntl

        fcntl.fcntl(descriptor, fcntl.F_NOCACHE, 1)
    else:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
