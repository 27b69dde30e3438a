"""A tensor as a checkpoint stores it: rows of one stored tensor or of several, decoded as they are read."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_blockskip.converters import float8
from mlx_blockskip.engine import dtypes, elsewhere
from mlx_blockskip.engine.files import TensorEntry

FLOATS = ("F16", "BF16", "F32", "F64", *float8.VALUES)
"""The dtypes that are read."""


class Stored(NamedTuple):
    """A tensor in a safetensors file."""

    path: Path
    entry: TensorEntry

    @property
    def rows(self) -> int:
        """How long the first axis is; 1 for a scalar."""
        return self.entry.shape[0] if self.entry.shape else 1

    def bytes(self, first: int, count: int) -> np.ndarray:
        """(count x bytes of a row,) uint8: some rows as they lie in the file, which does not stay open."""
        size = self.entry.nbytes // max(1, self.rows)
        return elsewhere.read_bytes(self.path, self.entry.start + first * size, count * size)

    def read(self, first: int, count: int) -> mx.array:
        """Some rows (count, ...), or the whole of a scalar (). float32 where MLX does not have the file's dtype."""
        raw, dtype = self.bytes(first, count), self.entry.dtype
        shape = (count, *self.entry.shape[1:]) if self.entry.shape else ()
        if dtype in float8.VALUES:
            return mx.array(float8.VALUES[dtype][raw]).reshape(shape)
        if dtype == "F64":
            with np.errstate(over="ignore"):
                return mx.array(raw.view(np.float64).astype(np.float32)).reshape(shape)
        return mx.array(raw).view(dtypes.mlx_dtype(dtype)).reshape(shape)


@dataclass(frozen=True)
class Piece:
    """`count` rows of a stored tensor from `first` on. scale: what they are multiplied by, one number or one a row of
    the stored tensor.
    """

    stored: Stored
    first: int
    count: int
    scale: Stored | None = None

    def read(self, start: int, stop: int) -> mx.array:
        """The rows start to stop - 1 of the piece, float32 where they are scaled."""
        values = self.stored.read(self.first + start, stop - start)
        if self.scale is None:
            return values
        if math.prod(self.scale.entry.shape) == 1:
            return values.astype(mx.float32) * self.scale.read(0, 1).reshape(()).astype(mx.float32)
        scale = self.scale.read(self.first + start, stop - start).astype(mx.float32)
        return values.astype(mx.float32) * scale.reshape(-1, *[1] * (values.ndim - 1))


@dataclass(frozen=True)
class View:
    """Pieces one below the other. shape: of all; dtype: safetensors' name of that of the first."""

    pieces: tuple[Piece, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        own = self.pieces[0].stored.entry.shape
        return (sum(piece.count for piece in self.pieces), *own[1:]) if own else ()

    @property
    def dtype(self) -> str:
        return self.pieces[0].stored.entry.dtype

    @property
    def stored_as(self) -> str | None:
        """The one dtype that all pieces are stored in; None where they have several, or scales."""
        found = {piece.stored.entry.dtype if piece.scale is None else None for piece in self.pieces}
        return found.pop() if len(found) == 1 else None

    def bytes(self, start: int, stop: int) -> memoryview:
        """The rows start to stop - 1 as they are stored."""
        parts = [piece.stored.bytes(piece.first, piece.count) for piece in self._within(start, stop)]
        return (parts[0] if len(parts) == 1 else np.concatenate(parts)).data.cast("B")

    def rows(self, first: int, count: int) -> "View":
        """Some of the rows."""
        return View(tuple(self._within(first, first + count)))

    def read(self, start: int = 0, stop: int | None = None) -> mx.array:
        """The rows start to stop - 1; nothing else is read and no file stays open."""
        count = self.shape[0] if self.shape else 1
        parts = [piece.read(0, piece.count) for piece in self._within(start, count if stop is None else stop)]
        return parts[0] if len(parts) == 1 else mx.concatenate(parts)

    def _within(self, start: int, stop: int) -> Iterator[Piece]:
        """What of the pieces is in the rows start to stop - 1."""
        top = 0
        for piece in self.pieces:
            first, last = max(start - top, 0), min(stop - top, piece.count)
            if first < last:
                yield replace(piece, first=piece.first + first, count=last - first)
            top += piece.count


def whole(stored: Stored, scale: Stored | None = None) -> View:
    """All rows of a stored tensor."""
    return View((Piece(stored, 0, stored.rows, scale),))


def stacked(*views: View) -> View:
    """Views one below the other."""
    return View(tuple(piece for view in views for piece in view.pieces))
