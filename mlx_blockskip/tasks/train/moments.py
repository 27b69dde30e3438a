"""AdamW's moments, a block at a time: in memory, or in files beside each other where the memory budget is small. What
else waits in a step, the inputs of blocks and the gradients, is where the moments are.
"""

from collections.abc import Mapping, MutableMapping
from pathlib import Path

import mlx.core as mx

from mlx_blockskip.engine.reader import BlockReader
from mlx_blockskip.engine.spill import Trees

BlockMoments = dict[str, dict[str, mx.array]]
"""`{"attn.to_q.lora_a": {"m": array, "v": array}, ...}`, float32."""


class Moments:
    """The moments of every block that has been updated. directory: where they are kept; None for memory.

    What an earlier run left in the directory is removed.
    """

    def __init__(self, directory: Path | None = None):
        self._trees: MutableMapping[int, dict[str, mx.array]] = {} if directory is None else Trees(directory)

    @property
    def directory(self) -> Path | None:
        """Where they are kept; None for memory."""
        return self._trees.directory if isinstance(self._trees, Trees) else None

    @property
    def in_memory(self) -> bool:
        return self.directory is None

    @property
    def blocks(self) -> list[int]:
        return sorted(self._trees)

    def get(self, block: int) -> BlockMoments:
        """A block's moments; empty before its first update."""
        found: BlockMoments = {}
        for key, value in self._trees.get(block, {}).items():
            kind, name = key.split("/", 1)
            found.setdefault(name, {})[kind] = value
        return found

    def put(self, block: int, moments: BlockMoments) -> None:
        self._trees[block] = flat(moments)

    def into_memory(self) -> None:
        """From now on they stay in memory."""
        held = dict(self._trees)
        self._trees.clear()
        self._trees = held

    def settle(self, reader: BlockReader, tree: Mapping[int, Mapping[str, mx.array]], inputs: int) -> None:
        """After the first step it is known what a step takes: where there is room, the moments stay in memory, and with
        them the gradients and the inputs of blocks (bytes).
        """
        size, spare = inputs + 3 * sum(v.nbytes for factors in tree.values() for v in factors.values()), reader.spare()
        if self.in_memory or (spare is not None and ("body" not in reader.overhead or spare < size)):
            return
        self.into_memory()
        reader.reserve(size)


def flat(moments: BlockMoments) -> dict[str, mx.array]:
    """`{"m/attn.to_q.lora_a": array}`."""
    return {f"{kind}/{name}": value for name, both in moments.items() for kind, value in both.items()}
