"""From what a user calls a model to an MLX model directory: converted once, into the user's cache directory."""

import difflib
import hashlib
import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from mlx_blockskip.converters.places import checkpoint_folder
from mlx_blockskip.converters.write import Precision, default_dtype
from mlx_blockskip.engine import files, limits, parsed
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.events import Note, emit
from mlx_blockskip.models.family import DiffusionModel
from mlx_blockskip.models.registry import open_model
from mlx_blockskip.tasks.alone import alone
from mlx_blockskip.tasks.checkpoint import hub
from mlx_blockskip.tasks.checkpoint.address import Repo, repo_named
from mlx_blockskip.tasks.checkpoint.convert import ENCODER_DTYPE, convert_directory
from mlx_blockskip.tasks.checkpoint.recognise import is_converted, is_encoder
from mlx_blockskip.tasks.targets import check_writable

BUNDLED = ("tiny-flux", "tiny-sana")

BUNDLED_DTYPE = "float32"
"""What bundled models are stored in on every device: their tables and plans were made so, and they are small."""


COMMITS = "commits.json"
"""In the cache directory: which commit the branches of repos led to when the Hub was last asked."""


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
            return _converted(lambda target: path, path, kind)
        return path
    if model in kind.bundled:
        return _converted(lambda target: bundled(model), model, kind)
    if path.is_file():
        raise UserError(f"{model}: is a file; make a model of it with `mlx-blockskip convert --hf-path {model}`")
    if (repo := repo_named(model)) is not None:
        return _from_hub(repo, kind)
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


def _from_hub(repo: Repo, kind: Kind) -> Path:
    """A repo is converted once a commit, however it is called, and then needs neither its download nor the Hub."""
    try:
        place, info = hub.found(repo, (kind.layout,))
    except hub.UnreachableError as error:
        if (kept := converted_before(repo, kind)) is not None:
            emit(Note(f"{error}; using what was converted before: {kept}"))
            return kept
        if (source := hub.downloaded_before(repo, (kind.layout,))) is None:
            raise
        emit(Note(f"{error}; using what was downloaded before: {source}"))
        _note(repo, source.name)
        return _converted(lambda target: source, Repo(repo.name, source.name), kind)
    _note(repo, info.sha)

    def fetched(target: Path) -> Path:
        return hub.fetch(place, info, (kind.layout,), hub.ANY, target)

    return _converted(fetched, Repo(repo.name, info.sha), kind)


def known_commits() -> dict[str, str]:
    """Where the branches and tags of repos led when the Hub was last asked: commits by `owner/name@branch`."""
    path = cache_directory() / COMMITS
    try:
        found = parsed.parse(path.read_bytes())
    except (OSError, ValueError):  # it is asked again
        return {}
    return found if isinstance(found, dict) else {}


def _note(repo: Repo, commit: str) -> None:
    known, key = known_commits(), f"{repo.name}@{repo.branch}"
    if repo.commit is None and known.get(key) != commit:
        files.write_json(cache_directory() / COMMITS, {**known, key: commit})


def converted_before(repo: Repo, kind: Kind) -> Path | None:
    """The conversion of this repo's revision in the cache, as it was when the Hub was last asked."""
    commit = repo.commit or known_commits().get(f"{repo.name}@{repo.branch}")
    if commit is None:
        return None
    target = _target(Repo(repo.name, commit), kind)
    return target if is_converted(target) else None


def _target(source: Repo | Path | str, kind: Kind) -> Path:
    """Where the conversion of a commit, a directory or a bundled model is kept."""
    if isinstance(source, Repo):
        name, key = source.name, hashlib.sha256(f"{source.name} {source.revision}".encode()).hexdigest()
    else:
        name, key = str(source), _stamp(bundled(source) if isinstance(source, str) else source)
    short = re.sub(r"[^A-Za-z0-9._-]+", "-", name.rstrip("/").split("/")[-1])
    return cache_directory() / f"{short}-{kind.dtype_of(name)}-{key[:12]}"


def _converted(source: Callable[[Path], Path], name: Repo | Path | str, kind: Kind) -> Path:
    """The converted copy of a checkpoint, made now if it is not there; only then is `source` asked where it lies, by
    where the copy will be.
    """
    target = _target(name, kind)
    if is_converted(target):
        with suppress(OSError):  # a disk that is read only
            os.utime(target)  # when it was last used, for `cache`
        return target
    check_writable(target, "the cache of converted models (MLX_BLOCKSKIP_CACHE):")
    with alone(target.with_name(f"{target.name}.lock"), kept=True):
        if is_converted(target):
            return target
        path, dtype = source(target), kind.dtype_of(str(name))
        emit(Note(f"Converting {name} to {dtype} once, into {target}"))
        convert_directory(path, target, Precision(dtype), str(name))
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
