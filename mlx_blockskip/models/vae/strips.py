"""Convolution and group norm over large feature maps, exact, in strips of rows. Maps are (B, H, W, C)."""

import mlx.core as mx

from mlx_blockskip.models.layers import Weights

STRIP_BYTES = 32 << 20
"""Input of one strip, in bytes. A constant, so that strips follow from shapes alone."""


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
) -> mx.array:
    """A k x k convolution, weights OHWI, in strips of output rows with their halo.

    padding: rows and columns of zeros (before, after), the same in both directions. upsample: nearest-neighbour factor
    applied to x first, strip by strip.
    """
    weight, bias = w[f"{name}.weight"], w.get(f"{name}.bias")
    kernel = weight.shape[1]
    height = x.shape[1] * upsample
    before, after = padding
    out_height = (height + before + after - kernel) // stride + 1
    grown = (x.shape[0], height, x.shape[2] * upsample, max(x.shape[3], weight.shape[0]))
    step = strip_rows(grown, x.dtype.size, rows)
    strips = []
    for start in range(0, out_height, step):
        stop = min(start + step, out_height)
        top, bottom = start * stride - before, (stop - 1) * stride - before + kernel
        part = _rows(x, max(top, 0), min(bottom, height), upsample)
        part = mx.pad(part, [(0, 0), (max(-top, 0), max(bottom - height, 0)), (before, after), (0, 0)])
        y = mx.conv2d(part, weight, stride=stride)
        strips.append(y if bias is None else y + bias)
        if step < out_height:
            mx.eval(strips[-1])
    return strips[0] if len(strips) == 1 else mx.concatenate(strips, axis=1)


def _rows(x: mx.array, top: int, bottom: int, upsample: int) -> mx.array:
    """Rows top..bottom-1 of x enlarged by nearest neighbour."""
    if upsample == 1:
        return x[:, top:bottom]
    first, last = top // upsample, -(-bottom // upsample)
    part = mx.repeat(mx.repeat(x[:, first:last], upsample, axis=1), upsample, axis=2)
    return part[:, top - first * upsample : bottom - first * upsample]


def group_norm(w: Weights, name: str, x: mx.array, groups: int, eps: float, rows: int | None = None) -> mx.array:
    """GroupNorm with statistics over the whole map, in float32, mean first and then the variance around it."""
    b, h, width, c = x.shape
    step = strip_rows(x.shape, 4, rows)
    count = h * width * c // groups

    def grouped(start: int) -> mx.array:
        part = x[:, start : start + step].astype(mx.float32)
        return part.reshape(b, -1, groups, c // groups)

    mean = mx.zeros((b, 1, groups, 1))
    for start in range(0, h, step):
        mean = mean + grouped(start).sum(axis=(1, 3), keepdims=True) / count
        mx.eval(mean)
    variance = mx.zeros((b, 1, groups, 1))
    for start in range(0, h, step):
        variance = variance + ((grouped(start) - mean) ** 2).sum(axis=(1, 3), keepdims=True) / count
        mx.eval(variance)
    inverse = mx.rsqrt(variance + eps)
    strips = []
    for start in range(0, h, step):
        part = ((grouped(start) - mean) * inverse).reshape(b, -1, width, c)
        strips.append((part * w[f"{name}.weight"] + w[f"{name}.bias"]).astype(x.dtype))
        mx.eval(strips[-1])
    return strips[0] if len(strips) == 1 else mx.concatenate(strips, axis=1)
