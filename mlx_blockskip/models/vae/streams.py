"""Layers over maps that are too large to hold: a map as a stream of its rows, handed from layer to layer, exact.

A layer takes rows as they come and gives rows on as soon as it has what they need. It keeps only the few rows that the
next ones need again. So of a chain of layers no map is whole in memory, and nothing is computed twice.

Layers are maps over iterators rather than generators, which would hold the piece that they gave last.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import mlx.core as mx

from mlx_blockskip.models.layers import Weights
from mlx_blockskip.models.vae.strips import Rows, strip_rows

Shape = tuple[int, int, int, int]

SHARE = 4
"""A piece is this part of a strip: every layer of a chain holds one."""


class Stream(NamedTuple):
    """A map of shape (B, H, W, C). rows: its rows in order, in pieces (B, n, W, C); they can be taken once."""

    shape: Shape
    rows: Iterator[mx.array]


def piece_rows(shape: tuple[int, ...], itemsize: int, rows: int | None = None) -> int:
    """Rows a piece for a map of this shape (B, H, W, C); `rows` overrides."""
    return max(1, strip_rows(shape, itemsize) // SHARE) if rows is None else max(1, rows)


def source(x: mx.array, rows: int | None = None) -> Stream:
    """A map that is in memory, in pieces of `rows` rows, by default of as many as `piece_rows` says."""
    step = piece_rows(x.shape, x.dtype.size, rows)
    b, h, w, c = x.shape
    return Stream((b, h, w, c), (x[:, start : start + step] for start in range(0, h, step)))


def whole(x: Stream) -> mx.array:
    """The map (B, H, W, C), evaluated."""
    out, at = mx.zeros((0,)), 0
    for part in x.rows:
        if part.shape == x.shape:
            return part
        out = out if at else mx.zeros(x.shape, part.dtype)
        out[:, at : at + part.shape[1]] = part
        mx.eval(out)
        at += part.shape[1]
    assert at == x.shape[1], f"{at} of {x.shape[1]} rows came"
    return out


def each(x: Stream, function: Rows, channels: int | None = None) -> Stream:
    """`function` of every pixel by itself. channels: those that it gives, where they are not x's."""
    return Stream((*x.shape[:3], channels or x.shape[3]), map(function, x.rows))


def windows(x: Stream, kernel: int, stride: int, step: int, even: bool = False) -> Iterator[mx.array]:
    """The input rows of about `step` rows at a time of a convolution that pads kernel // 2 zeros around x.

    Rows of zeros are there, columns are not. Half of `step` is given as well: to wait for more, rows would have to be
    held. even: an even number of rows at a time, of an even height; `step` is even then.
    """
    b, height, width, c = x.shape
    padding = kernel // 2
    left, seen = (height - 1) // stride + 1, 0
    held: list[mx.array] = []
    for part in x.rows:
        zeros = mx.zeros((b, padding, width, c), part.dtype)
        held += [part] if seen else [zeros, part]
        seen += part.shape[1]
        held += [zeros] if seen == height else []
        del part
        while left:
            ready = min(left, (sum(h.shape[1] for h in held) - kernel) // stride + 1)
            count = ready if ready <= step + kernel else step
            count -= count % 2 if even and count < left else 0
            if count < 1 or (seen < height and ready < (step + 1) // 2):
                break
            left -= count
            yield _window(held, (count - 1) * stride + kernel, count * stride)


def _window(held: list[mx.array], size: int, passed: int) -> mx.array:
    """The first `size` rows that are held; then those after the first `passed` are."""
    joined = mx.concatenate(held, axis=1)
    window = joined[:, :size]
    held[:] = [mx.contiguous(joined[:, passed:])]  # a slice alone would keep all rows in memory
    mx.eval(window, held)
    return window


def conv2d(
    w: Weights,
    name: str,
    x: Stream,
    *,
    stride: int = 1,
    groups: int = 1,
    upsample: bool = False,
    after: Rows | None = None,
    even: bool = False,
    rows: int | None = None,
) -> Stream:
    """A k x k convolution (k odd) with k // 2 zeros around x, weights OHWI.

    upsample: x is doubled by nearest neighbour first. after: applied to the output, pixel by pixel. even: an even
    number of rows is given at a time, of an even height. rows: about so many are, by default as `piece_rows` says.
    """
    weight, bias = w[f"{name}.weight"], w.get(f"{name}.bias")
    b, height, width, c = _grown(x.shape, 2 if upsample else 1)
    kernel, channels = weight.shape[1], weight.shape[0]
    across = (width - 1) // stride + 1
    step = piece_rows((b, height, width, max(c, channels)), weight.dtype.size, rows)
    step += step % 2 if even else 0
    x = _doubled(x, max(1, step // 2)) if upsample else x

    def convolved(window: mx.array) -> mx.array:
        y = mx.conv2d(window, weight, stride=stride, padding=(0, kernel // 2), groups=groups)
        y = y if bias is None else y + bias
        y = y if after is None else after(y)
        mx.eval(y)
        return y

    made = map(convolved, windows(x, kernel, stride, step, even))
    return Stream((b, (height - 1) // stride + 1, across, channels), made)


def add(x: Stream, body: Callable[[Stream], Stream], shortcut: Rows | None = None) -> Stream:
    """body(x) + shortcut(x), by default x itself. The rows of x wait for those that the body makes of them.

    Where the body changes the height, `shortcut` changes it likewise.
    """
    waiting: list[mx.array] = []

    def passing(part: mx.array) -> mx.array:
        waiting.append(part)
        return part

    y = body(Stream(x.shape, map(passing, x.rows)))

    def added(part: mx.array) -> mx.array:
        own = _take(waiting, part.shape[1] * x.shape[1] // y.shape[1])
        total = part + (own if shortcut is None else shortcut(own))
        mx.eval(total)
        return total

    return Stream(y.shape, map(added, y.rows))


def _grown(shape: Shape, factor: int) -> Shape:
    b, h, w, c = shape
    return b, factor * h, factor * w, c


def _doubled(x: Stream, step: int) -> Stream:
    """Twice as high and wide, by nearest neighbour, `step` rows of x at a time."""

    def rows() -> Iterator[mx.array]:
        for part in x.rows:
            for start in range(0, part.shape[1], step):
                yield mx.repeat(mx.repeat(part[:, start : start + step], 2, axis=1), 2, axis=2)

    return Stream(_grown(x.shape, 2), rows())


def _take(waiting: list[mx.array], count: int) -> mx.array:
    """The first `count` rows of those that wait; they wait no longer."""
    taken: list[mx.array] = []
    while count:
        part = waiting.pop(0)
        if part.shape[1] > count:
            waiting.insert(0, part[:, count:])
            part = part[:, :count]
        taken.append(part)
        count -= part.shape[1]
    return taken[0] if len(taken) == 1 else mx.concatenate(taken, axis=1)
