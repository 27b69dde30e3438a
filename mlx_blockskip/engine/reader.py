"""Hands out the weights of a stack's blocks in the order of a walk: read ahead in a thread, kept where the budget
allows.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import accumulate
from threading import Condition
from typing import Literal

import mlx.core as mx

from mlx_blockskip.engine import limits, memory
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.engine.shards import Shards
from mlx_blockskip.engine.stack import Stack

Part = Literal["all", "body", "modulation"]
Work = tuple[Part, str, bool]
"""A part of the weights, a kind of block, and whether the walk meets the block again, on its way back."""


class Prefetch:
    """What may be read ahead while a block is at work. Reading waits for room, or for the block at work to be done."""

    def __init__(self) -> None:
        self.at_work = False
        self.room: int | None = None  # bytes beside the block at work; None for any number
        self.ahead = 0
        self.cancelled = False
        self._changed = Condition()

    def take(self, sizes: Sequence[int]) -> int:
        """Wait until the first of these tensors (bytes) may be read ahead, and take room for as many as fit, in order.

        Returns their number. Raises CancelledError where the walk was left.
        """
        with self._changed:
            self._changed.wait_for(lambda: self.cancelled or self._fits(sizes[0]))
            if self.cancelled:
                raise CancelledError
            count = sum(self._fits(size) for size in accumulate(sizes))
            self.ahead += sum(sizes[:count])
            return count

    def begin(self, room: int | None) -> None:
        """A block goes to work, and nothing is read ahead yet."""
        with self._changed:
            self.at_work, self.room, self.ahead = True, room, 0

    def done(self) -> None:
        """The block at work was let go of."""
        with self._changed:
            self.at_work = False
            self._changed.notify()

    def cancel(self) -> None:
        """Nobody waits for the next block any more."""
        with self._changed:
            self.cancelled = True
            self._changed.notify()

    def _fits(self, size: int) -> bool:
        return not self.at_work or self.room is None or self.ahead + size <= self.room


class BlockReader:
    """Hands out the weights of blocks in the order of a walk.

    budget: bytes of MLX memory for all there is; None keeps every block. The first block of a kind works alone, and
    what its work takes is measured. From then on comes first the block at work, then as much of the next one as fits:
    as many tensors as there is room for are read together, by MLX's four threads. After a whole walk it is known what
    is taken at most, and what is left (but for room in which MLX runs ahead) keeps blocks between walks: a fixed set
    (the first that fit), which in a walk there and back reads no more than any other choice. The budget changes what is
    read again and when, never a result.
    """

    def __init__(self, shards: Shards, stack: Stack, budget: int | None = None, prefetch: bool = True):
        self.shards = shards
        self.stack = stack
        self.budget = budget
        self.prefetch = prefetch
        self.bytes_read = 0
        self.overhead: dict[Part, int] = {}  # bytes beside the weights, the highest so far
        self._scratch: dict[Work, int] = {}  # of these, what the work on one block comes to and leaves again
        self._kept: dict[tuple[int, Part], dict[str, mx.array]] = {}
        self._kept_bytes = 0
        self._room = 0
        self._names: dict[str, list[str]] = {block.prefix: [] for block in (*stack.prelude, *stack.blocks)}
        prefixes = tuple(self._names)
        for name in shards.names:
            for prefix in prefixes:
                if name.startswith(prefix):
                    self._names[prefix].append(name)
                    break

    def names(self, index: int, part: Part = "all") -> list[str]:
        """Full names of a block's tensors."""
        block = self.stack.block(index)
        names = self._names[block.prefix]
        if part == "all":
            return names
        wanted = part == "modulation"
        return [name for name in names if block.kind.is_modulation(name[len(block.prefix) :]) == wanted]

    def nbytes(self, index: int, part: Part = "all") -> int:
        return self.shards.nbytes(self.names(index, part))

    def walk(self, blocks: Sequence[int], part: Part = "all") -> Iterator[tuple[int, dict[str, mx.array]]]:
        """Yield (block, weights by their name inside the block).

        The caller lets the weights go (`del`) before it asks for the next block; then at most two are in memory.
        """
        order = list(blocks)
        self._room = self._to_keep(order, part)
        room, seen = Prefetch(), set[int]()
        with _reading_thread() as pool:
            next_block: Future | None = pool.submit(self._get, order[0], part, room) if order else None
            weights: dict[str, mx.array] = {}
            try:
                for position, index in enumerate(order):
                    if next_block is not None:
                        # where its limit is reached, MLX would read one tensor after the other
                        with limits.at_least(mx.get_active_memory() + self.nbytes(index, part)):
                            room.done()
                            weights, next_block = next_block.result(), None
                    work = part, self.stack.block(index).kind.name, index in seen
                    seen.add(index)
                    room.begin(self._beside(index, work))
                    following = order[position + 1 : position + 2]
                    if following and following != [index]:
                        next_block = pool.submit(self._get, following[0], part, room)
                    held = dict(weights) if following == [index] else {}  # a walk there and back turns here
                    with self._measured(index, work):
                        yield index, _handed_over(weights)
                    weights = held
            finally:
                room.cancel()
                if next_block is not None and not next_block.cancel():
                    next_block.exception()

    def _to_keep(self, order: Sequence[int], part: Part) -> int:
        """Bytes of blocks that may stay between walks, as far as is known what the work takes."""
        measured = [size for work, size in self._scratch.items() if work[0] == part]
        if self.budget is None or not measured:
            return 0
        largest = max((self.nbytes(index, part) for index in set(order)), default=0)
        free = limits.of(self.budget, limits.on_metal()).free
        return self.budget - self.overhead[part] - 2 * largest - max(free, *measured)

    def _beside(self, index: int, work: Work) -> int | None:
        """Bytes that may be read ahead beside this block's work; None for any number."""
        if self.budget is None:
            return None
        if not self.prefetch or work not in self._scratch:
            return 0
        active = memory.settled()
        self._count(index, work, active)
        return self.budget - active - self._scratch[work]

    @contextmanager
    def _measured(self, index: int, work: Work) -> Iterator[None]:
        """Measure the first work of its sort: a kind of block, its weights' part, and whether it is met again."""
        if self.budget is None:
            yield
            return
        if work in self._scratch:
            with limits.at_least(mx.get_active_memory() + limits.ahead(self._scratch[work], limits.on_metal())):
                yield
            return
        with limits.tight():
            before = memory.settled()
            memory.mark()
            self._count(index, work, before)
            yield
        self._scratch[work] = max(0, memory.since_mark() - before)
        self.overhead[work[0]] = max(self.overhead[work[0]], self._beside_weights(index, work, before))

    def _count(self, index: int, work: Work, active: int) -> None:
        beside = self._beside_weights(index, work, active)
        self.overhead[work[0]] = max(self.overhead.get(work[0], 0), beside)

    def _beside_weights(self, index: int, work: Work, active: int) -> int:
        """What is in memory beside weights while a block is at work. active: bytes as its work begins."""
        own = 0 if (index, work[0]) in self._kept else self.nbytes(index, work[0])
        return active - self._kept_bytes - own + self._scratch.get(work, 0)

    def release(self) -> None:
        """Let go of every block that was kept, and of what was measured: other work comes."""
        self._kept.clear()
        self._kept_bytes = 0
        self.overhead.clear()
        self._scratch.clear()

    def spare(self, part: Part = "body") -> int | None:
        """Bytes of the budget left beside the work, as measured, and the largest block; None for any number."""
        if self.budget is None:
            return None
        largest = max(self.nbytes(index, part) for index in self.stack.path)
        return self.budget - self.overhead.get(part, 0) - largest

    def reserve(self, size: int, part: Part = "body") -> None:
        """Count `size` more bytes as taken beside the weights."""
        if part in self.overhead:
            self.overhead[part] += size

    def _get(self, index: int, part: Part, ahead: Prefetch) -> dict[str, mx.array]:
        kept = self._kept.get((index, part))
        if kept is not None:
            return dict(kept)
        prefix = self.stack.block(index).prefix
        names = self.names(index, part)
        if not names and part != "modulation":
            raise UserError(f"{self.shards.path}: has no tensors under {prefix}; convert the model again")
        loaded = self.shards.load(names, ahead.take)
        weights = {name[len(prefix) :]: array for name, array in loaded.items()}
        size = self.shards.nbytes(names)
        self.bytes_read += size
        if self.budget is None or self._kept_bytes + size <= self._room:
            self._kept[index, part] = dict(weights)
            self._kept_bytes += size
        return weights


_idle: list[ThreadPoolExecutor] = []


@contextmanager
def _reading_thread() -> Iterator[ThreadPoolExecutor]:
    """A thread to read in, used again by later walks: MLX keeps one of its own for every thread that ever evaluated."""
    pool = _idle.pop() if _idle else ThreadPoolExecutor(max_workers=1, thread_name_prefix="block-reader")
    try:
        yield pool
    finally:
        _idle.append(pool)


def _handed_over(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """The same weights in a dictionary of the caller's, so that the generator's own frame holds none of them."""
    taken = dict(weights)
    weights.clear()
    return taken
