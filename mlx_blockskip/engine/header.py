"""The beginning of a safetensors file: which tensors it holds, and where."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mlx_blockskip.engine import dtypes, elsewhere, foreign
from mlx_blockskip.engine.errors import UserError

Metadata = Mapping[str, str] | None
MAX_HEADER = 100 << 20


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


def read_header(path: Path) -> Header:
    """Read and check a safetensors header. Raises UserError for a missing, truncated or malformed file."""
    try:
        size = elsewhere.size_of(path)
        with path.open("rb") as file:
            return _parse_header(path, file, size)
    except FileNotFoundError:
        raise UserError(f"{path}: {foreign.absence(path) or 'no such file'}") from None
    except OSError as error:
        raise UserError(f"{path}: not readable ({error.strerror})") from None


def _parse_header(path: Path, file: BinaryIO, size: int) -> Header:
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > MAX_HEADER or 8 + length > size:
        reason = foreign.kind(path) or "not a whole safetensors file (its header is cut off); get it again"
        raise UserError(f"{path}: {reason}")
    try:
        fields = json.loads(file.read(length))
        metadata = fields.pop("__metadata__", None) or {}  # MLX writes null where it has none
        entries = {}
        for name, field in fields.items():
            begin, end = field["data_offsets"]
            entry = TensorEntry(name, tuple(field["shape"]), field["dtype"], 8 + length + begin)
            if entry.dtype not in dtypes.BITS:
                raise UserError(f"{path}: {name} has dtype {entry.dtype}, which is not supported")
            if end - begin != entry.nbytes or begin < 0:
                raise ValueError(f"{name} has {end - begin} bytes instead of {entry.nbytes}")
            if 8 + length + end > size:
                raise UserError(f"{path}: is cut off ({name} ends beyond the file); get it again")
            entries[name] = entry
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a safetensors file ({error}); get it again") from None
    return Header(entries, metadata)


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
