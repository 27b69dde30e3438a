"""Checkpoints of a run: whole or absent, and enough to end with the same bits as a run that was never stopped."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_blockskip import lora
from mlx_blockskip.engine import files
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.engine.stack import Stack
from mlx_blockskip.tasks.adapters import read_tensors

KEPT = 2


@dataclass
class State:
    """What changes while training. step: optimizer steps done. at_chunk: the adapter as it was at its chunk's start."""

    tree: lora.Tree
    moments: dict[str, dict[str, mx.array]]
    step: int = 0
    updates: int = 0
    skipped: int = 0
    at_chunk: lora.Tree = field(default_factory=dict)


def save(directory: Path, state: State, stack: Stack, settings: dict[str, Any]) -> Path:
    """Write checkpoints/step-000123; the oldest beyond KEPT go."""
    target = directory / "checkpoints" / f"step-{state.step:06d}"
    with files.atomic_directory(target, replace=True) as temporary:
        files.save_tensors(temporary / "adapters.safetensors", lora.flatten(state.tree, stack))
        files.save_tensors(temporary / "chunk_adapters.safetensors", lora.flatten(state.at_chunk, stack))
        flat = {f"{kind}/{name}": value for name, both in state.moments.items() for kind, value in both.items()}
        files.save_tensors(temporary / "moments.safetensors", flat)
        counts = {"step": state.step, "updates": state.updates, "skipped": state.skipped}
        files.write_json(temporary / "state.json", {**counts, "settings": settings})
    for old in found(directory)[:-KEPT]:
        shutil.rmtree(old)
    return target


def found(directory: Path) -> list[Path]:
    """Checkpoints, oldest first."""
    return sorted(p for p in (directory / "checkpoints").glob("step-*") if (p / "state.json").is_file())


def load(path: Path, stack: Stack, settings: dict[str, Any]) -> State:
    """Read a checkpoint. Raises UserError where it was made with other settings, by name."""
    saved = files.read_json(path / "state.json")
    for name, value in saved["settings"].items():
        if settings.get(name) != value:
            raise UserError(
                f"{path}: was made with {name} = {value!r}, and this run has {settings.get(name)!r}; "
                "give the same settings, or another --adapter-path"
            )
    moments: dict[str, dict[str, mx.array]] = {}
    for key, value in read_tensors(path / "moments.safetensors").items():
        kind, name = key.split("/", 1)
        moments.setdefault(name, {})[kind] = value
    trees = [
        lora.unflatten(read_tensors(path / f"{name}.safetensors"), stack, path)
        for name in ("adapters", "chunk_adapters")
    ]
    return State(trees[0], moments, saved["step"], saved["updates"], saved["skipped"], trees[1])
