"""Convert a checkpoint in Hugging Face layout to an MLX model directory, a part of one tensor in memory at a time."""

import importlib
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import mlx.core as mx

from mlx_blockskip.converters.source import FLOATS, Source, open_source
from mlx_blockskip.converters.table import Component, Row
from mlx_blockskip.engine import dtypes, files
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.engine.shards import INDEX
from mlx_blockskip.models import schedulers
from mlx_blockskip.models.family import Configs

DTYPES = ("float32", "bfloat16", "float16")
GROUP_SIZES = (128, 64, 32)
SHOWN = 5
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


def load_table(family: str) -> ModuleType:
    """The converter module of a family. Raises UserError where there is none."""
    try:
        return importlib.import_module(f"mlx_blockskip.converters.{family}")
    except ModuleNotFoundError as error:
        raise UserError(f"no converter for the family {family!r} is installed ({error})") from error


def default_dtype() -> str:
    """bfloat16 on Metal; float32 on a CPU, whose bfloat16 products are slow."""
    return "bfloat16" if mx.metal.is_available() else "float32"


def open_checkpoint(source: Path, family: str) -> list[tuple[Component, Source]]:
    """Every component with its tensors, checked to be complete and of the right shapes. Raises UserError."""
    found = []
    for component in read_components(source, family):
        opened = open_source(source / component.folder)
        check_rows(component, opened)
        found.append((component, opened))
    return found


def read_components(source: Path, family: str) -> list[Component]:
    """The components of a checkpoint, by its config files alone. Raises UserError for what is not implemented, by the
    file, the option and its value: in a network or in the scheduler.
    """
    schedulers.read(source)
    configs = {name: files.read_json(source / name / "config.json") for name in load_table(family).FOLDERS}
    return components_of(family, configs, source)


def components_of(family: str, configs: Configs, source: Path | None = None) -> list[Component]:
    """The components that the content of config files stands for, by folder. source: the directory that they are in,
    to be named in errors. Raises UserError.
    """
    table, place = load_table(family), source or Path(family)
    parsed = {name: cls.from_dict(configs[name], place / name / "config.json") for name, cls in table.CONFIGS.items()}
    return cast(list[Component], table.components(parsed))


def check_rows(component: Component, source: Source) -> None:
    """Raise UserError naming tensors that are missing, unexpected or of another shape than the config says."""
    expected: set[str] = set()
    missing, misfit = [], []
    for row in component.rows:
        name = their_name(row, source)
        if name is None:
            missing.append(row.name)
            continue
        expected.add(name)
        entry = source.tensors[name][1]
        if not row.fits(entry.shape) or entry.dtype not in FLOATS:
            misfit.append(f"{name} ({entry.dtype} {list(entry.shape)} instead of floats {list(row.their_shape())})")
    extra = [name for name in source.tensors if name not in expected and not component.ignored(_bare(name))]
    for problem, names in (("lacks", missing), ("has unexpected", extra), ("has wrongly shaped", misfit)):
        if names:
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            raise UserError(
                f"{source.folder}: {problem} {', '.join(names[:SHOWN])}{more}; its config.json is for other weights"
            )


def their_name(row: Row, source: Source) -> str | None:
    """The name under which the checkpoint has this row's tensor."""
    return next((name for name in (row.name, *row.aliases) if name in source.tensors), None)


def _bare(name: str) -> str:
    return name.removeprefix("text_model.")


def write_component(component: Component, source: Source, target: Path, precision: Precision) -> Iterator[str]:
    """Write one component's shards and index; yields each shard's name when it is done. A shard that is there already,
    as where a conversion goes on, stays.
    """
    checksums: dict[str, str] = {}
    shards = plan_shards(component, precision)
    for shard in shards:
        if not (target / shard.file).is_file():
            _write_shard(component, shard, source, target / shard.file, precision)
        checksums[shard.file] = files.sha256(target / shard.file)
        yield shard.file
    files.write_json(target / INDEX, index_of(component, shards, precision, checksums))
    shutil.copyfile(source.folder / "config.json", target / "config.json")


def _write_shard(component: Component, shard: Shard, source: Source, path: Path, precision: Precision) -> None:
    with files.SafetensorsWriter(path, shard_entries(component, shard, precision), {"format": "mlx"}) as writer:
        for row in shard.rows:
            name = their_name(row, source)
            assert name is not None
            _write_row(writer, row, source, name, shard, precision, _dtype(component, precision))


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
    theirs, count = source.shape(name), row.shape[0] if row.shape else 1
    step = max(1, PART_BYTES * count // max(1, 4 * math.prod(row.shape)))
    group, module = shard.groups.get(row.name), row.name.removesuffix(".weight")
    for start in range(0, count, step):
        first = start + row.first(theirs)
        part = source.read(name, first, first + min(step, count - start))
        tensor = row.read(part).astype(getattr(mx, dtype))
        if group is None:
            writer.write(row.name, tensor, start)
            continue
        packed, scales, biases = mx.quantize(tensor, group_size=group, bits=precision.bits_for(row))
        for target, value in ((row.name, packed), (f"{module}.scales", scales), (f"{module}.biases", biases)):
            writer.write(target, value, start)


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
        if not (source / name).is_dir():
            raise UserError(f"{source / name}: this part of the checkpoint is missing; download it again")
        shutil.copytree(source / name, target / name, ignore=shutil.ignore_patterns(".*"), dirs_exist_ok=True)
    for path in source.iterdir():
        if path.is_file() and (path.name == "model_index.json" or path.name.upper().startswith(("LICENSE", "README"))):
            shutil.copyfile(path, target / path.name)
    files.write_json(target / "config.json", model_config(source, family, precision, opened, origin))


def model_config(
    source: Path, family: str, precision: Precision, opened: list[tuple[Component, Source]], origin: str
) -> Mapping[str, Any]:
    """config.json of the MLX model directory."""
    own = source / "defaults.json"
    return {
        "format": 1,
        "family": family,
        "components": [component.folder for component, _ in opened],
        "dtype": precision.dtype,
        "quantization": quantization_of(precision, [component for component, _ in opened]),
        "defaults": files.read_json(own) if own.is_file() else {},
        "source": origin,
    }


def quantization_of(precision: Precision, components: Sequence[Component]) -> dict[str, Any] | None:
    """How layers are quantized, as config.json says it; None where none is."""
    if not precision.bits and not precision.modulation_bits:
        return None
    return {
        "bits": precision.bits,
        "group_size": precision.group_size,
        "modulation_bits": precision.modulation_bits,
        "exceptions": {k: v for component in components for k, v in exceptions(component, precision).items()},
    }
