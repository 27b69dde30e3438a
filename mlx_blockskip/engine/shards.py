"""A component's weights on disk: one shard a block, read lazily, verified once."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol, Self

import mlx.core as mx
import numpy as np

from mlx_blockskip.engine import device, dtypes, files
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.engine.indexes import members, read_index
from mlx_blockskip.engine.rounding import dithered

INDEX = "model.safetensors.index.json"


class Difference(Protocol):
    """What is added to a layer's weight as it is read."""

    def rows(self, weight: mx.array, start: int) -> mx.array:
        """(rows, n) float32, to be added to `weight`, (rows, n): the layer's rows from `start` on, as stored."""

    def scaled(self, strength: float) -> Self:
        """The same with another strength."""

    def tensors(self) -> Iterator[mx.array]:
        """All numbers that it is made of, one after the other."""


@dataclass(frozen=True)
class Added:
    """What is added to one layer. bias: (out,) float32; a layer that has none gets one."""

    weight: Difference | None = None
    bias: mx.array | None = None

    @property
    def nothing(self) -> bool:
        return self.weight is None and self.bias is None


Packed = tuple[mx.array, mx.array, int]
"""Scales, biases and group size of a quantized weight."""

Room = Callable[[Sequence[int]], int]
"""`(bytes of the tensors that are still to be read, in order) -> how many of them are read together`, at least one."""


PART = 1 << 22
"""Numbers of a weight that are made whole at a time."""


def made_whole(weight: mx.array, packed: Packed | None, added: Difference | None, start: int = 0) -> mx.array:
    """A weight, or its rows from `start` on, without quantization and with what is added to them: computed in float32
    and rounded once, to the type in which it is stored; in bfloat16 so that what is added keeps its strength.
    """
    stored = weight.dtype
    if packed is not None:
        scales, biases, group_size = packed
        stored, bits = scales.dtype, weight.shape[1] * 32 // (scales.shape[1] * group_size)
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
        weight = mx.dequantize(weight, scales, biases, group_size=group_size, bits=bits)
    weight = weight.astype(mx.float32)
    if added is not None:
        flat = weight.reshape(len(weight), -1)
        weight = (flat + added.rows(flat, start)).reshape(weight.shape)
        if stored == mx.bfloat16:
            return dithered(weight, start)
    return weight.astype(stored)


class Shards:
    """The tensors of one component directory (config.json, index, shards). Nothing is read before it is asked for.

    A shard's checksum is verified once, at its first read. added: by module, what `load` adds to a layer, whose weight
    is then whole where it is quantized. What is stored is not changed by it, nor `identity`.
    Raises UserError for a missing, truncated or altered file.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.config: dict[str, Any] = files.read_json(self.path / "config.json")
        self.weight_map, metadata = read_index(self.path / INDEX)
        self.checksums: dict[str, str] = members(metadata, "sha256", str, self.path / INDEX)
        self.group_sizes: dict[str, int] = members(metadata, "group_sizes", int, self.path / INDEX)
        self.added: Mapping[str, Added] = {}
        self._headers: dict[str, files.Header] = {}
        self._verified: set[str] = set()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.weight_map)

    @cached_property
    def identity(self) -> str:
        """A fingerprint of the component: its config and the checksums of its shards. What the config says of
        quantization is in the checksums too, and older conversions do not say it.
        """
        own = sorted(((key, value) for key, value in self.config.items() if key != "quantization"), key=str)
        return sha256(repr((own, sorted(self.checksums.items()))).encode()).hexdigest()

    def under(self, prefix: str) -> tuple[str, ...]:
        """The names that start with `prefix`."""
        return tuple(name for name in self.weight_map if name.startswith(prefix))

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._entry(name).shape)

    def nbytes(self, names: Iterable[str]) -> int:
        """Bytes that the tensors take in memory, and on disk where nothing is added to them."""
        return sum(self._whole_bytes(name) if self.added else self._entry(name).nbytes for name in names)

    def load(self, names: Iterable[str], room: Room | None = None) -> dict[str, mx.array]:
        """Read these tensors and no others, evaluated when this returns; as many together as there is room for."""
        found: dict[str, mx.array] = {}
        for file, wanted in self._by_file(names):
            found |= self._read(file, wanted, room)
        for module in self.added.keys() & {name.removesuffix(".weight") for name in found}:
            self._add(module, found)
        return found

    def _read(self, file: str, names: Sequence[str], room: Room | None) -> dict[str, mx.array]:
        """Tensors of one file, evaluated."""
        found = self._open(file, names)
        left = list(found.values())
        with self._readable(file):
            while left:
                count = len(left) if room is None else room([array.nbytes for array in left])
                mx.eval(left[:count])
                del left[:count]
        return found

    def _add(self, module: str, found: dict[str, mx.array]) -> None:
        """Put in place of a layer's tensors what they are with what is added: some rows at a time."""
        name, added = f"{module}.weight", self.added[module]
        if added.bias is not None:
            own = found.get(f"{module}.bias")
            dtype = found.get(f"{module}.scales", found[name]).dtype if own is None else own.dtype
            bias = added.bias if own is None else own.astype(mx.float32) + added.bias
            found[f"{module}.bias"] = bias.astype(dtype)
            mx.eval(found[f"{module}.bias"])
        if added.weight is None:
            return
        weight = found.pop(name)
        pair = [found.pop(f"{module}.{kind}") for kind in ("scales", "biases")] if f"{module}.scales" in found else []
        width = pair[0].shape[1] * self.group_sizes[module] if pair else math.prod(weight.shape[1:])
        parts, count = [], max(1, PART // max(1, width))
        for start in range(0, len(weight), count):
            rows = slice(start, start + count)
            packed = (pair[0][rows], pair[1][rows], self.group_sizes[module]) if pair else None
            parts.append(made_whole(weight[rows], packed, added.weight, start))
            mx.eval(parts[-1])
        found[name] = parts[0] if len(parts) == 1 else mx.concatenate(parts)
        mx.eval(found[name])

    def _whole_bytes(self, name: str) -> int:
        """Bytes of a tensor as `load` returns it: with a layer that is made whole no scales and biases come."""
        module, _, kind = name.rpartition(".")
        added = self.added.get(module)
        if added is None or added.weight is None or module not in self.group_sizes or kind == "bias":
            return self._entry(name).nbytes
        if kind != "weight":
            return 0
        scales = self._entry(f"{module}.scales")
        return scales.nbytes * self.group_sizes[module]

    def lazily(self, names: Iterable[str]) -> dict[str, mx.array]:
        """These tensors, each read when it is evaluated."""
        found: dict[str, mx.array] = {}
        for file, wanted in self._by_file(names):
            found |= self._open(file, wanted)
        return found

    def _by_file(self, names: Iterable[str]) -> Iterable[tuple[str, list[str]]]:
        found: dict[str, list[str]] = {}
        for name in names:
            found.setdefault(self._file(name), []).append(name)
        return found.items()

    def _open(self, file: str, names: Sequence[str]) -> dict[str, mx.array]:
        """Tensors of one file, which is verified; none of them is read yet."""
        self.verify(file)
        with self._readable(file):
            lazy = files.load_lazily(self.path / file)
            return {name: lazy[name] for name in names}

    @contextmanager
    def _readable(self, file: str) -> Iterator[None]:
        """Inside, what goes wrong with the file is a UserError; an error of the device stays one."""
        try:
            yield
        except (RuntimeError, KeyError, ValueError) as error:
            if device.is_device_error(error):
                raise
            raise UserError(f"{self.path / file}: cannot be read ({error}); convert the model again") from error

    def rows(self, name: str, ids: np.ndarray) -> mx.array:
        """Rows `ids` (any shape, ints) of a 2-D table, gathered from the file: (*ids.shape, width)."""
        file = self._file(name)
        self.verify(file)
        entry = self._entry(name)
        count, width = entry.shape
        if ids.size and (ids.min() < 0 or ids.max() >= count):
            raise UserError(f"{self.path}: {name} has {count} rows, and row {ids.max()} was asked for")
        raw = np.memmap(self.path / file, mode="r", offset=entry.start, shape=(count, entry.nbytes // count))
        data = np.ascontiguousarray(raw[ids.reshape(-1)])
        del raw
        return mx.array(data).view(dtypes.mlx_dtype(entry.dtype)).reshape(*ids.shape, width)

    def part(self, name: str, start: int, stop: int) -> mx.array:
        """Rows start to stop - 1 of a tensor; nothing else is read, and no file stays open."""
        self.verify(self._file(name))
        return files.read_rows(self.path / self._file(name), self._entry(name), start, stop)

    def dtype(self, name: str) -> str:
        """safetensors' name of a tensor's type."""
        return self._entry(name).dtype

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

    def verify(self, file: str) -> None:
        """Hold a shard against its checksum, if that was not done before. Raises UserError where it is not as it was
        written.
        """
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
