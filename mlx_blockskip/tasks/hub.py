"""Download from the Hub only what is converted: never a second layout of the same weights."""

import fnmatch
import re
from collections.abc import Generator
from pathlib import Path
from typing import Any

from mlx_blockskip.engine import files
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.events import Event, Note

PATTERNS = [
    *("model_index.json", "defaults.json", "LICENSE*", "README.md", "*/config.json", "*/*.safetensors.index.json"),
    *("*/*.safetensors", "tokenizer*/*", "scheduler/*"),
]
IGNORED = [
    "*.bin",
    "*.fp16.*",
    "*.bf16.*",
    "*.non_ema.*",
    "*.onnx*",
    "*.msgpack",
    "safety_checker/*",
    "feature_extractor/*",
]


def looks_like_repo(name: str) -> bool:
    """Whether the name has the form owner/name, with a revision after @ or without."""
    return re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*(@[\w./-]+)?", name) is not None


def wanted(file: str) -> bool:
    """Whether a file of a repo is downloaded."""
    kept = any(fnmatch.fnmatch(file, p) and file.count("/") == p.count("/") for p in PATTERNS)
    return kept and not any(fnmatch.fnmatch(file, p) for p in IGNORED)


def download(repo: str, revision: str | None = None) -> Generator[Event, None, Path]:
    """A local snapshot of a pipeline. Raises UserError with the Hub's reason and the way out."""
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    url = f"https://huggingface.co/{repo}"
    try:
        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
        size = _to_fetch(info)
        free = files.free_space(Path(constants.HF_HUB_CACHE))
        if size > free:
            raise UserError(
                f"{repo}: needs {size / 2**30:.1f} GiB and {constants.HF_HUB_CACHE} has {free / 2**30:.1f} GiB free; "
                "free some, or set HF_HOME to another disk"
            )
        yield Note(f"Downloading {repo} ({size / 2**30:.1f} GiB at most) from the Hub")
        names = [f.rfilename for f in info.siblings or [] if wanted(f.rfilename)]
        return Path(snapshot_download(repo, revision=info.sha, allow_patterns=names))
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
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(f"{repo}: the Hub could not be reached ({_reason(error)}); try again when online") from error


def _to_fetch(info: Any) -> int:
    return sum(file.size or 0 for file in info.siblings or [] if wanted(file.rfilename))


def _reason(error: Exception) -> str:
    return " ".join(str(getattr(error, "server_message", None) or error).split())[:200]
