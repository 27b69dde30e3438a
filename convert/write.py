"""Write an MLX model directory: a shard a block, quantized where that is wanted, a part of one tensor in memory at a
time.
"""

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_blockskip.converters import copied
from mlx_blockskip.converters.quantization import of_model, record_of, with_record
from mlx_blockskip.converters.run import load_table, their_name
from mlx_blockskip.converters.source import Source
from mlx_blockskip.converters.table import Component, Row
from mlx_blockskip.engine import disk, dtypes, files, manifest
from mlx_blockskip.engine.shards import INDEX
from mlx_blockskip.models.registry import family_named, own_defaults

DTYPES = ("float32", "bfloat16", "float16")
GROUP_SIZES = (128, 64, 32)
METADATA = {"format": "mlx"}
PART_BYTES = 32 << 20
"""Of a tensor, in float32, that are in memory at a time."""


@dataclass(frozen=True)
class Precision:
    """What is stored: dtype of what is not quantized; bits 0 leaves all layers whole; modulation_bits likewise."""

    dtype: str
    bits: int = 0
    group_size: int = 64
    modulation_bits: int = 0

    def bits_for(self, row: Row) -> int:
        return {"linear": self.bits, "modulation": self.modulation_bits, "plain": 0}[row.role]

    def group_for(self, row: Row) -> int:
        """The group size that divides the layer's inputs: the wanted one, else 32, else 0 (not quantized)."""
        width = row.shape[-1]
        for size in (self.group_size, *(g for g in GROUP_SIZES if g < self.group_size)):
            if width % size == 0:
                return size
        return 0


@dataclass
class Shard:
    """One file to write: rows with the group size of each that is quantized."""

    file: str
    rows: list[Row] = field(default_factory=list)
    groups: dict[str, int] = field(default_factory=dict)


def default_dtype() -> str:
    """bfloat16 on Metal; float32 on a CPU, whose bfloat16 products are slow."""
    return "bfloat16" if mx.metal.is_available() else "float32"


def write_component(component: Component, source: Source, target: Path, precision: Precision) -> Iterator[str]:
    """Write one component's shards and index; yields each shard's name when it is done. A shard that is there already,
    as where a conversion goes on, stays.
    """
    checksums: dict[str, str] = {}
    shards = plan_shards(component, precision)
    with disk.flushing() as flush:
        for shard in shards:
            path = target / shard.file
            _, size = files.encode_header(shard_entries(component, shard, precision), METADATA)
            if path.is_file() and path.stat().st_size == size:
                checksums[shard.file] = files.sha256(path)
            else:
                checksums[shard.file] = _write_shard(component, shard, source, path, precision)
                flush(path)
            yield shard.file
    files.write_json(target / INDEX, index_of(component, shards, precision, checksums))
    if record_of(precision, {"": component}) is None:
        source.write_config(target / "config.json")
    else:
        files.write_json(target / "config.json", with_record(source.content(), component, precision))


def _write_shard(component: Component, shard: Shard, source: Source, path: Path, precision: Precision) -> str:
    """Returns its checksum."""
    entries = shard_entries(component, shard, precision)
    with files.SafetensorsWriter(path, entries, METADATA, durable=False, hashed=True) as writer:
        for row in shard.rows:
            name = their_name(row, source)
            assert name is not None
            _write_row(writer, row, source, name, shard, precision, _dtype(component, precision))
    return writer.checksum


def index_of(
    component: Component, shards: Sequence[Shard], precision: Precision, checksums: Mapping[str, str]
) -> dict[str, Any]:
    """The component's model.safetensors.index.json."""
    entries = {shard.file: shard_entries(component, shard, precision) for shard in shards}
    metadata: dict[str, Any] = {
        "total_size": sum(entry.nbytes for found in entries.values() for entry in found),
        "sha256": dict(checksums),
    }
    groups = {name.removesuffix(".weight"): size for shard in shards for name, size in shard.groups.items()}
    if groups:
        metadata["group_sizes"] = groups
    return {"metadata": metadata, "weight_map": {e.name: file for file, found in entries.items() for e in found}}


def plan_shards(component: Component, precision: Precision) -> list[Shard]:
    """One shard a block in the order of the rows, and one for the rest."""
    shards: dict[str | None, Shard] = {}
    for row in component.rows:
        block = component.block(row.name)
        if block not in shards:
            count = sum(key is not None for key in shards)
            shards[block] = Shard("rest.safetensors" if block is None else f"block-{count:03d}.safetensors")
        shards[block].rows.append(row)
        if precision.bits_for(row) and (size := precision.group_for(row)):
            shards[block].groups[row.name] = size
    return list(shards.values())


def size_of(component: Component, precision: Precision) -> int:
    """Bytes that the component's tensors will take on disk."""
    shards = plan_shards(component, precision)
    return sum(entry.nbytes for shard in shards for entry in shard_entries(component, shard, precision))


def shard_entries(component: Component, shard: Shard, precision: Precision) -> list[files.TensorEntry]:
    """The tensors of one shard, in order."""
    dtype = _dtype(component, precision)
    return [entry for row in shard.rows for entry in _entries(row, shard, precision, dtype)]


def exceptions(component: Component, precision: Precision) -> dict[str, int]:
    """Layers that the wanted group size does not divide: `folder/module` with the size they get, 0 for unquantized."""
    found = {row.name: precision.group_for(row) for row in component.rows if precision.bits_for(row)}
    return {
        f"{component.folder}/{name.removesuffix('.weight')}": size
        for name, size in found.items()
        if size != precision.group_size
    }


def _dtype(component: Component, precision: Precision) -> str:
    return (component.dtypes or {}).get(precision.dtype, precision.dtype)


def _entries(row: Row, shard: Shard, precision: Precision, dtype: str) -> list[files.TensorEntry]:
    name = dtypes.dtype_name(getattr(mx, dtype))
    group = shard.groups.get(row.name)
    if group is None:
        return [files.TensorEntry(row.name, row.shape, name)]
    out, width = row.shape
    module = row.name.removesuffix(".weight")
    return [
        files.TensorEntry(row.name, (out, width * precision.bits_for(row) // 32), "U32"),
        files.TensorEntry(f"{module}.scales", (out, width // group), name),
        files.TensorEntry(f"{module}.biases", (out, width // group), name),
    ]


def _write_row(
    writer: files.SafetensorsWriter,
    row: Row,
    source: Source,
    name: str,
    shard: Shard,
    precision: Precision,
    dtype: str,
) -> None:
    """One tensor, about PART_BYTES of it at a time: nothing that is done to it looks beyond a part."""
    group, module = shard.groups.get(row.name), row.name.removesuffix(".weight")
    first = row.first(source.shape(name))
    as_it_is = group is None and row.fix != "conv" and source.stored_as(name) == dtypes.dtype_name(getattr(mx, dtype))
    for start, stop in parts(row.shape):
        if as_it_is:
            writer.write_bytes(row.name, source.bytes(name, first + start, first + stop), start)
            continue
        part = source.read(name, first + start, first + stop)
        tensor = row.read(part).astype(getattr(mx, dtype))
        if group is None:
            writer.write(row.name, tensor, start)
            continue
        packed, scales, biases = mx.quantize(tensor, group_size=group, bits=precision.bits_for(row))
        for target, value in ((row.name, packed), (f"{module}.scales", scales), (f"{module}.biases", biases)):
            writer.write(target, value, start)


def parts(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Rows of a tensor, from the first to beyond the last, that are about PART_BYTES; a scalar is one row."""
    count = shape[0] if shape else 1
    step = max(1, PART_BYTES * count // max(1, 4 * math.prod(shape)))
    for start in range(0, count, step):
        yield start, min(start + step, count)


def write_model(
    source: Path, target: Path, family: str, precision: Precision, opened: list[tuple[Component, Source]], origin: str
) -> Iterator[tuple[str, str]]:
    """Fill the (temporary) directory `target`; yields (component, shard) as they are done."""
    table = load_table(family)
    for component, tensors in opened:
        folder = target / component.folder
        folder.mkdir(exist_ok=True)
        for shard in write_component(component, tensors, folder, precision):
            yield component.folder, shard
    for name in table.COPIED:
        copied.copy_folder(source / name, target / name)
    for path in source.iterdir():
        if path.is_file() and (path.name == "model_index.json" or path.name.upper().startswith(("LICENSE", "README"))):
            shutil.copyfile(path, target / path.name)
    files.write_json(target / "config.json", model_config(source, family, precision, opened, origin))
    manifest.write(target)


def model_config(
    source: Path, family: str, precision: Precision, opened: list[tuple[Component, Source]], origin: str
) -> Mapping[str, Any]:
    """config.json of the MLX model directory."""
    return {
        "format": 1,
        "family": family,
        "components": [component.folder for component, _ in opened],
        "dtype": precision.dtype,
        "quantization": of_model(precision, [component for component, _ in opened]),
        "defaults": own_defaults(source, family_named(family)),
        "source": origin,
    }
