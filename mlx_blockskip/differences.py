"""What adapters add to the weights of layers, computed in float32 for some rows at a time, as the weights are read.

Weights lie as ours do: (out, in), (out, height, width, in) of convolutions, (n,) of norms. A difference takes and gives
them with all axes but the first in one.

Sources: LoRA (arXiv 2106.09685), LoHa and LoKr as LyCORIS has them (arXiv 2309.14859), DoRA (arXiv 2402.09353) as PEFT
computes it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, Self

import mlx.core as mx

from mlx_blockskip.engine.shards import Added, Difference

TINY = 1e-30
"""A row of zeros has no direction, and stays one whatever its magnitude is."""


class Values(Protocol):
    """A matrix that is read when it is asked for."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self, start: int = 0, stop: int | None = None) -> mx.array:
        """The rows start to stop - 1."""


@dataclass(frozen=True)
class Held:
    """Values that are in memory."""

    array: mx.array

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    def read(self, start: int = 0, stop: int | None = None) -> mx.array:
        return self.array[start:stop]


@dataclass(frozen=True)
class Product:
    """first @ second, (rows, r) and (r, columns)."""

    first: Values
    second: Values

    @property
    def shape(self) -> tuple[int, ...]:
        return self.first.shape[0], self.second.shape[1]

    def read(self, start: int = 0, stop: int | None = None) -> mx.array:
        return self.first.read(start, stop).astype(mx.float32) @ self.second.read().astype(mx.float32)


@dataclass(frozen=True)
class LowRank:
    """The transposed product of a (in, r) and b (r, out), both float32 and evaluated."""

    a: mx.array
    b: mx.array

    def rows(self, weight: mx.array, start: int) -> mx.array:
        return self.b[:, start : start + len(weight)].T @ self.a.T

    def scaled(self, strength: float) -> "LowRank":
        b = self.b if strength == 1 else self.b * strength
        mx.eval(b)
        return LowRank(self.a, b)

    def tensors(self) -> Iterator[mx.array]:
        yield from (self.a, self.b)


@dataclass(frozen=True)
class Full:
    """Values of a weight's own shape, times `scale`."""

    values: Values
    scale: float = 1.0

    def rows(self, weight: mx.array, start: int) -> mx.array:
        found = self.values.read(start, start + len(weight)).astype(mx.float32)
        return found.reshape(len(weight), -1) * self.scale

    def scaled(self, strength: float) -> "Full":
        return replace(self, scale=self.scale * strength)

    def tensors(self) -> Iterator[mx.array]:
        yield from (self.values.read(), mx.array(self.scale))


@dataclass(frozen=True)
class Pair:
    """What is made of two matrices, times `scale`."""

    first: Values
    second: Values
    scale: float = 1.0

    def scaled(self, strength: float) -> Self:
        return replace(self, scale=self.scale * strength)

    def tensors(self) -> Iterator[mx.array]:
        yield from (self.first.read(), self.second.read(), mx.array(self.scale))


class Hadamard(Pair):
    """LoHa: two matrices of the weight's shape, multiplied number by number."""

    def rows(self, weight: mx.array, start: int) -> mx.array:
        first, second = (values.read(start, start + len(weight)) for values in (self.first, self.second))
        return first.astype(mx.float32) * second.astype(mx.float32) * self.scale


class Kronecker(Pair):
    """LoKr: the Kronecker product of two matrices."""

    def rows(self, weight: mx.array, start: int) -> mx.array:
        height, stop = self.second.shape[0], start + len(weight)
        top, bottom = start // height, -(-stop // height)
        first = self.first.read(top, bottom).astype(mx.float32) * self.scale
        second = self.second.read().astype(mx.float32)
        product = (first[:, None, :, None] * second[None, :, None, :]).reshape((bottom - top) * height, -1)
        return product[start - top * height : stop - top * height]


@dataclass(frozen=True)
class Decomposed:
    """DoRA: rows of the weight with `inner` added, brought to the lengths `magnitude` (out,). A strength is one of
    `inner`, as PEFT has it: at 0 the rows still have these lengths.
    """

    inner: Difference
    magnitude: mx.array

    def rows(self, weight: mx.array, start: int) -> mx.array:
        changed = weight + self.inner.rows(weight, start)
        length = mx.linalg.norm(changed, axis=1, keepdims=True)
        wanted = self.magnitude[start : start + len(weight), None]
        return changed * (wanted / mx.maximum(length, TINY)) - weight

    def scaled(self, strength: float) -> "Decomposed":
        return replace(self, inner=self.inner.scaled(strength))

    def tensors(self) -> Iterator[mx.array]:
        yield from self.inner.tensors()
        yield self.magnitude


@dataclass(frozen=True)
class Ranges:
    """Rows of a difference for a larger weight: those of these ranges, one below the other."""

    inner: Difference
    ranges: tuple[tuple[int, int], ...]

    def rows(self, weight: mx.array, start: int) -> mx.array:
        found, top = [], 0
        for first, last in self.ranges:
            low, high = max(start - top, 0), min(start + len(weight) - top, last - first)
            if low < high:
                own = weight[top + low - start : top + high - start]
                found.append(self.inner.rows(own, first + low))
            top += last - first
        return found[0] if len(found) == 1 else mx.concatenate(found)

    def scaled(self, strength: float) -> "Ranges":
        return replace(self, inner=self.inner.scaled(strength))

    def tensors(self) -> Iterator[mx.array]:
        yield from self.inner.tensors()
        yield mx.array(self.ranges)


@dataclass(frozen=True)
class Sum:
    """Several differences, each of the weight as it is stored."""

    parts: tuple[Difference, ...]

    def rows(self, weight: mx.array, start: int) -> mx.array:
        first, *others = (part.rows(weight, start) for part in self.parts)
        return sum(others, first)

    def scaled(self, strength: float) -> "Sum":
        return Sum(tuple(part.scaled(strength) for part in self.parts))

    def tensors(self) -> Iterator[mx.array]:
        for part in self.parts:
            yield from part.tensors()


def joined(parts: Sequence[Difference]) -> Difference:
    """One difference that adds up several. Low-rank factors are put side by side, so that their ranks add up."""
    low = [part for part in parts if isinstance(part, LowRank)]
    others = [part for part in parts if not isinstance(part, LowRank)]
    if len(low) > 1:
        a, b = mx.concatenate([part.a for part in low], axis=1), mx.concatenate([part.b for part in low], axis=0)
        mx.eval(a, b)
        low = [LowRank(a, b)]
    found = (*low, *others)
    return found[0] if len(found) == 1 else Sum(found)


def together(changes: Sequence[Added], strengths: Sequence[float]) -> Added:
    """What several adapters add to one layer, each with its strength."""
    weights = [c.weight.scaled(s) for c, s in zip(changes, strengths, strict=True) if c.weight is not None]
    biases = [c.bias * s for c, s in zip(changes, strengths, strict=True) if c.bias is not None]
    bias = sum(biases[1:], biases[0]) if biases else None
    if bias is not None:
        mx.eval(bias)
    return Added(joined(weights) if weights else None, bias)
