"""Faults at the places where a command changes or reads files: it is killed there, or the system refuses, or a file is
not what it was. A place is a call that Python makes of the system, by its number in the run.
"""

import builtins
import errno
import fcntl
import io
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {
    *("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.utime"),
    *("create", "write"),
}
GROWS = {"create", "write", "os.mkdir", "os.symlink", "os.link"}
"""What takes room on a disk."""

KILL, COUNT = "kill", "count"
REFUSED = {"full": errno.ENOSPC, "read-only": errno.EROFS, "denied": errno.EACCES, "broken": errno.EIO}
SPOILED = ("gone", "short", "flipped")


class Faults:
    """What happens at place `at` of a run below the directory `root`, from there on where the system refuses.

    kind: count; kill; one of REFUSED, for changes; `unread`, which refuses a reading; one of SPOILED, before a reading.
    """

    def __init__(self, root: str, kind: str, at: int, log: str):
        self.root, self.kind, self.at, self.log = os.path.realpath(root) + os.sep, kind, at, log
        self.seen: list[str] = []
        self.off = False
        self.of_reads = kind in (*SPOILED, "unread")

    def install(self) -> None:
        """From now on; there is no way back in this process."""
        sys.addaudithook(self._audit)
        real = io.open

        def opened(file: Any, mode: str = "r", *more: Any, **named: Any) -> Any:
            handle = real(file, mode, *more, **named)
            inside = not isinstance(file, int) and self._inside(file)
            return _Writes(handle, file, self) if inside and set(mode) & set("wax+") else handle

        io.open = builtins.open = opened

    def count(self) -> None:
        """Write down which places there were."""
        self.off = True
        Path(self.log).write_text(json.dumps(self.seen))

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if self.off or not args or isinstance(args[0], int) or not isinstance(args[0], (str, bytes, os.PathLike)):
            return
        if event == "open":
            writes = bool((args[2] or 0) & WRITING)
            self.met("create" if writes else "read", args[0])
        elif event in CHANGES:
            self.met(event, args[0])

    def met(self, what: str, path: Any) -> None:
        """A call that is about to be made."""
        if self.off or not self._inside(path) or (what == "read") != self.of_reads:
            return
        name = os.fsdecode(path)
        if what == "read" and not os.path.isfile(name):
            return
        self.seen.append(f"{what} {name}")
        number = len(self.seen)
        if self.kind == KILL and number == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.kind in REFUSED and number >= self.at and (self.kind != "full" or what in GROWS):
            raise OSError(REFUSED[self.kind], os.strerror(REFUSED[self.kind]), None if what == "write" else name)
        elif self.kind == "unread" and number == self.at:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), name)
        elif self.kind in SPOILED and number == self.at:
            self.off = True
            spoil(Path(name), self.kind)
            self.off = False

    def _inside(self, path: Any) -> bool:
        return os.path.abspath(os.fsdecode(path)).startswith(self.root)


class _Writes:
    """An open file whose every write is a place."""

    def __init__(self, handle: Any, path: Any, faults: Faults):
        self._handle, self._path, self._faults = handle, path, faults

    def write(self, data: Any) -> Any:
        self._faults.met("write", self._path)
        return self._handle.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)

    def __enter__(self) -> "_Writes":
        self._handle.__enter__()
        return self

    def __exit__(self, *error: Any) -> Any:
        return self._handle.__exit__(*error)

    def __iter__(self) -> Any:
        return iter(self._handle)


def spoil(path: Path, how: str, place: float = 0.6) -> None:
    """Damage a file: it goes, loses its end, or one bit of it is another."""
    if how == "gone":
        path.unlink()
        return
    data = bytearray(path.read_bytes())
    number = int(len(data) * place)
    if how == "short":
        del data[number:]
    elif data:
        data[number] ^= 16
    path.write_bytes(data)


def without_locks() -> None:
    """From now on no file can be locked."""

    def flock(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    fcntl.flock = flock
