"""A component's weights on disk: one shard a block, read lazily, verified once, kept where the budget allows.

`Shards` is a directory; `BlockReader` walks the blocks of a stack over it, reading the next block in a thread while
the current one works.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from threading import Condition
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from mlx_blockskip.engine import files, limits, memory
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.engine.stack import Stack

INDEX = "model.safetensors.index.json"
Part = Literal["all", "body", "modulation"]
Work = tuple[Part, str, bool]
"""A part of the weights, a kind of block, and whether the walk meets the block again, on its way back."""


class Shards:
    """The tensors of one component directory (config.json, index, shards). Nothing is read before it is asked for.

    A shard's checksum is verified once, at its first read.
    Raises UserError for a missing, truncated or altered file.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        index = files.read_json(self.path / INDEX)
        self.config: dict[str, Any] = files.read_json(self.path / "config.json")
        self.weight_map: dict[str, str] = index["weight_map"]
        metadata = index.get("metadata", {})
        self.checksums: dict[str, str] = metadata.get("sha256", {})
        self.group_sizes: dict[str, int] = metadata.get("group_sizes", {})
        self._headers: dict[str, files.Header] = {}
        self._verified: set[str] = set()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.weight_map)

    @cached_property
    def identity(self) -> str:
        """A fingerprint of the component: its config and the checksums of its shards."""
        return sha256(repr((sorted(self.config.items(), key=str), sorted(self.checksums.items()))).encode()).hexdigest()

    def under(self, prefix: str) -> tuple[str, ...]:
        """The names that start with `prefix`."""
        return tuple(name for name in self.weight_map if name.startswith(prefix))

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._entry(name).shape)

    def nbytes(self, names: Iterable[str]) -> int:
        """Bytes that the tensors take, on disk and in memory."""
        return sum(self._entry(name).nbytes for name in names)

    def load(self, names: Iterable[str], before: Callable[[int], None] | None = None) -> dict[str, mx.array]:
        """Read these tensors and no others; they are evaluated when this returns.

        before: told of each tensor's bytes before it is read, one tensor after the other.
        """
        by_file: dict[str, list[str]] = {}
        for name in names:
            by_file.setdefault(self._file(name), []).append(name)
        found: dict[str, mx.array] = {}
        for file, wanted in by_file.items():
            self._verify(file)
            try:
                lazy = files.load_lazily(self.path / file)
                part = {name: lazy[name] for name in wanted}
                del lazy
                if before is not None:
                    for name in wanted:
                        before(self.nbytes([name]))
                        mx.eval(part[name])
                mx.eval(part)
            except (RuntimeError, KeyError, ValueError) as error:
                raise UserError(f"{self.path / file}: cannot be read ({error}); convert the model again") from error
            found |= part
        return found

    def rows(self, name: str, ids: np.ndarray) -> mx.array:
        """Rows `ids` (any shape, ints) of a 2-D table, gathered from the file: (*ids.shape, width)."""
        file = self._file(name)
        self._verify(file)
        entry = self._entry(name)
        count, width = entry.shape
        if ids.size and (ids.min() < 0 or ids.max() >= count):
            raise UserError(f"{self.path}: {name} has {count} rows, and row {ids.max()} was asked for")
        raw = np.memmap(self.path / file, mode="r", offset=entry.start, shape=(count, entry.nbytes // count))
        data = np.ascontiguousarray(raw[ids.reshape(-1)])
        del raw
        return mx.array(data).view(files.mlx_dtype(entry.dtype)).reshape(*ids.shape, width)

    def _file(self, name: str) -> str:
        try:
            return self.weight_map[name]
        except KeyError:
            raise UserError(f"{self.path}: has no tensor {name}; convert the model again") from None

    def _entry(self, name: str) -> files.TensorEntry:
        file = self._file(name)
        if file not in self._headers:
            self._headers[file] = files.read_header(self.path / file)
        try:
            return self._headers[file].entries[name]
        except KeyError:
            raise UserError(f"{self.path / file}: has no tensor {name}; convert the model again") from None

    def _verify(self, file: str) -> None:
        if file in self._verified:
            return
        path = self.path / file
        if not path.is_file():
            raise UserError(f"{path}: this part of the model is missing; convert the model again")
        files.read_header(path)
        expected = self.checksums.get(file)
        if expected is not None and files.sha256(path) != expected:
            raise UserError(f"{path}: is not what was converted (its checksum differs); convert the model again")
        self._verified.add(file)


class Flight:
    """What may be read ahead while a block is at work. Reading waits for room, or for the block at work to be done."""

    def __init__(self) -> None:
        self.at_work = False
        self.room: int | None = None  # bytes beside the block at work; None for any number
        self.ahead = 0
        self.cancelled = False
        self._changed = Condition()

    def take(self, size: int) -> None:
        """Wait until `size` more bytes may be read ahead. Raises CancelledError where the walk was left."""
        with self._changed:
            self._changed.wait_for(lambda: self.cancelled or self._fits(size))
            if self.cancelled:
                raise CancelledError
            self.ahead += size

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
    what its work takes is measured. From then on comes first the block at work, then as much of the next one as fits,
    tensor by tensor. After a whole walk it is known what is taken at most, and what is left (but for room in which MLX
    runs ahead) keeps blocks between walks: a fixed set (the first that fit), which in a walk there and back reads no
    more than any other choice. The budget changes what is read again and when, never a result.
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
        flight, seen = Flight(), set[int]()
        with _reading_thread() as pool:
            ahead: Future | None = pool.submit(self._get, order[0], part, flight) if order else None
            weights: dict[str, mx.array] = {}
            try:
                for position, index in enumerate(order):
                    if ahead is not None:
                        weights, ahead = ahead.result(), None
                    work = part, self.stack.block(index).kind.name, index in seen
                    seen.add(index)
                    flight.begin(self._beside(index, work))
                    following = order[position + 1 : position + 2]
                    if following and following != [index]:
                        ahead = pool.submit(self._get, following[0], part, flight)
                    held = dict(weights) if following == [index] else {}  # a walk there and back turns here
                    with self._measured(index, work):
                        yield index, _handed_over(weights)
                    weights = held
                    flight.done()
            finally:
                flight.cancel()
                if ahead is not None and not ahead.cancel():
                    ahead.exception()

    def _to_keep(self, order: Sequence[int], part: Part) -> int:
        """Bytes of blocks that may stay between walks, as far as is known what the work takes."""
        measured = [size for work, size in self._scratch.items() if work[0] == part]
        if self.budget is None or not measured:
            return 0
        largest = max((self.nbytes(index, part) for index in set(order)), default=0)
        return self.budget - self.overhead[part] - 2 * largest - max(measured)

    def _beside(self, index: int, work: Work) -> int | None:
        """Bytes that may be read ahead beside this block's work; None for any number."""
        if self.budget is None:
            return None
        if not self.prefetch or work not in self._scratch:
            return 0
        self._count(index, work)
        return self.budget - mx.get_active_memory() - self._scratch[work]

    @contextmanager
    def _measured(self, index: int, work: Work) -> Iterator[None]:
        """Measure the first work of its sort: a kind of block, its weights' part, and whether it is met again."""
        if self.budget is None:
            yield
            return
        if work in self._scratch:
            # half of what it took when it was measured: MLX schedules one operation more when the limit is reached
            with limits.at_least(mx.get_active_memory() + self._scratch[work] // 2):
                yield
            return
        with limits.tight():
            before = mx.get_active_memory()
            memory.mark()
            self._count(index, work)
            yield
        self._scratch[work] = memory.since_mark() - before
        self.overhead[work[0]] = max(self.overhead[work[0]], self._beside_weights(index, work, before))

    def _count(self, index: int, work: Work) -> None:
        beside = self._beside_weights(index, work, mx.get_active_memory())
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

    def _get(self, index: int, part: Part, flight: Flight) -> dict[str, mx.array]:
        kept = self._kept.get((index, part))
        if kept is not None:
            return dict(kept)
        prefix = self.stack.block(index).prefix
        names = self.names(index, part)
        if not names and part != "modulation":
            raise UserError(f"{self.shards.path}: has no tensors under {prefix}; convert the model again")
        loaded = self.shards.load(names, flight.take)
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
