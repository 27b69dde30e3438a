"""From an MLX model directory back to a folder that `DiffusionPipeline.from_pretrained` of diffusers opens."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_blockskip.converters import hf
from mlx_blockskip.engine import files
from mlx_blockskip.engine.shards import Added
from mlx_blockskip.events import Note, emit
from mlx_blockskip.models.registry import read_config
from mlx_blockskip.tasks.phases import phase
from mlx_blockskip.tasks.targets import check_room


def write_hugging_face(
    source: Path,
    target: Path,
    dtype: str | None = None,
    *,
    added: Mapping[str, Mapping[str, Added]] | None = None,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Write the MLX model directory `source` in diffusers' layout; `target` appears when it is whole.

    dtype: in place of the stored one. added: what adapters add, by folder and module. config: in place of the model's.
    Raises UserError.
    """
    config = config or read_config(source)
    family = config["family"]
    parts = hf.open_parts(source, family, dtype, added)
    check_room(target, sum(entry.nbytes for part in parts for entry in part.entries()))
    if quantized := [layer for part in parts for layer in part.quantized]:
        emit(Note(f"{len(quantized)} quantized layers are made whole, rounded as they are: {quantized[0]} ..."))
    count = sum(len(hf.files_of(part)) for part in parts)
    with phase("write", count, "files") as track, files.atomic_directory(target) as temporary:
        for done, _ in enumerate(hf.write_checkpoint(source, temporary, family, parts, config), 1):
            track.step(done)
