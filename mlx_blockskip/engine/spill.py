"""What waits on disk where memory does not hold it: samples at a block, inputs of blocks, trees of blocks. Scratch, in
files that no later run reads.
"""

import shutil
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path

import mlx.core as mx

from mlx_blockskip.engine import files
from mlx_blockskip.engine.stack import State, arrays, like
from mlx_blockskip.engine.sweep import Batch, Hold


def written(path: Path, state: State) -> Callable[[], State]:
    """Compute a state and write it; what is returned reads it."""
    files.save_tensors(path, {str(i): array for i, array in enumerate(arrays(state))}, durable=False)
    empty = like(state, [mx.zeros(0)] * len(arrays(state)))

    def read() -> State:
        held = files.MappedTensors(path)
        return like(empty, [held.read(str(i)) for i in range(len(arrays(empty)))])

    return read


def hold_in(directory: Path) -> Hold:
    """Inputs of blocks wait in files of this directory, which go when they have been read."""

    def hold(place: int, batch: int, state: State) -> Callable[[], State]:
        path = directory / f"{place}-{batch}.safetensors"
        read = written(path, state)

        def take() -> State:
            found = read()
            path.unlink()
            return found

        return take

    return hold


class Spilled(Batch):
    """A batch whose state is in a file. Reading `state` loads it, setting it computes and writes it."""

    def __init__(self, batch: Batch, path: Path):
        self._path = path
        super().__init__(batch.state, batch.context, batch.modulation, batch.masks)

    @property
    def state(self) -> State:
        return self._read()

    @state.setter
    def state(self, value: State) -> None:
        self._read = written(self._path, value)

    def settle(self) -> None:
        """The state was computed when it was set."""


class Trees(MutableMapping[int, dict[str, mx.array]]):
    """Trees of arrays by block, each in a file of the directory; what an earlier run left there is removed."""

    def __init__(self, directory: Path):
        self.directory = directory
        self._blocks: dict[int, None] = {}
        shutil.rmtree(directory, ignore_errors=True)

    def __getitem__(self, block: int) -> dict[str, mx.array]:
        if block not in self._blocks:
            raise KeyError(block)
        found = files.load_lazily(self._file(block))
        mx.eval(found)
        return found

    def __setitem__(self, block: int, tree: dict[str, mx.array]) -> None:
        files.save_tensors(self._file(block), tree, durable=False)
        self._blocks[block] = None

    def __delitem__(self, block: int) -> None:
        del self._blocks[block]
        self._file(block).unlink()

    def __iter__(self) -> Iterator[int]:
        return iter(self._blocks)

    def __len__(self) -> int:
        return len(self._blocks)

    def clear(self) -> None:
        self._blocks.clear()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _file(self, block: int) -> Path:
        return self.directory / f"{block}.safetensors"
