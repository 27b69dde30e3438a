"""Directories that this tool fills and clears again. Only what it made itself is removed, by a marker of its own."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_blockskip.engine import files, leftovers, listing, parsed
from mlx_blockskip.engine.errors import UserError

MARKER = "made_from.json"
MADE_BY = {"made_by": "mlx-blockskip"}


def begin(path: Path, names: Sequence[str], made_from: Mapping[str, Any] | None = None) -> None:
    """Have `path` for files of these names (glob patterns); what was made from something else is removed from it first.

    Raises UserError where the directory holds anything that this tool did not make. Hidden files are passed over.
    """
    marker = path / MARKER
    record = json.loads(json.dumps({**MADE_BY, **(made_from or {})}))
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: is a file, and a directory of this name is needed; move it elsewhere")
    before = recorded(path)
    foreign = sorted(p.name for p in listing.visible(path) if p != marker and not (before and _ours(p, names)))
    if foreign or (marker.exists() and not before):
        raise UserError(
            f"{path}: holds {foreign[0] if foreign else MARKER}, which mlx-blockskip did not make; "
            "move it elsewhere, or choose another directory"
        )
    if before != record:
        _clear(path, names)
        files.write_json(marker, record)


def clear(path: Path, names: Sequence[str]) -> None:
    """Remove from a directory that carries the marker what has these names, and the directory where nothing else is
    left. A directory without the marker is left alone.
    """
    if not recorded(path):
        return
    _clear(path, names)
    remove_empty(path)


def remove(path: Path, names: Sequence[str]) -> None:
    """Remove what has these names from a directory that is known to be ours, and itself where nothing else is left."""
    _clear(path, names)
    remove_empty(path)


def remove_empty(path: Path) -> None:
    """Remove a directory where there is nothing in it, or the marker alone."""
    marker = path / MARKER
    if path.is_dir() and set(path.iterdir()) <= {marker, listing.companion(marker)}:
        marker.unlink(missing_ok=True)
        listing.companion(marker).unlink(missing_ok=True)
        path.rmdir()


def _clear(path: Path, names: Sequence[str]) -> None:
    for found in listing.visible(path):
        if not _ours(found, names):
            continue
        if found.is_dir() and not found.is_symlink():
            leftovers.remove_tree(found)
        else:
            found.unlink()
    for left in list(path.glob("._*")):  # macOS takes a companion away with its file, other systems do not
        if _ours(left.with_name(left.name[2:]), names):
            left.unlink(missing_ok=True)


def _ours(path: Path, names: Sequence[str]) -> bool:
    return any(path.match(name) for name in names)


def recorded(path: Path) -> dict[str, Any] | None:
    """What the marker of a directory records; None where there is none of ours."""
    try:
        record = parsed.parse((path / MARKER).read_bytes())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and record.items() >= MADE_BY.items() else None
