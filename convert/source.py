"""A folder of a Hugging Face checkpoint: which file holds which tensor, read one tensor at a time."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from mlx_blockskip.engine import files
from mlx_blockskip.engine.errors import UserError

PICKLED = (".bin", ".pt", ".pth", ".ckpt")
FLOATS = ("F16", "BF16", "F32")


@dataclass(frozen=True)
class Source:
    """tensors: each tensor's file and header entry."""

    folder: Path
    tensors: Mapping[str, tuple[Path, files.TensorEntry]]

    def read(self, name: str) -> mx.array:
        """One tensor, evaluated; nothing else is read and no file stays open."""
        path, _ = self.tensors[name]
        array = files.load_lazily(path)[name]
        mx.eval(array)
        return array


def open_source(folder: Path) -> Source:
    """Find the tensors of a folder: one safetensors file, or shards with an index or without.

    Raises UserError for pickled weights, missing or doubled shards, and shard names that leave the folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: this part of the checkpoint is missing; download it again")
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    plain = [path for path in indexes if ".fp16." not in path.name] or indexes
    if plain:
        return _indexed(folder, plain[0])
    shards = sorted(folder.glob("*.safetensors"))
    shards = [path for path in shards if ".fp16." not in path.name] or shards
    if not shards:
        if any(path.suffix in PICKLED for path in folder.iterdir()):
            raise UserError(
                f"{folder}: its weights are pickled files, which can run code when opened; "
                "get a checkpoint in safetensors format"
            )
        raise UserError(f"{folder}: has no safetensors file; download it again")
    tensors: dict[str, tuple[Path, files.TensorEntry]] = {}
    for path in shards:
        for name, entry in files.read_header(path).entries.items():
            if name in tensors:
                raise UserError(
                    f"{folder}: {name} is in {tensors[name][0].name} and in {path.name}; remove one of them"
                )
            tensors[name] = path, entry
    return Source(folder, tensors)


def _indexed(folder: Path, index: Path) -> Source:
    weight_map = files.read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{index}: has no weight_map; download it again")
    headers: dict[str, files.Header] = {}
    tensors = {}
    for name, shard in weight_map.items():
        path = folder / shard
        if Path(shard).name != shard:
            raise UserError(f"{index}: the shard name {shard!r} leaves the folder; do not use this checkpoint")
        if shard not in headers:
            headers[shard] = files.read_header(path)
        if name not in headers[shard].entries:
            raise UserError(f"{path}: should hold {name} by {index.name}, and does not; download it again")
        tensors[name] = path, headers[shard].entries[name]
    return Source(folder, tensors)
