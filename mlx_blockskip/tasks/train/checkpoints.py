"""Checkpoints of a run: whole or absent, and enough to end with the same bits as a run that was never stopped."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_blockskip import lora
from mlx_blockskip.engine import files, owned, sealed
from mlx_blockskip.engine.errors import DamagedError, UserError
from mlx_blockskip.engine.interrupt import deferred
from mlx_blockskip.engine.stack import Stack
from mlx_blockskip.tasks.checkpoint.adapters import read_tensors
from mlx_blockskip.tasks.targets import free
from mlx_blockskip.tasks.train.moments import BlockMoments, Moments

KEPT = 2
STATE = "state.json"
SUMS = "sha256"
"""Where its checksums are in it."""

FILES = ("adapters.safetensors", "chunk_adapters.safetensors", "moments.safetensors", STATE)
"""What a checkpoint holds."""

NAME = "step-[0-9][0-9][0-9][0-9][0-9][0-9]"
WAY_OUT = "the run goes on from the checkpoint before"


@dataclass
class State:
    """What changes while training. step: optimizer steps done. at_chunk: the adapter as it was at its chunk's start,
    where residuals are fresh. whole: False while a step is being written into it, and where that was broken off.
    """

    tree: lora.Tree
    moments: Moments = field(default_factory=Moments)
    step: int = 0
    updates: int = 0
    skipped: int = 0
    at_chunk: lora.Tree = field(default_factory=dict)
    whole: bool = True

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """Around all that a step writes into the state: a Ctrl-C waits. All of it is computed when this ends well."""
        with deferred():
            self.whole = False
            yield
            mx.synchronize()  # what the device could not do is raised here
            self.whole = True


@contextmanager
def set_aside(state: State, path: Path) -> Iterator[None]:
    """Inside, the factors are in a file and not in memory; nothing asks for them there."""
    stored = {f"{block}/{name}": value for block, tree in state.tree.items() for name, value in tree.items()}
    files.save_tensors(path, stored, durable=False)
    state.tree = {}
    try:
        stored.clear()
        yield
    finally:
        tree: dict[int, dict[str, mx.array]] = {}
        read = files.MappedTensors(path)
        for key in read.header.entries:
            block, name = key.split("/", 1)
            tree.setdefault(int(block), {})[name] = read.read(key)
        state.tree = tree
        path.unlink()


def save(directory: Path, state: State, stack: Stack, settings: dict[str, Any]) -> Path:
    """Write checkpoints/step-000123; the oldest beyond KEPT go."""
    target = directory / "checkpoints" / f"step-{state.step:06d}"
    with files.atomic_directory(target, replace=True) as temporary:
        sums = {
            f"{name}.safetensors": files.save_tensors(
                temporary / f"{name}.safetensors", lora.flatten(tree, stack), hashed=True
            )
            for name, tree in (("adapters", state.tree), ("chunk_adapters", state.at_chunk))
        }
        sums["moments.safetensors"] = _save_moments(temporary / "moments.safetensors", state)
        counts = {"step": state.step, "updates": state.updates, "skipped": state.skipped}
        files.write_json(temporary / STATE, sealed.seal({**counts, "settings": settings, SUMS: sums}))
    for old in found(directory)[:-KEPT]:
        remove(old)
    return target


def set_apart(path: Path) -> Path:
    """Give a checkpoint that is damaged another name, under which no run looks for it; nothing of it is lost."""
    return path.rename(free(path.with_name(f"{path.name}.damaged")))


def remove(path: Path) -> None:
    """Remove a checkpoint; the directory stays where a user has put something into it."""
    (path / STATE).unlink(missing_ok=True)  # what is left of it after a kill is no checkpoint
    owned.remove(path, FILES)


def _save_moments(path: Path, state: State) -> str:
    """`m/3/attn.to_q.lora_a`, written block by block. Returns the file's checksum."""
    entries = [
        files.TensorEntry(f"{kind}/{block}/{name}", tuple(value.shape), "F32")
        for block in state.moments.blocks
        for name, value in state.tree[block].items()
        for kind in ("m", "v")
    ]
    with files.SafetensorsWriter(path, entries, hashed=True) as writer:
        for block in state.moments.blocks:
            for name, both in state.moments.get(block).items():
                for kind, value in both.items():
                    writer.write(f"{kind}/{block}/{name}", value)
    return writer.checksum


def _load_moments(path: Path, moments: Moments) -> None:
    """Read block by block."""
    stored = files.MappedTensors(path)
    names = [key.split("/", 2) for key in stored.header.entries]
    for block in sorted({int(block) for _, block, _ in names}):
        found: BlockMoments = {}
        for kind, owner, name in names:
            if int(owner) == block:
                found.setdefault(name, {})[kind] = stored.read(f"{kind}/{owner}/{name}")
        moments.put(block, found)


def found(directory: Path) -> list[Path]:
    """Checkpoints, oldest first."""
    return sorted(p for p in (directory / "checkpoints").glob(NAME) if (p / STATE).is_file())


def step_of(path: Path) -> int:
    """The steps that were done in a checkpoint, by its name."""
    return int(path.name.rpartition("-")[2])


def load(path: Path, stack: Stack, settings: dict[str, Any], moments: Moments) -> State:
    """Read a checkpoint, its moments into `moments`.

    Raises UserError where it was made with other settings, by name, and DamagedError where it is not what was written.
    """
    saved = _state(path)
    for name, value in saved["settings"].items():
        if settings.get(name) != value:
            raise UserError(
                f"{path}: was made with {name} = {value!r}, and this run has {settings.get(name)!r}; "
                "give the same settings, or another --adapter-path"
            )
    for name, checksum in saved.get(SUMS, {}).items():
        sealed.check(path / name, checksum, WAY_OUT)
    _load_moments(path / "moments.safetensors", moments)
    trees = [
        lora.unflatten(read_tensors(path / f"{name}.safetensors"), stack, path)
        for name in ("adapters", "chunk_adapters")
    ]
    return State(trees[0], moments, saved["step"], saved["updates"], saved["skipped"], trees[1])


def _state(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself; one of an older version has no checksums. Raises DamagedError."""
    try:
        found = files.read_json(path / STATE)
        found = sealed.opened(path / STATE, found, WAY_OUT, required=SUMS in found)
    except UserError as error:
        raise DamagedError(str(error)) from None
    if absent := {"settings", "step", "updates", "skipped"} - found.keys():
        raise DamagedError(f"{path / STATE}: has no {min(absent)}; {WAY_OUT}")
    return found
