"""`convert`: a Hugging Face checkpoint becomes an MLX model directory, or the other way round."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from mlx_blockskip.converters import run, singles, vision, write
from mlx_blockskip.converters.places import checkpoint_folder
from mlx_blockskip.converters.table import Component
from mlx_blockskip.converters.write import Precision, default_dtype
from mlx_blockskip.engine import files
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.events import Note, Saved, emit
from mlx_blockskip.settings import ConvertSettings
from mlx_blockskip.tasks.checkpoint import single
from mlx_blockskip.tasks.checkpoint.address import Repo, repo_named
from mlx_blockskip.tasks.checkpoint.hf import write_hugging_face
from mlx_blockskip.tasks.checkpoint.hub import ENCODER, PIPELINE, download
from mlx_blockskip.tasks.checkpoint.recognise import family_of, is_converted, is_encoder
from mlx_blockskip.tasks.checkpoint.single import Writing
from mlx_blockskip.tasks.checkpoint.stream import convert_streaming, finish
from mlx_blockskip.tasks.phases import phase
from mlx_blockskip.tasks.targets import check_room, check_writable

ENCODER_DTYPE = "float32"
"""What image encoders are stored in where nothing else is asked for: they are small, and they measure."""


def convert(settings: ConvertSettings) -> Path:
    """Convert `hf_path` (a directory, a file or a repo id) into the new directory `mlx_path`; returns its path. With
    `to="hf"`, `hf_path` is an MLX model directory, and the new one is in diffusers' layout.
    """
    target = Path(settings.mlx_path).expanduser()
    if not settings.hf_path:
        raise UserError("--hf-path: give a Hugging Face directory, a safetensors file or a repo id")
    named = repo_named(settings.hf_path) if settings.stream else None
    if named is not None and target.exists() and finish(named, target, wanted(settings)):
        emit(Saved(target, "model"))
        return target
    if target.exists():
        raise UserError(f"{target}: already exists; choose another --mlx-path or remove it")
    check_writable(target, "--mlx-path")
    if settings.to == "hf":
        return _back(settings, Path(settings.hf_path).expanduser(), target)
    source, precision = checkpoint_folder(Path(settings.hf_path).expanduser()), wanted(settings)
    if settings.stream and source.exists():
        raise UserError(f"--stream: {source} is on this disk already; leave it out, or give a repo")
    if places := singles.weights_in(source):
        precision = filled(precision, default_dtype())
        write_directory(*single.plan(places, settings, precision), precision, target)
        emit(Saved(target, "model"))
        return target
    if settings.base is not None:
        raise UserError(f"--base: is for single files, and {settings.hf_path} is not one; leave it out")
    if not source.is_dir():
        repo = repo_named(settings.hf_path)
        if repo is None:
            raise UserError(f"{settings.hf_path}: no such file or directory, and not a repo id such as owner/name")
        repo = Repo(repo.name, settings.revision or repo.revision)
        if settings.stream:
            convert_streaming(repo, target, precision, settings.hf_path)
            emit(Saved(target, "model"))
            return target
        source = download(repo, (PIPELINE, ENCODER), precision, target)
    usual = ENCODER_DTYPE if is_encoder(source) else default_dtype()
    convert_directory(source, target, filled(precision, usual), settings.hf_path)
    emit(Saved(target, "model"))
    return target


def wanted(settings: ConvertSettings) -> Precision:
    """What is to be stored; its dtype is empty where it was left open."""
    modulation = 0 if settings.q_modulation == "none" else int(settings.q_modulation)
    return Precision(
        settings.dtype or "",
        settings.q_bits if settings.quantize else 0,
        settings.q_group_size,
        modulation if settings.quantize else 0,
    )


def filled(precision: Precision, dtype: str) -> Precision:
    """The same, with a dtype where it was left open."""
    return replace(precision, dtype=precision.dtype or dtype)


def _back(settings: ConvertSettings, source: Path, target: Path) -> Path:
    if settings.quantize or settings.revision or settings.stream or settings.base:
        given = next(n for n in ("quantize", "revision", "stream", "base") if getattr(settings, n))
        raise UserError(
            f"--{given}: does not go with --to hf, which writes a local MLX model as diffusers reads it, with whole "
            "layers; leave it out"
        )
    if not source.is_dir():
        raise UserError(f"{source}: no such directory; with --to hf give --hf-path an MLX model directory")
    if not is_converted(source):
        raise UserError(f"{source}: is not an MLX model directory, which --to hf takes; leave --to hf out to make one")
    write_hugging_face(source, target, settings.dtype)
    emit(Saved(target, "model for diffusers"))
    return target


def convert_directory(source: Path, target: Path, precision: Precision, origin: str) -> None:
    """Convert a local directory; the target appears when it is whole. Yields events."""
    if is_encoder(source):
        components, writing = _encoder(source, precision, origin)
    else:
        components, writing = _pipeline(source, precision, origin)
    write_directory(components, writing, precision, target)


def write_directory(components: list[Component], writing: Writing, precision: Precision, target: Path) -> None:
    """Write what was opened; the target appears when it is whole. Raises UserError where there is too little room."""
    check_room(target, sum(write.size_of(component, precision) for component in components))
    notes(components, precision)
    shards = sum(len(write.plan_shards(component, precision)) for component in components)
    with phase("convert", shards, "shards") as track, files.atomic_directory(target) as temporary:
        for done, _ in enumerate(writing(temporary), 1):
            track.step(done)


def _pipeline(source: Path, precision: Precision, origin: str) -> tuple[list[Component], Writing]:
    family = family_of(source).name
    opened = run.open_checkpoint(source, family)

    def writing(target: Path) -> Iterator[tuple[str, str]]:
        return write.write_model(source, target, family, precision, opened, origin)

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
    found = {k: v for component in components for k, v in write.exceptions(component, precision).items()}
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
