"""Convolution and group norm over large feature maps, exact, in strips of rows. Maps are (B, H, W, C)."""

from collections.abc import Callable, Hashable

import mlx.core as mx

from mlx_blockskip.engine.sampled import passes
from mlx_blockskip.models import kernels
from mlx_blockskip.models.layers import Weights

STRIP_BYTES = 8 << 20
"""Input of one strip, in bytes. A constant, so that strips follow from shapes alone."""

Rows = Callable[[mx.array], mx.array]
"""Acts on some rows of a map, each pixel by itself: (B, rows, W, C) -> the same."""


def strip_rows(shape: tuple[int, ...], itemsize: int, rows: int | None = None) -> int:
    """Rows a strip for a map of this shape (B, H, W, C); `rows` overrides."""
    if rows is not None:
        return max(1, rows)
    b, _, w, c = shape
    return max(1, STRIP_BYTES // (b * w * c * itemsize))


def conv2d(
    w: Weights,
    name: str,
    x: mx.array,
    *,
    stride: int = 1,
    padding: tuple[int, int] = (1, 1),
    upsample: int = 1,
    rows: int | None = None,
    before: Rows | None = None,
    add: Callable[[int, int], mx.array] | None = None,
    in_place: bool = False,
) -> mx.array:
    """A k x k convolution, weights OHWI, in strips of output rows with their halo; evaluated when this returns.

    padding: rows and columns of zeros (before, after), the same in both directions. upsample: nearest-neighbour factor
    applied to x first, strip by strip. before: applied to the input's rows first, pixel by pixel, so that its result is
    never there as a whole map. add: gives rows start..stop-1 of a map that is added to the output. in_place: the output
    takes the place of x, which is lost; both have the same shape then.
    """
    weight = w[f"{name}.weight"]
    kernel = weight.shape[1]
    height, width = x.shape[1] * upsample, x.shape[2] * upsample
    first, after = padding
    out_height = (height + first + after - kernel) // stride + 1
    out_width = (width + first + after - kernel) // stride + 1
    grown = (x.shape[0], height, width, max(x.shape[3], weight.shape[0]))
    step = strip_rows(grown, x.dtype.size, rows)

    shape = (x.shape[0], out_height, out_width, weight.shape[0])
    replaced = in_place and step < out_height
    step = max(step, first) if replaced else step
    assert not replaced or (shape == x.shape and stride == 1), "a convolution in place keeps the shape"
    above: list[mx.array] = []  # in place: the rows before a strip, as they were

    def strip(start: int, stop: int) -> mx.array:
        top, bottom = start * stride - first, (stop - 1) * stride - first + kernel
        if replaced and start:
            part = mx.concatenate([*above, x[:, start : min(bottom, height)]], axis=1)
        else:
            part = _rows(x, max(top, 0), min(bottom, height), upsample)
        if replaced:
            above[:] = [mx.contiguous(x[:, max(0, stop - first) : stop])]
            mx.eval(above)
        part = part if before is None else before(part)
        part = mx.pad(part, [(0, 0), (max(-top, 0), max(bottom - height, 0)), (first, after), (0, 0)])
        y = mx.conv2d(part, weight, stride=stride)
        y = y + w[f"{name}.bias"] if f"{name}.bias" in w else y
        return y if add is None else y + add(start, stop)

    kind = x.shape, weight.shape, stride, upsample, before is None, add is None
    return in_strips(strip, shape, x.dtype, step, kind, x if replaced else None)


def in_strips(
    strip: Callable[[int, int], mx.array],
    shape: tuple[int, ...],
    dtype: mx.Dtype,
    step: int,
    kind: Hashable,
    out: mx.array | None = None,
) -> mx.array:
    """A map whose rows start..stop-1 are `strip(start, stop)`, each evaluated before it is put into its place. kind:
    of the work on a strip, for `passes`. out: the map that is filled; by default a new one.
    """
    if step >= shape[1]:
        whole = [done(strip(0, shape[1])) for _ in passes(range(1), kind)]
        return whole[0] if whole else done(mx.zeros(shape, dtype))
    if out is None:
        out = done(mx.zeros(shape, dtype))
    for start in passes(range(0, shape[1], step), kind):
        stop = min(start + step, shape[1])
        part = done(strip(start, stop))
        # nothing refers to the old map any more, so that the new one takes its memory
        out[:, start:stop] = part
        del part
        mx.eval(out)
    return out


def done(x: mx.array) -> mx.array:
    """Evaluated here, so that no more than one layer's maps are in memory."""
    mx.eval(x)
    return x


def _rows(x: mx.array, top: int, bottom: int, upsample: int) -> mx.array:
    """Rows top..bottom-1 of x enlarged by nearest neighbour."""
    if upsample == 1:
        return x[:, top:bottom]
    first, last = top // upsample, -(-bottom // upsample)
    part = mx.repeat(mx.repeat(x[:, first:last], upsample, axis=1), upsample, axis=2)
    return part[:, top - first * upsample : bottom - first * upsample]


def group_norm(w: Weights, name: str, x: mx.array, groups: int, eps: float, rows: int | None = None) -> Rows:
    """GroupNorm with statistics over the whole map, as a function of some of its rows.

    In float32, mean first and then the variance around it.
    """
    b, h, width, c = x.shape
    step = strip_rows(x.shape, 4, rows)
    count = h * width * c // groups

    def grouped(part: mx.array) -> mx.array:
        return part.astype(mx.float32).reshape(b, -1, groups, c // groups)

    mean = mx.zeros((b, 1, groups, 1))
    for start in passes(range(0, h, step), (x.shape, "mean")):
        mean = mean + grouped(x[:, start : start + step]).sum(axis=(1, 3), keepdims=True) / count
        mx.eval(mean)
    variance = mx.zeros((b, 1, groups, 1))
    for start in passes(range(0, h, step), (x.shape, "variance")):
        part = grouped(x[:, start : start + step]) - mean
        variance = variance + (part**2).sum(axis=(1, 3), keepdims=True) / count
        del part
        mx.eval(variance)
    inverse = mx.rsqrt(variance + eps)
    mx.eval(inverse)

    def normed(part: mx.array) -> mx.array:
        if kernels.in_use():
            return kernels.group_norm(part, mean, inverse, w[f"{name}.weight"], w[f"{name}.bias"], silu=False)
        y = ((grouped(part) - mean) * inverse).reshape(part.shape)
        return (y * w[f"{name}.weight"] + w[f"{name}.bias"]).astype(part.dtype)

    return normed
