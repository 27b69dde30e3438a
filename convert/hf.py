"""An MLX model directory becomes a checkpoint in diffusers' layout again, a part of one tensor in memory at a time."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_blockskip.converters.run import SHOWN, load_table, read_components
from mlx_blockskip.converters.table import Component
from mlx_blockskip.converters.whole import Whole, misfits, quantized_layers
from mlx_blockskip.converters.write import parts
from mlx_blockskip.engine import dtypes, files
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.engine.shards import Added, Shards

STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
"""What a library calls its file of weights."""

SHARD_BYTES = 10 * 10**9
"""Of one file, as diffusers' own `save_pretrained` has it; what takes more goes into several with an index."""

OWN_FILES = {"defaults": "defaults.json", "fused": "fused.json"}
"""What config.json says and no diffusers folder has a place for, in files beside model_index.json."""


@dataclass(frozen=True)
class Part:
    """A component to write: with the name of its files, and the type that is wanted in place of the stored one."""

    component: Component
    whole: Whole
    stem: str
    dtype: str | None

    def entries(self) -> list[files.TensorEntry]:
        """Its tensors as the current reference class has them."""
        wanted = None if self.dtype is None else dtypes.dtype_name(getattr(mx, self.dtype))
        return [
            files.TensorEntry(row.name, row.current_shape(), wanted or self.whole.dtype(row.name))
            for row in self.component.rows
        ]

    @property
    def quantized(self) -> list[str]:
        """Layers that will be dequantized."""
        return quantized_layers(self.component, self.whole)


def open_parts(
    source: Path, family: str, dtype: str | None = None, added: Mapping[str, Mapping[str, Added]] | None = None
) -> list[Part]:
    """Every component of an MLX model directory, checked to be what its config says.

    dtype: in place of the stored one (bfloat16 in place of float16 where that overflows). added: what adapters add, by
    folder and module. Raises UserError.
    """
    index = files.read_json(source / "model_index.json")
    found = []
    for component in read_components(source, family):
        folder = source / component.folder
        whole = Whole(Shards(folder), (added or {}).get(component.folder))
        if wrong := [f"{m.name} {m.actual or ''}".strip() for m in misfits(component, whole)]:
            more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
            raise UserError(
                f"{folder}: {', '.join(wrong[:SHOWN])}{more} is not as its config.json says; convert the model again"
            )
        wanted = (component.dtypes or {}).get(dtype, dtype) if dtype else None
        found.append(Part(component, whole, _stem(index, component.folder, source), wanted))
    return found


def _stem(index: Any, folder: str, source: Path) -> str:
    library = index.get(folder) if isinstance(index, dict) else None
    stem = STEMS.get(library[0]) if isinstance(library, list) and library else None
    if stem is None:
        raise UserError(
            f"{source / 'model_index.json'}: does not say which library {folder} is of; convert the model again"
        )
    return stem


def files_of(part: Part) -> dict[str, list[files.TensorEntry]]:
    """The files that a component becomes: one, or as many as SHARD_BYTES asks for, in diffusers' names."""
    groups: list[list[files.TensorEntry]] = [[]]
    size = 0
    for entry in part.entries():
        if groups[-1] and size + entry.nbytes > SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(entry)
        size += entry.nbytes
    if len(groups) == 1:
        return {f"{part.stem}.safetensors": groups[0]}
    return {
        f"{part.stem}-{number:05d}-of-{len(groups):05d}.safetensors": group for number, group in enumerate(groups, 1)
    }


def write_part(part: Part, target: Path) -> Iterator[str]:
    """Write one component's files; yields each one's name when it is done."""
    planned = files_of(part)
    rows = {row.name: row for row in part.component.rows}
    for file, entries in planned.items():
        with files.SafetensorsWriter(target / file, entries, {"format": "pt"}) as writer:
            for entry in entries:
                row, dtype = rows[entry.name], dtypes.mlx_dtype(entry.dtype)
                for start, stop in parts(row.shape):
                    writer.write(row.name, row.write(part.whole.read(row.name, start, stop).astype(dtype)), start)
        yield file
    if len(planned) > 1:
        weight_map = {entry.name: file for file, entries in planned.items() for entry in entries}
        total = sum(entry.nbytes for entries in planned.values() for entry in entries)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        files.write_json(target / f"{part.stem}.safetensors.index.json", index)
    files.write_json(target / "config.json", _config(part))


def _config(part: Part) -> dict[str, Any]:
    """The component's config without what is MLX's, and with the type that its weights now have, where it says one."""
    config = {key: value for key, value in part.whole.shards.config.items() if key != "quantization"}
    sizes: dict[str, int] = {}
    for entry in part.entries():
        sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.nbytes
    dtype = str(dtypes.mlx_dtype(max(sizes, key=lambda name: sizes[name]))).rpartition(".")[2]
    return config | {key: dtype for key in ("dtype", "torch_dtype") if key in config}


def write_checkpoint(
    source: Path, target: Path, family: str, opened: Sequence[Part], config: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    """Fill the (temporary) directory `target`; yields (component, file) as they are done. config: the model's."""
    for part in opened:
        folder = target / part.component.folder
        folder.mkdir()
        for file in write_part(part, folder):
            yield part.component.folder, file
    for name in load_table(family).COPIED:
        shutil.copytree(source / name, target / name, ignore=shutil.ignore_patterns(".*"))
    for path in source.iterdir():
        if path.is_file() and (path.name == "model_index.json" or path.name.upper().startswith(("LICENSE", "README"))):
            shutil.copyfile(path, target / path.name)
    for key, name in OWN_FILES.items():
        if config.get(key):
            files.write_json(target / name, config[key])
