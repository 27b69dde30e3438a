"""What a directory is: an MLX model directory, an image encoder, or a pipeline of some family."""

from pathlib import Path

from mlx_blockskip.converters import vision
from mlx_blockskip.engine import files
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.models.family import Family
from mlx_blockskip.models.registry import find_family


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
