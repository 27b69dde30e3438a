"""`convert`: a Hugging Face checkpoint becomes an MLX model directory."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from mlx_blockskip.converters import run, vision
from mlx_blockskip.converters.run import Precision, default_dtype
from mlx_blockskip.converters.table import Component
from mlx_blockskip.engine import files
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.events import Note, Saved, emit
from mlx_blockskip.models.family import Family
from mlx_blockskip.models.registry import find_family
from mlx_blockskip.settings import ConvertSettings
from mlx_blockskip.tasks.checkpoint.address import Repo, repo_named
from mlx_blockskip.tasks.checkpoint.hub import ENCODER, PIPELINE, download
from mlx_blockskip.tasks.checkpoint.stream import convert_streaming
from mlx_blockskip.tasks.phases import phase

ENCODER_DTYPE = "float32"
"""What image encoders are stored in where nothing else is asked for: they are small, and they measure."""


def convert(settings: ConvertSettings) -> Path:
    """Convert `hf_path` (a directory or repo id) into the new directory `mlx_path`; returns its path."""
    target = Path(settings.mlx_path).expanduser()
    if not settings.hf_path:
        raise UserError("--hf-path: give a Hugging Face directory or a repo id")
    if target.exists():
        raise UserError(f"{target}: already exists; choose another --mlx-path or remove it")
    modulation = 0 if settings.q_modulation == "none" else int(settings.q_modulation)
    precision = Precision(
        settings.dtype or "",
        settings.q_bits if settings.quantize else 0,
        settings.q_group_size,
        modulation if settings.quantize else 0,
    )
    source = Path(settings.hf_path).expanduser()
    if settings.stream and source.is_dir():
        raise UserError(f"--stream: {source} is on this disk already; leave it out, or give a repo")
    if not source.is_dir():
        repo = repo_named(settings.hf_path)
        if repo is None:
            raise UserError(f"{settings.hf_path}: no such directory, and not a repo id such as owner/name")
        repo = Repo(repo.name, settings.revision or repo.revision)
        if settings.stream:
            convert_streaming(repo, target, precision, settings.hf_path)
            emit(Saved(target, "model"))
            return target
        source = download(repo, (PIPELINE, ENCODER), precision, target)
    usual = ENCODER_DTYPE if is_encoder(source) else default_dtype()
    precision = replace(precision, dtype=precision.dtype or usual)
    convert_directory(source, target, precision, settings.hf_path)
    emit(Saved(target, "model"))
    return target


def convert_directory(source: Path, target: Path, precision: Precision, origin: str) -> None:
    """Convert a local directory; the target appears when it is whole. Yields events."""
    if is_encoder(source):
        components, writing = _encoder(source, precision, origin)
    else:
        components, writing = _pipeline(source, precision, origin)
    need, free = sum(run.size_of(component, precision) for component in components), files.free_space(target)
    if need > free:
        raise UserError(
            f"{target}: {need / 2**30:.2f} GiB are needed and {free / 2**30:.2f} GiB are free; choose another disk"
        )
    notes(components, precision)
    shards = sum(len(run.plan_shards(component, precision)) for component in components)
    with phase("convert", shards, "shards") as track, files.atomic_directory(target) as temporary:
        for done, _ in enumerate(writing(temporary), 1):
            track.step(done)


Writing = Callable[[Path], Iterator[tuple[str, str]]]
"""Fills a directory; yields (component, shard) as they are done."""


def _pipeline(source: Path, precision: Precision, origin: str) -> tuple[list[Component], Writing]:
    family = family_of(source).name
    opened = run.open_checkpoint(source, family)

    def writing(target: Path) -> Iterator[tuple[str, str]]:
        return run.write_model(source, target, family, precision, opened, origin)

    return [component for component, _ in opened], writing


def _encoder(source: Path, precision: Precision, origin: str) -> tuple[list[Component], Writing]:
    if precision.bits or precision.modulation_bits:
        raise UserError(
            f"--quantize: {origin} is an image encoder, which is not quantized: it is small, and what it measures "
            "should not depend on rounding; leave the option out"
        )
    parts = vision.open_checkpoint(source)

    def writing(target: Path) -> Iterator[tuple[str, str]]:
        return vision.write_encoder(source, target, precision, parts, origin)

    return [part.component for part in parts], writing


def notes(components: list[Component], precision: Precision) -> None:
    """Say which layers the wanted group size does not divide."""
    found = {k: v for component in components for k, v in run.exceptions(component, precision).items()}
    smaller, whole = [k for k, v in found.items() if v], [k for k, v in found.items() if not v]
    if smaller:
        sizes = " or ".join(str(size) for size in sorted({found[k] for k in smaller}))
        emit(
            Note(
                f"{len(smaller)} layers have inputs that {precision.group_size} does not divide, and get groups of "
                f"{sizes}: {smaller[0]} ..."
            )
        )
    if whole:
        emit(Note(f"{len(whole)} layers have inputs that no group size divides, and stay whole: {whole[0]} ..."))


def is_converted(path: Path) -> bool:
    """Whether this is an MLX model directory."""
    config = path / "config.json"
    return config.is_file() and "format" in files.read_json(config)


def is_encoder(path: Path) -> bool:
    """Whether this is an image encoder in Hugging Face layout.

    Raises UserError for another model whose config.json lies at the top, as an encoder's does.
    """
    return not (path / "model_index.json").is_file() and vision.kind_of(path) is not None


def family_of(source: Path) -> Family:
    """The family of a Hugging Face directory. Raises UserError where it is none that is supported."""
    if is_converted(source):
        raise UserError(f"{source}: is an MLX model directory already; use it as --model, or give what it was made of")
    index = source / "model_index.json"
    if not index.is_file():
        raise UserError(f"{source}: has no model_index.json, so it is not a pipeline in Hugging Face layout")
    content = files.read_json(index)
    if not isinstance(content, dict):
        raise UserError(f"{index}: is not a pipeline's index; download it again")
    return find_family(content)
