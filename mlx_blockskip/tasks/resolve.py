"""From what a user calls a model to an MLX model directory: converted once, into the user's cache directory."""

import hashlib
import os
import re
import sys
from collections.abc import Generator
from importlib import resources
from pathlib import Path

from mlx_blockskip.converters.run import Precision, default_dtype
from mlx_blockskip.engine import files
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.events import Event, Note
from mlx_blockskip.models.family import DiffusionModel
from mlx_blockskip.models.registry import open_model
from mlx_blockskip.tasks.convert import convert_directory
from mlx_blockskip.tasks.hub import download, looks_like_repo

BUNDLED = ("tiny-flux",)


def cache_directory() -> Path:
    """Where converted models are kept: MLX_BLOCKSKIP_CACHE, else the platform's place for caches."""
    if own := os.environ.get("MLX_BLOCKSKIP_CACHE"):
        return Path(own)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "mlx-blockskip"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlx-blockskip"


def resolve(model: str) -> Generator[Event, None, Path]:
    """The MLX model directory that `model` names: a directory of either layout, a repo id, or a bundled model.

    Raises UserError where there is none.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if (path / "model_index.json").is_file() and not _is_mlx(path):
            return (yield from _converted(path, model))
        return path
    if model in BUNDLED:
        return (yield from _converted(Path(str(resources.files("mlx_blockskip") / "assets" / model)), model))
    if looks_like_repo(model):
        repo, _, revision = model.partition("@")
        return (yield from _converted((yield from download(repo, revision or None)), model))
    raise UserError(f"{model}: no such model; give a directory, a repo id such as owner/name, or {', '.join(BUNDLED)}")


def open_named(model: str, budget: int | None) -> Generator[Event, None, DiffusionModel]:
    """Resolve and open a model."""
    return open_model((yield from resolve(model)), budget)


def load(model: str = "tiny-flux", memory_budget: int | None = None) -> DiffusionModel:
    """Open a model for use from Python; what has to be converted first is converted silently."""
    task = open_named(model, memory_budget)
    while True:
        try:
            next(task)
        except StopIteration as done:
            return done.value


def _is_mlx(path: Path) -> bool:
    config = path / "config.json"
    return config.is_file() and "format" in files.read_json(config)


def _converted(source: Path, name: str) -> Generator[Event, None, Path]:
    """The converted copy of a Hugging Face directory, made now if it is not there."""
    dtype = default_dtype()
    short = re.sub(r"[^A-Za-z0-9._-]+", "-", name.strip("/").split("/")[-1])
    target = cache_directory() / f"{short}-{dtype}-{_stamp(source)[:12]}"
    if _is_mlx(target):
        return target
    with files.lock(target.with_suffix(".lock")):
        if _is_mlx(target):
            return target
        yield Note(f"Converting {name} to {dtype} once, into {target}")
        yield from convert_directory(source, target, Precision(dtype), name)
    return target


def _stamp(source: Path) -> str:
    """Changes when a file of the checkpoint does."""
    state = hashlib.sha256(str(source.resolve()).encode())
    for path in sorted(source.rglob("*")):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(source).parts):
            status = path.stat()
            state.update(f"{path.relative_to(source)} {status.st_size} {status.st_mtime_ns}".encode())
    return state.hexdigest()
