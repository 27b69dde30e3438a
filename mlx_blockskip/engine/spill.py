"""Samples that wait on disk, where many variants of one state wait at a block and memory does not hold them all."""

from pathlib import Path

import mlx.core as mx

from mlx_blockskip.engine import files
from mlx_blockskip.engine.stack import State, arrays, like
from mlx_blockskip.engine.sweep import Batch


class Spilled(Batch):
    """A batch whose state is in a file. Reading `state` loads it, setting it computes and writes it."""

    def __init__(self, batch: Batch, path: Path):
        self._path = path
        self._empty: State = None
        super().__init__(batch.state, batch.context, batch.modulation, batch.masks)

    @property
    def state(self) -> State:
        held = files.MappedTensors(self._path)
        return like(self._empty, [held.read(str(i)) for i in range(len(arrays(self._empty)))])

    @state.setter
    def state(self, value: State) -> None:
        mx.eval(value)
        files.save_tensors(self._path, {str(i): array for i, array in enumerate(arrays(value))}, durable=False)
        self._empty = like(value, [mx.zeros(0)] * len(arrays(value)))

    def settle(self) -> None:
        """The state was computed when it was set."""
