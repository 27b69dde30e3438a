"""The beginning of a safetensors file: which tensors it holds, and where."""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mlx_blockskip.engine import dtypes, elsewhere, foreign, oserrors, parsed
from mlx_blockskip.engine.errors import UserError

Metadata = Mapping[str, str] | None
MAX_HEADER = parsed.MAX_BYTES


@dataclass(frozen=True)
class TensorEntry:
    """A tensor of a safetensors file. dtype: safetensors' name; start: its offset in the file."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    start: int = 0

    @property
    def nbytes(self) -> int:
        return dtypes.nbytes(self.dtype, math.prod(self.shape))


@dataclass(frozen=True)
class Header:
    """What a safetensors file says it holds."""

    entries: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]


def read_header(path: Path, ours: bool = False) -> Header:
    """Read and check a safetensors header. Raises UserError for a missing, truncated or malformed file, and for one of
    more tensors than there is use for; not in a file of `ours`, whose records may be as many as the disk holds.
    """
    foreign.check_name(path)
    try:
        size = elsewhere.size_of(path)
        with path.open("rb") as file:
            return _parse_header(path, file, size, sys.maxsize if ours else parsed.MAX_PARTS)
    except FileNotFoundError:
        raise UserError(f"{path}: {foreign.absence(path) or 'no such file'}") from None
    except OSError as error:
        raise UserError(oserrors.sentence(error)) from None


def _parse_header(path: Path, file: BinaryIO, size: int, most_parts: int) -> Header:
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > MAX_HEADER or 8 + length > size:
        reason = foreign.kind(path) or "not a whole safetensors file (its header is cut off); get it again"
        raise UserError(f"{path}: {reason}")
    try:
        fields = parsed.parse(file.read(length), most_parts)
        metadata = fields.pop("__metadata__", None) or {}  # MLX writes null where it has none
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata is not text")
        entries = {name: _entry(path, name, field, 8 + length, size) for name, field in fields.items()}
        _check_apart(entries)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"{path}: not a safetensors file ({_said(error)}); get it again") from None
    return Header(entries, metadata)


def _entry(path: Path, name: str, field: Any, data: int, size: int) -> TensorEntry:
    """What a header says of a tensor. data: where the header ends; size: of the file."""
    begin, end = field["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*field["shape"], begin, end)):
        raise ValueError(f"{name} has a shape or a place that is no number")
    entry = TensorEntry(name, tuple(field["shape"]), field["dtype"], data + begin)
    if entry.dtype not in dtypes.BITS:
        raise UserError(f"{path}: {name} has dtype {entry.dtype}, which is not supported")
    if end - begin != entry.nbytes:
        raise ValueError(f"{name} has {end - begin} bytes instead of {entry.nbytes}")
    if data + end > size:
        raise UserError(f"{path}: is cut off ({name} ends beyond the file); get it again")
    return entry


def _check_apart(entries: Mapping[str, TensorEntry]) -> None:
    """Raise ValueError where two tensors share bytes: a small file would stand for any amount of memory."""
    reached = 0
    for entry in sorted((e for e in entries.values() if e.nbytes), key=lambda e: e.start):
        if entry.start < reached:
            raise ValueError(f"{entry.name} lies where another tensor is")
        reached = entry.start + entry.nbytes


def _said(error: Exception) -> str:
    return str(error)[:200]


def encode_header(entries: Sequence[TensorEntry], metadata: Metadata = None) -> tuple[bytes, int]:
    """The beginning of a safetensors file with these tensors, one after the other, and the size of the whole file."""
    fields: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for entry in entries:
        end = offset + entry.nbytes
        fields[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, 8 + len(text) + offset
