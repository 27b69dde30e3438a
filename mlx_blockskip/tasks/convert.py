"""`convert`: a Hugging Face checkpoint becomes an MLX model directory."""

from collections.abc import Generator
from pathlib import Path

import mlx.core as mx

from mlx_blockskip.converters import run
from mlx_blockskip.converters.run import Precision, default_dtype
from mlx_blockskip.engine import files
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.events import Event, Note, Saved, Step
from mlx_blockskip.models.family import Family
from mlx_blockskip.models.registry import find_family
from mlx_blockskip.settings import ConvertSettings
from mlx_blockskip.tasks.hub import download, looks_like_repo
from mlx_blockskip.tasks.phases import phase


def convert(settings: ConvertSettings) -> Generator[Event, None, Path]:
    """Convert `hf_path` (a directory or repo id) into the new directory `mlx_path`; returns its path."""
    target = Path(settings.mlx_path).expanduser()
    if not settings.hf_path:
        raise UserError("--hf-path: give a Hugging Face directory or a repo id")
    if target.exists():
        raise UserError(f"{target}: already exists; choose another --mlx-path or remove it")
    source = Path(settings.hf_path).expanduser()
    if not source.is_dir():
        if not looks_like_repo(settings.hf_path):
            raise UserError(f"{settings.hf_path}: no such directory, and not a repo id such as owner/name")
        source = yield from download(settings.hf_path, settings.revision)
    modulation = 0 if settings.q_modulation == "none" else int(settings.q_modulation)
    precision = Precision(
        settings.dtype or default_dtype(),
        settings.q_bits if settings.quantize else 0,
        settings.q_group_size,
        modulation if settings.quantize else 0,
    )
    yield from convert_directory(source, target, precision, settings.hf_path)
    yield Saved(target, "model")
    return target


def convert_directory(source: Path, target: Path, precision: Precision, origin: str) -> Generator[Event, None, None]:
    """Convert a local directory; the target appears when it is whole. Yields events."""
    family = family_of(source).name
    opened = run.open_checkpoint(source, family)
    plans = [run.plan_shards(component, precision) for component, _ in opened]
    need = sum(entry.nbytes for _, tensors in opened for _, entry in tensors.tensors.values())
    width = {"float32": 4}.get(precision.dtype, 2)
    need = need * width // 2 if precision.bits == 0 else need
    if need > files.free_space(target):
        raise UserError(f"{target}: about {need / 2**30:.1f} GiB are needed and not free; choose another disk")
    plain = [
        row.name
        for plan in plans
        for s in plan
        for row in s.rows
        if precision.bits_for(row) and row.name not in s.groups
    ]
    if plain:
        yield Note(f"{len(plain)} layers have inputs that no group size divides, and stay whole: {plain[0]} ...")
    with phase("convert", sum(map(len, plans)), "shards") as track:
        yield track.begin
        with files.atomic_directory(target) as temporary:
            for done, _ in enumerate(run.write_model(source, temporary, family, precision, opened, origin), 1):
                yield Step("convert", done, peak_memory=mx.get_peak_memory())
    yield track.end


def family_of(source: Path) -> Family:
    """The family of a Hugging Face directory. Raises UserError where it is none that is supported."""
    index = source / "model_index.json"
    if not index.is_file():
        raise UserError(f"{source}: has no model_index.json, so it is not a pipeline in Hugging Face layout")
    return find_family(files.read_json(index))
