"""The tensors of an adapter file that are for one layer, and what the layer is there."""

from dataclasses import dataclass
from functools import cached_property
from math import prod

import mlx.core as mx

from mlx_blockskip.converters.views import View
from mlx_blockskip.differences import Product, Values
from mlx_blockskip.engine.errors import UserError


class MisfitError(Exception):
    """Shapes that do not go together, or not with the layer."""


@dataclass(frozen=True)
class Part:
    """A tensor of a file. bare: it may be as MLX has it, (in, r) or (r, out)."""

    name: str
    view: View
    bare: bool = False

    @cached_property
    def values(self) -> mx.array:
        """Read once, and in memory for as long as this is."""
        return self.view.read()


class Parts(dict[str, Part]):
    """The tensors for one layer, by their part (`lora_keys.Key`)."""

    def value(self, part: str) -> mx.array:
        """float32, in memory."""
        return self[part].values.astype(mx.float32)

    def matrix(self, part: str) -> Values:
        """Read when it is asked for: its first axis, and all others in one."""
        view = self[part].view
        return Matrix(view, _stamp(view))

    def whole(self, name: str) -> Values:
        """`name`, or the product of its factors."""
        if name in self:
            return self.matrix(name)
        return Product(self.matrix(f"{name}_a"), self.matrix(f"{name}_b"))


@dataclass(frozen=True)
class Matrix:
    """The rows of a stored tensor. stamp: of its file, which must not change as long as it is read."""

    view: View
    stamp: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        rows, *rest = self.view.shape
        return rows, prod(rest)

    def read(self, start: int = 0, stop: int | None = None) -> mx.array:
        if _stamp(self.view) != self.stamp:
            path = self.view.pieces[0].stored.path
            raise UserError(f"{path}: was changed while it was in use; run the command again")
        found = self.view.read(start, stop)
        return found.reshape(len(found), -1)


def _stamp(view: View) -> tuple[int, ...]:
    """Other where the file is another one, or was written since; empty where it is gone."""
    try:
        status = view.pieces[0].stored.path.stat()
    except FileNotFoundError:
        return ()
    return status.st_ino, status.st_size, status.st_mtime_ns


@dataclass(frozen=True)
class Shape:
    """A layer of theirs: numbers a row, rows, and (height, width, in) where it is a convolution over more than a
    point.
    """

    width: int
    rows: int
    kernel: tuple[int, int, int] | None = None
