"""Checksums of what this tool writes and reads again: of JSON inside it, of other files in a JSON beside them."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_blockskip.engine import files
from mlx_blockskip.engine.errors import DamagedError

KEY = "checksum"


def seal(value: Mapping[str, Any]) -> dict[str, Any]:
    """The same with a checksum of all of it."""
    return {**value, KEY: _digest(value)}


def opened(path: Path, value: Mapping[str, Any], way_out: str, required: bool = False) -> dict[str, Any]:
    """What was sealed, without the checksum. required: whether there has to be one. Raises DamagedError."""
    content = {key: item for key, item in value.items() if key != KEY}
    if (KEY in value or required) and value.get(KEY) != _digest(content):
        raise DamagedError(f"{path}: is not what was written (its checksum differs); {way_out}")
    return content


def check(path: Path, expected: str, way_out: str) -> None:
    """Raise DamagedError where a file is missing or has other bytes than those that were written."""
    if not path.is_file():
        raise DamagedError(f"{path}: is missing; {way_out}")
    if files.sha256(path) != expected:
        raise DamagedError(f"{path}: is not what was written (its checksum differs); {way_out}")


def _digest(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
