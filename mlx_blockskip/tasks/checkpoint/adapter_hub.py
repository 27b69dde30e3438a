"""Adapters on the Hub: `owner/name`, `owner/name/file.safetensors`, or the address of either."""

import re
from collections.abc import Collection
from pathlib import Path

from mlx_blockskip.converters.source import PICKLED
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.events import Note, emit
from mlx_blockskip.tasks.checkpoint import hub, hub_cache
from mlx_blockskip.tasks.checkpoint.adapter_names import CONFIG, PEFT_FILE, PEFT_TENSORS, SUFFIXES, TENSORS
from mlx_blockskip.tasks.checkpoint.address import Repo, repo_named
from mlx_blockskip.tasks.checkpoint.hub_errors import UnreachableError
from mlx_blockskip.tasks.checkpoint.transfer import transfer


def fetched(text: str) -> Path | None:
    """The file or directory in the Hub's cache of what `text` names, downloaded if it is not there; None where it names
    no repo. Without an answer from the Hub, what was downloaded before. Raises UserError.
    """
    repo, file = named(text)
    if repo is None:
        return None
    try:
        info = hub.look_up(repo)
    except UnreachableError as error:
        for top in hub_cache.snapshots(repo):
            if (names := chosen(repo, hub_cache.names_in(top), file, complain=False)) is not None:
                emit(Note(f"{error}; using what was downloaded before: {top}"))
                return _place(top, names)
        raise
    sizes = {one.rfilename: one.size or 0 for one in info.siblings or []}
    names = chosen(repo, sizes, file) or []
    top = hub_cache.snapshot(repo.name, info.sha)
    if absent := {name: sizes[name] for name in names if not (top / name).exists()}:
        transfer(repo.name, info.sha, absent)
    hub_cache.record(repo, info.sha)
    return _place(top, names)


def named(text: str) -> tuple[Repo | None, str | None]:
    """The repo that `text` names, and the file in it where it names one."""
    address = re.fullmatch(r"(.+/(?:blob|resolve)/[^/]+)/(.+\.(?:safetensors|sft))(?:\?.*)?", text)
    plain = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*(?:@[\w.-]+)?)/(.+\.(?:safetensors|sft))", text)
    match = address or plain
    return (repo_named(match[1]), match[2]) if match else (repo_named(text), None)


def chosen(repo: Repo, names: Collection[str], file: str | None, complain: bool = True) -> list[str] | None:
    """The files of a repo that are its adapter, its config first. Raises UserError where there is none, or which is
    meant cannot be told; without `complain` it returns None then.
    """
    found, reason = _chosen(names, file)
    if found is None and complain:
        raise UserError(f"{repo.name}: {reason}")
    return found


def _chosen(names: Collection[str], file: str | None) -> tuple[list[str] | None, str]:
    if file is not None:
        beside = f"{file.rpartition('/')[0]}/{CONFIG}".lstrip("/")
        described = file.rpartition("/")[2] in (TENSORS, PEFT_TENSORS) and beside in names
        return ([beside, file] if described else [file]) if file in names else None, f"has no file {file}"
    for known in (TENSORS, PEFT_TENSORS):
        if CONFIG in names and known in names:
            return [CONFIG, known], ""
    if hub.INDEX in names:
        return None, "is a whole model and no adapter; give it with --model"
    weights = [name for name in names if name.endswith(SUFFIXES)]
    if PEFT_FILE in weights or len(weights) == 1:
        return [PEFT_FILE if PEFT_FILE in weights else weights[0]], ""
    if weights:
        return (
            None,
            f"has several LoRA files ({', '.join(sorted(weights))}); add the name of one: owner/name/{weights[0]}",
        )
    pickled = any(name.endswith(PICKLED) for name in names)
    return None, f"has {'only pickled files and ' if pickled else ''}no safetensors file; choose another repo"


def _place(top: Path, names: list[str]) -> Path:
    """A directory where a config is beside the tensors, else the file."""
    return (top / names[0]).parent if len(names) == 2 else top / names[0]
