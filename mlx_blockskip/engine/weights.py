"""A component's weights on disk: one shard a block, read lazily, verified once, kept where the budget allows.

`Shards` is a directory; `BlockReader` walks the blocks of a stack over it, reading the next block in a thread while
the current one works.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
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
    """The bytes in flight of a walk: the block at work, and what is read ahead of the next one.

    limit: bytes that both may take together; None for any. A block by itself is always let through.
    """

    def __init__(self, limit: int | None):
        self.limit = limit
        self.at_work = 0
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

    def hand_over(self) -> None:
        """What was read ahead is now at work."""
        with self._changed:
            self.at_work, self.ahead = self.ahead, 0

    def done(self) -> None:
        """The block at work was let go of."""
        with self._changed:
            self.at_work = 0
            self._changed.notify()

    def cancel(self) -> None:
        """Nobody waits for the next block any more."""
        with self._changed:
            self.cancelled = True
            self._changed.notify()

    def _fits(self, size: int) -> bool:
        return not self.at_work or self.limit is None or self.at_work + self.ahead + size <= self.limit


class BlockReader:
    """Hands out the weights of blocks in the order of a walk.

    budget: bytes of MLX memory for all there is; None keeps every block. The first walk has one block in memory at a
    time and measures what the work itself takes beside it. From then on comes first the block at work, then as much of
    the next one as fits, tensor by tensor, then room for MLX to run ahead, and what is left keeps blocks between walks:
    a fixed set (the first that fit), which in a walk there and back reads no more than any other choice. The budget
    changes what is read again and when, never a result.
    """

    def __init__(self, shards: Shards, stack: Stack, budget: int | None = None, prefetch: bool = True):
        self.shards = shards
        self.stack = stack
        self.budget = budget
        self.prefetch = prefetch
        self.bytes_read = 0
        self.overhead: dict[Part, int] = {}  # bytes beside the weights, the highest so far
        self._scratch: dict[Part, int] = {}  # of these, what the work on one block comes to and leaves again
        self._kept: dict[tuple[int, Part], dict[str, mx.array]] = {}
        self._kept_bytes = 0
        self._room = 0
        self._names: dict[str, list[str]] = {block.prefix: [] for block in stack.blocks}
        prefixes = tuple(self._names)
        for name in shards.names:
            for prefix in prefixes:
                if name.startswith(prefix):
                    self._names[prefix].append(name)
                    break

    def names(self, index: int, part: Part = "all") -> list[str]:
        """Full names of a block's tensors."""
        block = self.stack.blocks[index]
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
        if self.budget is None:
            yield from self._read_ahead(order, part, Flight(None))
            return
        largest = max((self.nbytes(index, part) for index in set(order)), default=0)
        if not self.prefetch or part not in self.overhead:
            self._room = 0 if part not in self.overhead else self.budget - self.overhead[part] - largest
            yield from self._one_by_one(order, part)
            return
        weights = self.budget - self.overhead[part]
        self._room = weights - 2 * largest - self._scratch[part]  # as much again for MLX to run ahead in
        yield from self._read_ahead(order, part, Flight(weights - max(0, self._room)))

    def _one_by_one(self, order: Sequence[int], part: Part) -> Iterator[tuple[int, dict[str, mx.array]]]:
        """One block in memory at a time, and what the work takes beside it measured."""
        held: dict[str, mx.array] = {}
        for position, index in enumerate(order):
            weights = held or self._get(index, part, Flight(None))
            turns = order[position + 1 : position + 2] == [index]
            held = dict(weights) if turns else {}
            memory.mark()
            before = mx.get_active_memory()
            size = self._kept_bytes + (0 if (index, part) in self._kept else self.nbytes(index, part))
            with limits.tight():
                yield index, _handed_over(weights)
            self.overhead[part] = max(self.overhead.get(part, 0), memory.since_mark() - size)
            self._scratch[part] = max(self._scratch.get(part, 0), memory.since_mark() - before)

    def _read_ahead(
        self, order: Sequence[int], part: Part, flight: Flight
    ) -> Iterator[tuple[int, dict[str, mx.array]]]:
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="block-reader") as pool:
            ahead: Future | None = pool.submit(self._get, order[0], part, flight) if order else None
            weights: dict[str, mx.array] = {}
            try:
                for position, index in enumerate(order):
                    if ahead is not None:
                        weights, ahead = ahead.result(), None
                        flight.hand_over()
                    following = order[position + 1] if position + 1 < len(order) else index
                    if following == index:  # the turning point of a walk there and back, or the end
                        yield index, weights
                        continue
                    ahead = pool.submit(self._get, following, part, flight)
                    taken, weights = weights, {}
                    yield index, _handed_over(taken)
                    flight.done()
            finally:
                flight.cancel()
                if ahead is not None and not ahead.cancel():
                    ahead.exception()

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
        largest = max(self.nbytes(index, part) for index in range(self.stack.depth))
        return self.budget - self.overhead.get(part, 0) - largest

    def reserve(self, size: int, part: Part = "body") -> None:
        """Count `size` more bytes as taken beside the weights."""
        if part in self.overhead:
            self.overhead[part] += size

    def _get(self, index: int, part: Part, flight: Flight) -> dict[str, mx.array]:
        kept = self._kept.get((index, part))
        if kept is not None:
            return dict(kept)
        prefix = self.stack.blocks[index].prefix
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


def _handed_over(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """The same weights in a dictionary of the caller's, so that the generator's own frame holds none of them."""
    taken = dict(weights)
    weights.clear()
    return taken
