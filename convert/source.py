"""A folder of a Hugging Face checkpoint: which file holds which tensor, read some rows at a time."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_blockskip.converters import copied, quantized
from mlx_blockskip.converters.views import Stored, View
from mlx_blockskip.engine import files, foreign, listing
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.engine.indexes import read_index

PICKLED = foreign.PICKLED
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.safetensors.index.*.json")
"""Shards and their indexes; diffusers and transformers put a variant before `.json`."""
VARIANTS = ("", "fp32", "bf16", "fp16", "non_ema")
"""Copies of the same weights that may lie in one folder; the first of these that is whole is read."""
INDEX = "*.safetensors.index*.json"
SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors")


def variant(file: str) -> str:
    """The variant in a file's name: fp16 of `model.fp16.safetensors` and of `model.fp16-00001-of-00002.safetensors`."""
    match = re.search(rf"\.({'|'.join(VARIANTS[1:])})(?=[.-])", file.rsplit("/", 1)[-1])
    return match[1] if match else ""


def preferred(files_of_weights: Iterable[str]) -> set[str]:
    """Of the weights and indexes in one folder, those of one copy: of one variant, and either its shards with an index,
    or what is not a shard.
    """
    by_variant: dict[str, set[str]] = {}
    for file in files_of_weights:
        by_variant.setdefault(variant(file), set()).add(file)
    copies = [_one_copy(by_variant[name]) for name in VARIANTS if name in by_variant]
    return next((copy for copy in copies if not missing_shards(copy)), copies[0] if copies else set())


def _one_copy(names: set[str]) -> set[str]:
    shards = {name for name in names if SHARD.fullmatch(name)}
    indexes = sorted(name for name in names if name.endswith(".json"))
    whole = names - shards - set(indexes)
    if shards and (not whole or not missing_shards(shards)):
        return shards | set(indexes[:1])
    return whole if shards else names


def missing_shards(names: Iterable[str]) -> list[str]:
    """The shards that are not there, by how many the names of the others say there are."""
    names = set(names)
    sets = {(match[1], match[3]) for name in names if (match := SHARD.fullmatch(name))}
    wanted = [f"{stem}-{i + 1:05d}-of-{count}.safetensors" for stem, count in sorted(sets) for i in range(int(count))]
    return [name for name in wanted if name not in names]


@dataclass(frozen=True)
class Source:
    """The tensors of a network, by the names that the reference class has for them.

    place: the folder or file that they are in, to be named in errors. config: its config.json, or what is in it.
    misfit: what is the matter where they are not those that the config stands for.
    """

    place: Path
    tensors: Mapping[str, View]
    config: Path | Mapping[str, Any]
    misfit: str = "its config.json is for other weights"

    def content(self) -> Any:
        """Of the config."""
        return files.read_json(self.config) if isinstance(self.config, Path) else self.config

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one tensor."""
        return self.tensors[name].shape

    def write_config(self, path: Path) -> None:
        """Write the config, as it is where it is a file."""
        if isinstance(self.config, Path):
            copied.copy_file(self.config, path)
        else:
            files.write_json(path, self.config)

    def stored_as(self, name: str) -> str | None:
        """The dtype whose bytes a tensor's pieces are; None where reading changes them."""
        return self.tensors[name].stored_as

    def bytes(self, name: str, start: int, stop: int) -> memoryview:
        """The rows start to stop - 1 of a tensor as they are stored."""
        return self.tensors[name].bytes(start, stop)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> mx.array:
        """One tensor, or its rows start to stop - 1; nothing else is read and no file stays open."""
        return self.tensors[name].read(start, stop)


def open_source(folder: Path) -> Source:
    """Find the tensors of a folder: one safetensors file, or shards with an index or without.

    Raises UserError for weights in other formats, missing or doubled shards, and shard names that leave the folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: this part of the checkpoint is missing; download it again")
    found = preferred(path.name for pattern in WEIGHTS for path in listing.visible(folder, pattern))
    indexes = sorted(name for name in found if name.endswith(".json"))
    if not found:
        raise UserError(_without_safetensors(folder))
    stored = _indexed(folder, folder / indexes[0]) if indexes else _together(folder, sorted(found))
    return Source(folder, quantized.views(stored), folder / "config.json")


def stored_in(path: Path) -> dict[str, Stored]:
    """The tensors of one file. Raises UserError for a file in another format."""
    return {name: Stored(path, entry) for name, entry in files.read_header(path).entries.items()}


def _together(folder: Path, names: list[str]) -> dict[str, Stored]:
    for name in missing_shards(names):
        raise UserError(f"{folder / name}: {foreign.absence(folder / name) or 'this shard is missing; get it again'}")
    tensors: dict[str, Stored] = {}
    for path in (folder / name for name in names):
        for name, stored in stored_in(path).items():
            if name in tensors:
                before = tensors[name].path.name
                raise UserError(f"{folder}: {name} is in {before} and in {path.name}; remove one of them")
            tensors[name] = stored
    return tensors


def _without_safetensors(folder: Path) -> str:
    """Why a folder has no weights that are read."""
    others = listing.awaited(folder) + listing.visible(folder)
    for path in others:
        reason = foreign.absence(path) or (foreign.kind(path) if path.is_file() else None)
        if reason is not None:
            return f"{path}: {reason}"
    return f"{folder}: has no safetensors file; download it again"


def _indexed(folder: Path, index: Path) -> dict[str, Stored]:
    weight_map, _ = read_index(index, "download it again")
    shards: dict[str, dict[str, Stored]] = {}
    tensors = {}
    for name, shard in weight_map.items():
        path = folder / shard
        if shard not in shards:
            shards[shard] = stored_in(path)
        if name not in shards[shard]:
            raise UserError(f"{path}: should hold {name} by {index.name}, and does not; download it again")
        tensors[name] = shards[shard][name]
    return tensors
