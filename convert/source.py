"""A folder of a Hugging Face checkpoint: which file holds which tensor, read some rows at a time."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from mlx_blockskip.engine import dtypes, elsewhere, files, listing
from mlx_blockskip.engine.errors import UserError

PICKLED = (".bin", ".pt", ".pth", ".ckpt")
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.safetensors.index.*.json")
"""Shards and their indexes; diffusers and transformers put a variant before `.json`."""
FLOATS = ("F16", "BF16", "F32")
VARIANTS = ("", "fp32", "bf16", "fp16", "non_ema")
"""Copies of the same weights that may lie in one folder; the first of these that is there is read."""


def variant(file: str) -> str:
    """The variant in a file's name: fp16 of `model.fp16.safetensors` and of `model.fp16-00001-of-00002.safetensors`."""
    match = re.search(rf"\.({'|'.join(VARIANTS[1:])})(?=[.-])", file.rsplit("/", 1)[-1])
    return match[1] if match else ""


def preferred(files_of_weights: Iterable[str]) -> set[str]:
    """Of the weights and indexes in one folder, those of one variant."""
    by_variant: dict[str, set[str]] = {}
    for file in files_of_weights:
        by_variant.setdefault(variant(file), set()).add(file)
    return next((by_variant[name] for name in VARIANTS if name in by_variant), set())


@dataclass(frozen=True)
class Source:
    """tensors: each tensor's file and header entry."""

    folder: Path
    tensors: Mapping[str, tuple[Path, files.TensorEntry]]

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one tensor."""
        return self.tensors[name][1].shape

    def read(self, name: str, start: int = 0, stop: int | None = None) -> mx.array:
        """One tensor, or its rows start to stop - 1; nothing else is read and no file stays open."""
        path, entry = self.tensors[name]
        rows, *rest = entry.shape or (1,)
        count = (rows if stop is None else stop) - start
        size = entry.nbytes // max(1, rows)
        raw = elsewhere.read_bytes(path, entry.start + start * size, count * size)
        return mx.array(raw).view(dtypes.mlx_dtype(entry.dtype)).reshape((count, *rest) if entry.shape else ())


def open_source(folder: Path) -> Source:
    """Find the tensors of a folder: one safetensors file, or shards with an index or without.

    Raises UserError for pickled weights, missing or doubled shards, and shard names that leave the folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: this part of the checkpoint is missing; download it again")
    found = preferred(path.name for pattern in WEIGHTS for path in listing.visible(folder, pattern))
    indexes = sorted(name for name in found if name.endswith(".json"))
    if indexes:
        return _indexed(folder, folder / indexes[0])
    shards = sorted(folder / name for name in found)
    if not shards:
        if any(path.suffix in PICKLED for path in listing.visible(folder)):
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
    content = files.read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise UserError(f"{index}: has no weight_map of names to files; download it again")
    headers: dict[str, files.Header] = {}
    tensors = {}
    for name, shard in weight_map.items():
        path = folder / shard
        if Path(shard).name != shard or shard == "..":
            raise UserError(f"{index}: the shard name {shard!r} leaves the folder; do not use this checkpoint")
        if shard not in headers:
            headers[shard] = files.read_header(path)
        if name not in headers[shard].entries:
            raise UserError(f"{path}: should hold {name} by {index.name}, and does not; download it again")
        tensors[name] = path, headers[shard].entries[name]
    return Source(folder, tensors)
