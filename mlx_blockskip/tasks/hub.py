"""Download from the Hub only what is converted: never a second layout of the same weights."""

import errno
import fnmatch
import re
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlx_blockskip.converters.run import load_table
from mlx_blockskip.converters.source import WEIGHTS, preferred
from mlx_blockskip.engine import files
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.events import Event, Note
from mlx_blockskip.models.registry import find_family

INDEX = "model_index.json"
TOP = (INDEX, "defaults.json", "LICENSE*", "README.md")


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


def look_up(repo: str, revision: str | None = None) -> Any:
    """The Hub's ModelInfo with file sizes. Raises UserError, its UnreachableError where no answer comes."""
    from huggingface_hub import HfApi

    with _speaking(repo, revision):
        return HfApi().model_info(repo, revision=revision, files_metadata=True)


def fetch(repo: str, info: Any) -> Generator[Event, None, Path]:
    """A local snapshot of a pipeline at `info`'s commit. Raises UserError with the reason and the way out."""
    from huggingface_hub import constants, snapshot_download, try_to_load_from_cache

    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    if INDEX not in sizes:
        raise UserError(f"{repo}: has no {INDEX}, so it is not a pipeline in diffusers' layout; choose another repo")
    with _speaking(repo, info.sha):
        top = Path(snapshot_download(repo, revision=info.sha, allow_patterns=[INDEX]))
        table = load_table(find_family(files.read_json(top / INDEX)).name)  # before the large files are asked for
        names = chosen(sizes, table.FOLDERS, table.COPIED)
        missing = [n for n in names if not isinstance(try_to_load_from_cache(repo, n, revision=info.sha), str)]
        size, free = sum(sizes[name] for name in missing), files.free_space(Path(constants.HF_HUB_CACHE))
        if size > free:
            raise UserError(
                f"{repo}: needs {size / 2**30:.1f} GiB and {constants.HF_HUB_CACHE} has {free / 2**30:.1f} GiB free; "
                "free some, or set HF_HOME to another disk"
            )
        if missing:
            yield Note(f"Downloading {repo} ({size / 2**30:.1f} GiB at most) from the Hub")
        return Path(snapshot_download(repo, revision=info.sha, allow_patterns=names))


def download(repo: str, revision: str | None = None) -> Generator[Event, None, Path]:
    """A local snapshot of a pipeline; without an answer from the Hub, the one that was downloaded before.

    Raises UserError with the Hub's reason and the way out.
    """
    try:
        info = look_up(repo, revision)
    except UnreachableError as error:
        kept = downloaded_before(repo, revision)
        if kept is None:
            raise
        yield Note(f"{error}; using what was downloaded before: {kept}")
        return kept
    return (yield from fetch(repo, info))


def downloaded_before(repo: str, revision: str | None = None) -> Path | None:
    """The snapshot in the Hub's own cache, which may lack files; None where there is none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


@contextmanager
def _speaking(repo: str, revision: str | None) -> Iterator[None]:
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
