"""Files that are whole or absent: temporary names, then rename; safetensors read and written a tensor at a time."""

import hashlib
import itertools
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_blockskip.engine import disk, foreign, leftovers, oserrors, parsed
from mlx_blockskip.engine.dtypes import dtype_name, mlx_dtype, raw_bytes
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.engine.hashing import WrittenHash
from mlx_blockskip.engine.header import Header, Metadata, TensorEntry, encode_header, read_header
from mlx_blockskip.engine.names import Names


@contextmanager
def atomic_file(path: Path, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it takes `path`'s place when the block ends well, else it is removed.

    durable: it is on the disk before it has its name, and its name when this returns, so that a power loss leaves all
    of it or none. Scratch that no later run reads can do without. An OSError names `path`.
    """
    with oserrors.about(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with leftovers.temporary_file(path) as temporary:
            yield temporary
            temporary.chmod(0o644)
            if durable:
                disk.flush_file(temporary)
            temporary.replace(path)
            if durable:
                disk.flush_directory(path.parent)


@contextmanager
def atomic_directory(path: Path, replace: bool = False, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary directory beside `path`; it is renamed to `path` when the block ends well, else removed.

    durable: as in `atomic_file`, of all that is in it. Raises UserError where `path` exists, unless `replace`.
    """
    if path.exists() and not replace:
        raise UserError(f"{path}: already exists; choose another path or remove it")
    with oserrors.about(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with leftovers.temporary_directory(path) as temporary:
            yield temporary
            temporary.chmod(0o755)
            if durable:
                disk.flush_tree(temporary)
            with leftovers.set_aside(path) if path.exists() else nullcontext():
                temporary.replace(path)
                if durable:
                    disk.flush_directory(path.parent)


def free_space(path: Path) -> int:
    """Bytes free on the disk where `path` is or will be."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object. Raises UserError where it is missing, broken, or too large to be one."""
    value = read_any_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds {parsed.kind_of(value)}, and an object is needed; get it again")
    return value


def read_any_json(path: Path, most_parts: int = parsed.MAX_PARTS) -> Any:
    """Read a JSON file that holds anything. Raises UserError likewise."""
    foreign.check_name(path)
    try:
        with path.open("rb") as file:
            return parsed.parse(file.read(parsed.MAX_BYTES + 1), most_parts)
    except FileNotFoundError:
        raise UserError(f"{path}: {foreign.absence(path) or 'no such file'}") from None
    except OSError as error:
        raise UserError(oserrors.sentence(error)) from None
    except ValueError as error:
        raise UserError(f"{path}: {foreign.kind(path) or f'not readable as JSON ({error})'}") from None


def sha256(path: Path) -> str:
    """The checksum of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class SafetensorsWriter:
    """Write a safetensors file one tensor, or some rows of one, at a time and in any order; the sizes are known ahead,
    so the header is first.

    Used as a context manager: the file appears under its name when every tensor has been written. durable: as in
    `atomic_file`; what is taken as valid by its header has to be. hashed: `checksum` is then the file's SHA-256. Raises
    ValueError for a tensor that is not as announced, or missing at the end.
    """

    def __init__(
        self,
        path: Path,
        entries: Sequence[TensorEntry],
        metadata: Metadata = None,
        durable: bool = True,
        hashed: bool = False,
    ):
        self.path, self.durable, self.hashed, self.checksum = path, durable, hashed, ""
        self._header, self._size = encode_header(entries, metadata)
        starts = itertools.accumulate((entry.nbytes for entry in entries), initial=len(self._header))
        self._offsets = {entry.name: start for entry, start in zip(entries, starts, strict=False)}
        self._entries = {entry.name: entry for entry in entries}
        self._missing = {entry.name: entry.nbytes for entry in entries}  # bytes

    def __enter__(self) -> "SafetensorsWriter":
        with ExitStack() as opened:
            temporary = opened.enter_context(atomic_file(self.path, self.durable))
            self._file = opened.enter_context(temporary.open("r+b"))
            self._hash = WrittenHash(temporary, self._file) if self.hashed else None
            if self._hash is not None:
                opened.callback(self._hash.close)
            self._file.truncate(self._size)
            self._put(0, self._header)
            self._opened = opened.pop_all()
        return self

    def write(self, name: str, array: mx.array | np.ndarray, start: int = 0) -> None:
        """Put one tensor in its place, or the part of it that begins at row `start`."""
        entry = self._entries.get(name)
        shape = tuple(array.shape)
        whole = entry is not None and shape == entry.shape and start == 0
        part = entry is not None and shape[1:] == entry.shape[1:] and shape and start + shape[0] <= entry.shape[0]
        if entry is None or not (whole or part) or dtype_name(array.dtype) != entry.dtype:
            raise ValueError(f"{self.path}: {name} {array.shape} {array.dtype} is not what was announced: {entry}")
        self.write_bytes(name, raw_bytes(array), start)

    def write_bytes(self, name: str, data: memoryview, start: int = 0) -> None:
        """The same of bytes that are in the file's dtype already: whole rows from row `start` on."""
        entry = self._entries[name]
        row = entry.nbytes // entry.shape[0] if start else 0
        if start * row + len(data) > entry.nbytes:
            raise ValueError(f"{self.path}: {len(data)} bytes from row {start} on are too many for {entry}")
        self._put(self._offsets[name] + start * row, data)
        self._missing[name] = max(0, self._missing[name] - len(data))

    def _put(self, place: int, data: bytes | memoryview) -> None:
        self._file.seek(place)
        self._file.write(data)
        if self._hash is not None:
            self._hash.wrote(place, data)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        with self._opened:
            if error is not None:
                raise error
            if names := sorted(name for name, left in self._missing.items() if left):
                raise ValueError(f"{self.path}: not written: {', '.join(names)}")
            if self._hash is not None:
                self.checksum = self._hash.hexdigest(self._size)


def save_tensors(
    path: Path,
    tensors: Mapping[str, mx.array],
    metadata: Metadata = None,
    durable: bool = True,
    hashed: bool = False,
) -> str:
    """Write a whole dictionary of tensors as one safetensors file, atomically, one tensor in memory at a time. Returns
    its checksum where it is `hashed`.
    """
    entries = [TensorEntry(name, tuple(t.shape), dtype_name(t.dtype)) for name, t in tensors.items()]
    with SafetensorsWriter(path, entries, metadata, durable, hashed) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    return writer.checksum


def load_lazily(path: Path) -> dict[str, mx.array]:
    """The tensors of a safetensors file, each read when it is evaluated; until then the file stays open."""
    tensors = mx.load(str(path), format="safetensors")  # whatever its name is
    assert isinstance(tensors, dict)
    return tensors


def read_rows(path: Path, entry: TensorEntry, start: int, stop: int) -> mx.array:
    """Rows start to stop - 1 of a tensor of a file (a scalar is one row); no file stays open."""
    rows, *rest = entry.shape or (1,)
    size = entry.nbytes // max(1, rows)
    raw = np.fromfile(path, np.uint8, count=(stop - start) * size, offset=entry.start + start * size)
    return mx.array(raw).view(mlx_dtype(entry.dtype)).reshape((stop - start, *rest) if entry.shape else ())


class MappedTensors:
    """A safetensors file read through a memory map: what is asked for is copied, one tensor at a time."""

    def __init__(self, path: Path):
        self.path = path
        self.header: Header = read_header(path, ours=True)
        self._names = Names(self.header.entries)
        self._bytes = np.memmap(path, mode="r", dtype=np.uint8)

    def __contains__(self, name: str) -> bool:
        return name in self.header.entries

    def entry(self, name: str) -> TensorEntry:
        """What the file says of one tensor. Raises UserError where it has none of this name."""
        entry = self.header.entries.get(name)
        if entry is None:
            raise UserError(f"{self.path}: has no tensor {name}; remove the file, and it is made again")
        return entry

    def read(self, name: str) -> mx.array:
        """A copy of one tensor. Raises UserError where the file has none of this name."""
        entry = self.entry(name)
        data = mx.array(self._bytes[entry.start : entry.start + entry.nbytes])
        return data.view(mlx_dtype(entry.dtype)).reshape(entry.shape)

    def under(self, prefix: str) -> list[str]:
        """The names that start with `prefix`, in the file's order."""
        return self._names.under(prefix)
