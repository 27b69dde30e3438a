"""Download from the Hub only what is converted: never a second layout of the same weights."""

import errno
import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_blockskip.converters import vision
from mlx_blockskip.converters.run import load_table, read_components
from mlx_blockskip.converters.source import PICKLED, WEIGHTS, preferred
from mlx_blockskip.engine import files
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.events import Note, emit
from mlx_blockskip.models.registry import find_family

INDEX = "model_index.json"
TOP = (INDEX, "defaults.json", "LICENSE*", "README.md")
CONVERTER = "SFconvertbot"
"""The Hub's account that offers safetensors of pickled weights, as pull requests."""


class UnreachableError(UserError):
    """The Hub gave no answer; what is here already may do."""


def looks_like_repo(name: str) -> bool:
    """Whether the name has the form owner/name, with a revision after @ or without."""
    return re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*(@[\w./-]+)?", name) is not None


def chosen(names: Iterable[str], components: Iterable[str], copied: Iterable[str]) -> list[str]:
    """Of a repo's files, those that are converted.

    components: folders of networks: their config and one variant of their safetensors. copied: folders taken whole.
    """
    names = list(names)
    kept = [name for name in names if "/" not in name and any(fnmatch.fnmatch(name, pattern) for pattern in TOP)]
    kept += [name for folder in copied for name in names if name.startswith(f"{folder}/")]
    for folder in components:
        inside = [name for name in names if name.rpartition("/")[0] == folder]
        weights = preferred(n for n in inside if any(fnmatch.fnmatch(n, f"{folder}/{p}") for p in WEIGHTS))
        kept += [name for name in inside if name in weights or name == f"{folder}/config.json"]
    return kept


def chosen_of_encoder(names: Iterable[str]) -> list[str]:
    """Of an image encoder's repo, the files that are converted: all lie at the top."""
    top = [name for name in names if "/" not in name]
    weights = preferred(name for name in top if any(fnmatch.fnmatch(name, pattern) for pattern in WEIGHTS))
    beside = (*vision.PLAIN, *TOP)
    return [n for n in top if n in weights or any(fnmatch.fnmatch(n, pattern) for pattern in beside)]


@dataclass(frozen=True)
class Layout:
    """A kind of checkpoint. index: the file that says what it is. choose: `(directory with the index, names of the
    repo's files) -> those that are converted`. check: of a directory with the config files alone, whether all of its
    networks are implemented. Both raise UserError where this one is not supported.
    """

    index: str
    what: str
    choose: Callable[[Path, Iterable[str]], list[str]]
    check: Callable[[Path], object]


def _of_pipeline(top: Path, names: Iterable[str]) -> list[str]:
    table = load_table(find_family(files.read_json(top / INDEX)).name)
    return chosen(names, table.FOLDERS, table.COPIED)


def _check_pipeline(top: Path) -> None:
    read_components(top, find_family(files.read_json(top / INDEX)).name)


def _of_encoder(top: Path, names: Iterable[str]) -> list[str]:
    if vision.kind_of(top) is None:
        raise UserError(f"{top / 'config.json'}: has no model_type, so it is not an image encoder; choose another repo")
    return chosen_of_encoder(names)


PIPELINE = Layout(INDEX, "a pipeline in diffusers' layout", _of_pipeline, _check_pipeline)
ENCODER = Layout("config.json", "an image encoder in transformers' layout", _of_encoder, vision.read_components)


def look_up(repo: str, revision: str | None = None) -> Any:
    """The Hub's ModelInfo with file sizes. Raises UserError, its UnreachableError where no answer comes."""
    from huggingface_hub import HfApi

    with _speaking(repo, revision):
        return HfApi().model_info(repo, revision=revision, files_metadata=True)


def in_safetensors(repo: str, info: Any) -> Any:
    """The ModelInfo of the same weights in safetensors, where a repo has pickled files only and the Hub's own
    conversion waits there as a pull request; else `info`.
    """
    from huggingface_hub import HfApi

    names = {file.rfilename for file in info.siblings or []}
    if any(name.endswith(".safetensors") for name in names) or not any(name.endswith(PICKLED) for name in names):
        return info
    with _speaking(repo):
        offers = list(HfApi().get_repo_discussions(repo, author=CONVERTER, discussion_type="pull_request"))
    for offer in offers:
        if offer.git_reference and offer.status != "closed":
            found = look_up(repo, offer.git_reference)
            if any(file.rfilename.endswith(".safetensors") for file in found.siblings or []):
                return found
    return info


def fetch(repo: str, info: Any, layouts: Sequence[Layout] = (PIPELINE,)) -> Path:
    """A local snapshot at `info`'s commit, of a checkpoint in the first of the layouts whose index the repo has.

    Raises UserError with the reason and the way out.
    """
    from huggingface_hub import constants, snapshot_download, try_to_load_from_cache

    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    layout = next((layout for layout in layouts if layout.index in sizes), None)
    if layout is None:
        raise UserError(
            f"{repo}: has no {' and no '.join(layout.index for layout in layouts)}, so it is not "
            f"{' or '.join(layout.what for layout in layouts)}; choose another repo"
        )
    with _speaking(repo, info.sha):
        top = Path(snapshot_download(repo, revision=info.sha, allow_patterns=[layout.index]))
        names = layout.choose(top, sizes)
        if small := [name for name in names if "/" in name and name.endswith("config.json")]:
            snapshot_download(repo, revision=info.sha, allow_patterns=small)
        layout.check(top)  # before the large files are asked for
        missing = [n for n in names if not isinstance(try_to_load_from_cache(repo, n, revision=info.sha), str)]
        size, free = sum(sizes[name] for name in missing), files.free_space(Path(constants.HF_HUB_CACHE))
        if size > free:
            raise UserError(
                f"{repo}: needs {size / 2**30:.1f} GiB and {constants.HF_HUB_CACHE} has {free / 2**30:.1f} GiB free; "
                "free some, or set HF_HOME to another disk"
            )
        if missing:
            emit(Note(f"Downloading {repo} ({size / 2**30:.1f} GiB at most) from the Hub"))
        return Path(snapshot_download(repo, revision=info.sha, allow_patterns=names))


def download(repo: str, revision: str | None = None, layouts: Sequence[Layout] = (PIPELINE,)) -> Path:
    """A local snapshot of a checkpoint; without an answer from the Hub, the one that was downloaded before.

    Raises UserError with the Hub's reason and the way out.
    """
    try:
        info = look_up(repo, revision)
        if revision is None and ENCODER in layouts and INDEX not in {f.rfilename for f in info.siblings or []}:
            info = in_safetensors(repo, info)
    except UnreachableError as error:
        kept = downloaded_before(repo, revision)
        if kept is None:
            raise
        emit(Note(f"{error}; using what was downloaded before: {kept}"))
        return kept
    return fetch(repo, info, layouts)


def downloaded_before(repo: str, revision: str | None = None) -> Path | None:
    """The snapshot in the Hub's own cache, which may lack files; None where there is none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


@contextmanager
def _speaking(repo: str, revision: str | None = None) -> Iterator[None]:
    """Turn the Hub's errors into UserError."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # the HTTP library's own errors: which library that is differs by version of huggingface_hub
    network: tuple[type[Exception], ...] = (OSError, *(b for b in HfHubHTTPError.__bases__ if issubclass(b, Exception)))
    url = f"https://huggingface.co/{repo}"
    try:
        yield
    except HFValidationError as error:
        raise UserError(f"{repo}: no such directory here, and not a repo id ({error}); check the name") from error
    except GatedRepoError as error:
        raise UserError(
            f"{repo}: is gated ({_reason(error)}); accept its licence at {url}, then run `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"{repo}: has no revision {revision}; see {url}/tree/main") from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{repo}: no such directory here, and no such repo on the Hub ({_reason(error)}); "
            "check the name, and for a private repo run `hf auth login`"
        ) from error
    except network as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise UserError(f"{repo}: cannot be stored ({_reason(error)}); set HF_HOME to another disk") from error
        raise UnreachableError(
            f"{repo}: the Hub could not be reached ({_reason(error)}); try again when online"
        ) from error


def _reason(error: Exception) -> str:
    return " ".join(str(getattr(error, "server_message", None) or error).split())[:200]
