"""The rows that a converter is made of: a tensor here, its name and layout there, and what may be done to it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx

Role = Literal["linear", "modulation", "plain"]
Fix = Literal["none", "conv", "pointwise", "was_pointwise", "first", "second"]


@dataclass(frozen=True)
class Row:
    """One tensor.

    name: ours, which is that of the current reference class. shape: ours. aliases: names that older checkpoints use.
    role: "linear" may be quantized, "modulation" on request, "plain" never. fix: how the reference's layout becomes
    ours: "conv" OIHW -> OHWI, "pointwise" (O, I, 1, 1) -> (O, I), "was_pointwise" the same in older checkpoints only,
    "first" and "second" that half of (2 O, ...), where older checkpoints have two layers as one.
    """

    name: str
    shape: tuple[int, ...]
    role: Role = "plain"
    fix: Fix = "none"
    aliases: tuple[str, ...] = ()

    def their_shape(self) -> tuple[int, ...]:
        """The shape that the tensor has in the checkpoint."""
        if self.fix == "conv":
            o, h, w, i = self.shape
            return o, i, h, w
        return self.shape

    def fits(self, theirs: tuple[int, ...]) -> bool:
        """Whether a tensor of this shape in the checkpoint is this row's."""
        return theirs in (self.their_shape(), self._other_shape())

    def _other_shape(self) -> tuple[int, ...]:
        """The other shape that the tensor may have in the checkpoint."""
        if self.fix in ("first", "second"):
            return 2 * self.shape[0], *self.shape[1:]
        return (*self.shape, 1, 1) if self.fix in ("pointwise", "was_pointwise") else self.their_shape()

    def first(self, theirs: tuple[int, ...]) -> int:
        """Where ours begins along the first axis of the checkpoint's tensor, by its shape."""
        return self.shape[0] if self.fix == "second" and theirs[0] == 2 * self.shape[0] else 0

    def read(self, theirs: mx.array) -> mx.array:
        """The checkpoint's tensor in our layout, or a part of it along the first axis."""
        if self.fix == "conv":
            return theirs.transpose(0, 2, 3, 1)
        return theirs.reshape(theirs.shape[0], *self.shape[1:]) if self.shape else theirs

    def current_shape(self) -> tuple[int, ...]:
        """The shape that the tensor has in the current reference class."""
        return (*self.shape, 1, 1) if self.fix == "pointwise" else self.their_shape()

    def write(self, ours: mx.array) -> mx.array:
        """Our tensor, or a part of it along the first axis, as the current reference class has it."""
        if self.fix == "conv":
            return ours.transpose(0, 3, 1, 2)
        return ours[..., None, None] if self.fix == "pointwise" else ours


@dataclass(frozen=True)
class Component:
    """One folder of a checkpoint.

    rows: every tensor it must have. block: the prefix of the block that a name belongs to, or None for the rest.
    ignored: names that may be there and are not needed. dtypes: replaces a requested dtype for this component.
    """

    folder: str
    rows: tuple[Row, ...]
    block: Callable[[str], str | None]
    ignored: Callable[[str], bool] = lambda name: False
    dtypes: Mapping[str, str] | None = None


def linear(name: str, out: int, width: int, *, bias: bool = True, role: Role = "linear", **more: Any) -> list[Row]:
    """The rows of a linear layer."""
    rows = [Row(f"{name}.weight", (out, width), role, **_suffixed(more, "weight"))]
    if bias:
        rows.append(Row(f"{name}.bias", (out,), **_suffixed(more, "bias", fix=False)))
    return rows


def conv(name: str, out: int, width: int, kernel: int | tuple[int, int], *, bias: bool = True) -> list[Row]:
    """The rows of a convolution. kernel: a side, or (height, width)."""
    height, across = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    rows = [Row(f"{name}.weight", (out, height, across, width), fix="conv")]
    return [*rows, Row(f"{name}.bias", (out,))] if bias else rows


def norm(name: str, width: int, *, bias: bool = True, aliases: tuple[str, ...] = ()) -> list[Row]:
    """The rows of an affine norm."""
    names = ("weight", "bias") if bias else ("weight",)
    return [Row(f"{name}.{n}", (width,), aliases=tuple(f"{a}.{n}" for a in aliases)) for n in names]


def _suffixed(more: dict[str, Any], suffix: str, fix: bool = True) -> dict[str, Any]:
    """Aliases are given a module at a time; a bias needs no fix-up of its layout, but is cut in half as its weight."""
    found = {key: value for key, value in more.items() if key != "fix" or fix or value in ("first", "second")}
    if "aliases" in found:
        found["aliases"] = tuple(f"{alias}.{suffix}" for alias in found["aliases"])
    return found
