"""From what a user calls a model to an MLX model directory: converted once, into the user's cache directory."""

import difflib
import glob
import hashlib
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from mlx_blockskip.converters.places import checkpoint_folder
from mlx_blockskip.converters.write import Precision, default_dtype
from mlx_blockskip.engine import files, limits
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.events import Note, emit
from mlx_blockskip.models.family import DiffusionModel
from mlx_blockskip.models.registry import open_model
from mlx_blockskip.tasks.alone import alone
from mlx_blockskip.tasks.checkpoint import hub
from mlx_blockskip.tasks.checkpoint.convert import ENCODER_DTYPE, convert_directory
from mlx_blockskip.tasks.checkpoint.recognise import is_converted, is_encoder

BUNDLED = ("tiny-flux", "tiny-sana")

BUNDLED_DTYPE = "float32"
"""What bundled models are stored in on every device: their tables and plans were made so, and they are small."""


@dataclass(frozen=True)
class Kind:
    """What is looked for under a name. bundled: what of this kind is in the package. is_checkpoint: whether a
    directory is one in Hugging Face layout. dtype: what another one than these is converted to.
    """

    what: str
    bundled: tuple[str, ...]
    layout: hub.Layout
    is_checkpoint: Callable[[Path], bool]
    dtype: Callable[[], str]

    def dtype_of(self, model: str) -> str:
        """What the model of this name is converted to."""
        return BUNDLED_DTYPE if model in self.bundled and not Path(model).is_dir() else self.dtype()


MODEL = Kind("model", BUNDLED, hub.PIPELINE, lambda path: (path / "model_index.json").is_file(), default_dtype)
ENCODER = Kind("encoder", ("tiny-dino", "tiny-clip"), hub.ENCODER, is_encoder, lambda: ENCODER_DTYPE)


def cache_directory() -> Path:
    """Where converted models are kept: MLX_BLOCKSKIP_CACHE, else the platform's place for caches."""
    if own := os.environ.get("MLX_BLOCKSKIP_CACHE"):
        return Path(own)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "mlx-blockskip"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlx-blockskip"


def resolve(model: str, kind: Kind = MODEL) -> Path:
    """The MLX directory that `model` names: a directory of either layout, a repo id, or what is in the package.

    Raises UserError where there is none.
    """
    path = checkpoint_folder(Path(model).expanduser())
    if path.is_dir():
        if not is_converted(path) and kind.is_checkpoint(path):
            return _converted(lambda: path, model, _stamp(path), kind)
        return path
    if model in kind.bundled:
        source = bundled(model)
        return _converted(lambda: source, model, _stamp(source), kind)
    if path.is_file():
        raise UserError(f"{model}: is a file; make a model of it with `mlx-blockskip convert --hf-path {model}`")
    if hub.looks_like_repo(model):
        return _from_hub(model, kind)
    raise UserError(
        f"{model}: no such {kind.what}; give a directory, a repo id such as owner/name, or {', '.join(kind.bundled)}"
        + _similar(path, model, kind)
    )


def bundled(model: str) -> Path:
    """The checkpoint of a model in the package, in Hugging Face layout."""
    return Path(str(resources.files("mlx_blockskip") / "assets" / model))


def open_named(model: str, budget: int | None) -> DiffusionModel:
    """Resolve and open a model. From then on MLX keeps to the budget (bytes; None for any). A transformer that takes
    less than half of it stays in memory.
    """
    limits.bound(budget)
    opened = open_model(resolve(model), budget)
    if budget and 2 * opened.reader.shards.nbytes(opened.reader.shards.names) <= budget:
        opened.reader.budget = None
    return opened


def _from_hub(model: str, kind: Kind) -> Path:
    """A repo is converted once a commit, and then needs neither its download nor the Hub."""
    repo, _, revision = model.partition("@")
    try:
        info = hub.look_up(repo, revision or None)
        if kind is ENCODER and not revision:
            info = hub.in_safetensors(repo, info)
    except hub.UnreachableError as error:
        if (kept := _converted_before(model, kind)) is not None:
            emit(Note(f"{error}; using what was converted before: {kept}"))
            return kept
        if (source := hub.downloaded_before(repo, revision or None)) is None:
            raise
        emit(Note(f"{error}; using what was downloaded before: {source}"))
        return _converted(lambda: source, model, _repo_key(repo, source.name), kind)
    return _converted(lambda: hub.fetch(repo, info, (kind.layout,)), model, _repo_key(repo, info.sha), kind)


def _repo_key(repo: str, commit: str) -> str:
    return hashlib.sha256(f"{repo} {commit}".encode()).hexdigest()


def _converted_before(model: str, kind: Kind) -> Path | None:
    """The newest conversion of this model in the cache."""
    found = [
        path.parent
        for path in cache_directory().glob("[!.]*/config.json")
        if (config := files.read_json(path)).get("source") == model and config.get("dtype") == kind.dtype_of(model)
    ]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def _converted(source: Callable[[], Path], name: str, key: str, kind: Kind) -> Path:
    """The converted copy of a checkpoint, made now if it is not there; only then is `source` asked where it lies."""
    dtype = kind.dtype_of(name)
    short = re.sub(r"[^A-Za-z0-9._-]+", "-", name.rstrip("/").split("/")[-1])
    target = cache_directory() / f"{short}-{dtype}-{key[:12]}"
    if is_converted(target):
        return target
    with alone(target.with_name(f"{target.name}.lock")):
        if is_converted(target):
            return target
        for leftover in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):  # of a process that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        path = source()
        emit(Note(f"Converting {name} to {dtype} once, into {target}"))
        convert_directory(path, target, Precision(dtype), name)
    return target


def _similar(path: Path, model: str, kind: Kind) -> str:
    """A hint for a name that is nearly right."""
    beside = [str(path.with_name(p.name)) for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(str(path), beside, 1, 0.8) or difflib.get_close_matches(
        model, kind.bundled, 1, 0.7
    )
    return f"; did you mean {close[0]}?" if close else ""


def _stamp(source: Path) -> str:
    """Changes when a file of the checkpoint does."""
    state = hashlib.sha256(str(source.resolve()).encode())
    for path in sorted(source.rglob("*")):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(source).parts):
            status = path.stat()
            state.update(f"{path.relative_to(source)} {status.st_size} {status.st_mtime_ns}".encode())
    return state.hexdigest()
