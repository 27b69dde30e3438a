"""The index of a component's shards: which file holds which tensor."""

from pathlib import Path
from typing import Any

from mlx_blockskip.engine import files
from mlx_blockskip.engine.errors import UserError


def read_index(path: Path, way_out: str = "convert the model again") -> tuple[dict[str, str], dict[str, Any]]:
    """Files by the names of tensors, and the index's metadata. Raises UserError for anything else than that, and for a
    file that does not lie beside the index.
    """
    content = files.read_json(path)
    weight_map, metadata = content.get("weight_map"), content.get("metadata") or {}
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise UserError(f"{path}: has no weight_map of names to files; {way_out}")
    if not isinstance(metadata, dict):
        raise UserError(f"{path}: has no metadata that is an object; {way_out}")
    for file in dict.fromkeys(weight_map.values()):
        if not is_plain(file):
            raise UserError(f"{path}: the shard name {file!r} leaves the folder; do not use this checkpoint")
    return weight_map, metadata


def is_plain(name: str) -> bool:
    """Whether this names a file of a folder, and nothing outside of it."""
    return Path(name).name == name and name not in ("", "..") and "\0" not in name and "\\" not in name


def members(metadata: dict[str, Any], key: str, kind: type, path: Path) -> dict[str, Any]:
    """A member of the metadata: an object with values of this type, empty where there is none. Raises UserError."""
    found = metadata.get(key) or {}
    if not isinstance(found, dict) or not all(type(value) is kind for value in found.values()):
        raise UserError(f"{path}: its {key} are not what convert writes; convert the model again")
    return found
