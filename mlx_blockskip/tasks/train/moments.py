"""AdamW's moments, a block at a time: in memory, or in files beside each other where the memory budget is small."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx

from mlx_blockskip.engine import files
from mlx_blockskip.engine.reader import BlockReader

BlockMoments = dict[str, dict[str, mx.array]]
"""`{"attn.to_q.lora_a": {"m": array, "v": array}, ...}`, float32."""


class Moments:
    """The moments of every block that has been updated. directory: where they are kept; None for memory.

    What an earlier run left in the directory is removed.
    """

    def __init__(self, directory: Path | None = None):
        self.directory = directory
        self._held: dict[int, BlockMoments] = {}
        self._blocks: set[int] = set()
        if directory is not None:
            shutil.rmtree(directory, ignore_errors=True)

    @property
    def in_memory(self) -> bool:
        return self.directory is None

    @property
    def blocks(self) -> list[int]:
        return sorted(self._blocks)

    def get(self, block: int) -> BlockMoments:
        """A block's moments; empty before its first update."""
        if block not in self._blocks:
            return {}
        if self.directory is None:
            return self._held[block]
        found: BlockMoments = {}
        stored = files.load_lazily(self._file(block))
        mx.eval(stored)
        for key, value in stored.items():
            kind, name = key.split("/", 1)
            found.setdefault(name, {})[kind] = value
        return found

    def put(self, block: int, moments: BlockMoments) -> None:
        self._blocks.add(block)
        if self.directory is None:
            self._held[block] = moments
        else:
            files.save_tensors(self._file(block), flat(moments), durable=False)

    def into_memory(self) -> None:
        """From now on they stay in memory."""
        self._held = {block: self.get(block) for block in self.blocks}
        if self.directory is not None:
            shutil.rmtree(self.directory, ignore_errors=True)
        self.directory = None

    def settle(self, reader: BlockReader, tree: Mapping[int, Mapping[str, mx.array]]) -> None:
        """After the first step it is known what a step takes: where there is room, the moments stay in memory."""
        size, spare = 2 * sum(v.nbytes for factors in tree.values() for v in factors.values()), reader.spare()
        if self.directory is None or (spare is not None and ("body" not in reader.overhead or spare < size)):
            return
        self.into_memory()
        reader.reserve(size)

    def _file(self, block: int) -> Path:
        assert self.directory is not None
        return self.directory / f"{block}.safetensors"


def flat(moments: BlockMoments) -> dict[str, mx.array]:
    """`{"m/attn.to_q.lora_a": array}`."""
    return {f"{kind}/{name}": value for name, both in moments.items() for kind, value in both.items()}
