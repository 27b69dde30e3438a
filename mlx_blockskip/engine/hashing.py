"""The checksum of a file while it is written: by a thread beside, as what is hashed next is made."""

import hashlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

PIECE = 1 << 20


class WrittenHash:
    """SHA-256 of a file whose pieces are written in any order, each of them once.

    A piece that follows what was hashed so far is hashed from memory; one that came before its turn is read again. At
    most one piece is kept for it beside the one that the caller holds.
    """

    def __init__(self, path: Path, file: BinaryIO):
        """file: what writes to `path`."""
        self._path, self._file = path, file
        self._hash, self._next = hashlib.sha256(), 0
        self._early: dict[int, int] = {}  # where a piece begins and ends
        self._pool = ThreadPoolExecutor(1, "hash")
        self._pending: Future[None] | None = None

    def wrote(self, start: int, data: bytes | memoryview) -> None:
        """Say that this now lies in the file from byte `start` on."""
        if start != self._next:
            self._early[start] = start + len(data)
            return
        self._submit(self._hash.update, data)
        self._next += len(data)
        while (end := self._early.pop(self._next, None)) is not None:
            self._read_to(end)

    def hexdigest(self, size: int) -> str:
        """Of the whole file, which has so many bytes; what was not said to be written is read."""
        self._read_to(size)
        self._wait()
        return self._hash.hexdigest()

    def close(self) -> None:
        """Let go of the thread."""
        self._pool.shutdown()

    def _read_to(self, end: int) -> None:
        self._file.flush()
        self._submit(self._read, self._next, end)
        self._next = end

    def _read(self, start: int, end: int) -> None:
        with self._path.open("rb") as file:
            file.seek(start)
            while start < end:
                piece = file.read(min(PIECE, end - start))
                self._hash.update(piece)
                start += len(piece) or end

    def _submit(self, work: Callable[..., None], *arguments: object) -> None:
        self._wait()
        self._pending = self._pool.submit(work, *arguments)

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.result()
            self._pending = None
