"""Hold files against what they say of themselves: headers, checksums, finite values. Whatever is wrong is a Problem."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from mlx_blockskip.engine import files, listing
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.engine.shards import INDEX

FLOATS = ("F16", "BF16", "F32")
PART_BYTES = 32 << 20
"""Of a tensor that are looked at together."""


@dataclass(frozen=True)
class Problem:
    """Something in a file that is not as it should be. tensor: None where it is not about one."""

    file: Path
    tensor: str | None
    expected: str
    actual: str

    def __str__(self) -> str:
        where = f"{self.file}: {self.tensor}" if self.tensor else str(self.file)
        return f"{where}: {self.expected} expected, {self.actual} found"


def unreadable(path: Path, error: UserError) -> Problem:
    """The problem of a file that cannot be read at all."""
    return Problem(path, None, "a whole file", str(error).removeprefix(f"{path}: "))


def checksum_problems(path: Path, expected: str | None) -> list[Problem]:
    """A file that is missing, or has other bytes than those that were written; no problem where nothing is expected."""
    if not path.is_file():
        return [Problem(path, None, "a file", "none")]
    if expected is None:
        return []
    actual = files.sha256(path)
    return [] if actual == expected else [Problem(path, None, f"sha256 {expected}", actual)]


def header_problems(path: Path) -> list[Problem]:
    """A safetensors file that is missing, cut off or malformed."""
    try:
        files.read_header(path)
    except UserError as error:
        return [unreadable(path, error)]
    return []


def value_problems(path: Path, what: str = "finite values") -> list[Problem]:
    """A file whose header is wrong, and every tensor with values that are not finite. A part of one is in memory."""
    if found := header_problems(path):
        return found
    for name, entry in files.read_header(path).entries.items():
        if entry.dtype not in FLOATS or not entry.nbytes:
            continue
        rows = entry.shape[0] if entry.shape else 1
        step, bad = max(1, rows * PART_BYTES // entry.nbytes), 0
        for start in range(0, rows, step):
            part = files.read_rows(path, entry, start, min(start + step, rows))
            bad += part.size - cast(int, mx.sum(mx.isfinite(part)).item())
        if bad:
            found.append(Problem(path, name, what, f"{bad} that are not"))
    return found


def component_problems(folder: Path) -> list[Problem]:
    """A component directory's index against its shards: each there and whole, with its checksum and its tensors."""
    try:
        index = files.read_json(folder / INDEX)
        weight_map, metadata = dict(index["weight_map"]), index.get("metadata")
    except UserError as error:
        return [unreadable(folder / INDEX, error)]
    except (AttributeError, KeyError, TypeError, ValueError):
        return [Problem(folder / INDEX, None, "a weight_map of names to files", "none")]
    checksums = metadata.get("sha256") if isinstance(metadata, dict) else None
    checksums = checksums if isinstance(checksums, dict) else {}
    found: list[Problem] = []
    shards = sorted({*weight_map.values(), *checksums})
    for shard in shards:
        path = folder / shard
        found += checksum_problems(path, checksums.get(shard)) or header_problems(path)
        if path.is_file() and not header_problems(path):
            found += _name_problems(path, {name for name, file in weight_map.items() if file == shard})
    stray = [path for path in listing.visible(folder, "*.safetensors") if path.name not in shards]
    return found + [Problem(path, None, f"no file that {INDEX} does not name", "one") for path in stray]


def _name_problems(path: Path, expected: Iterable[str]) -> list[Problem]:
    held, wanted = set(files.read_header(path).entries), set(expected)
    missing = [Problem(path, name, "a tensor", "none") for name in sorted(wanted - held)]
    return missing + [
        Problem(path, name, f"no tensor that {INDEX} does not name", "one") for name in sorted(held - wanted)
    ]


def json_of(path: Path) -> tuple[dict[str, Any], list[Problem]]:
    """What a JSON file holds, or the problem that it has."""
    try:
        value = files.read_any_json(path)
    except UserError as error:
        return {}, [unreadable(path, error)]
    return (value, []) if isinstance(value, dict) else ({}, [Problem(path, None, "an object", type(value).__name__)])
