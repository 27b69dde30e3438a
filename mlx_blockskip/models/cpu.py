"""Products that only MLX's CPU backend needs; on Metal nothing here is used.

That backend has a fast product for float32 alone: bfloat16 runs about 30 times and 4 bit 400 times slower there. So a
frozen weight is turned into float32 some rows at a time, inputs go in as float32, and the sum, taken in float32, is
rounded once. The same is done on the way back. The copies are bounded by WEIGHT_BYTES and TOKEN_BYTES.
"""

import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import cast

import mlx.core as mx

from mlx_blockskip.engine import sampled

WEIGHT_BYTES = 8 << 20
"""Some rows of a weight, in float32. A constant, so that parts follow from shapes alone."""

TOKEN_BYTES = 32 << 20
"""Some tokens, in float32."""

SAMPLED = 2
"""Parts of a weight that a sample makes: MLX's CPU backend counts ten operations as one, so that some are at work."""

Pull = Callable[[mx.array], mx.array]
Slab = Callable[[int, int, Sequence[mx.array]], mx.array]
"""`(start, stop, after) -> columns start..stop-1 of a matrix in float32`, made when `after` is there."""


def in_use() -> bool:
    """Whether arrays are computed by the CPU backend."""
    return bool(mx.default_device().type == mx.DeviceType.cpu)


def matmul(x: mx.array, weight: mx.array) -> mx.array:
    """x W^T: x (..., in), weight (out, in) in any float type -> (..., out). The weight gets no gradient."""

    def rows(start: int, stop: int, after: Sequence[mx.array]) -> mx.array:
        return _after(weight[start:stop], after).astype(mx.float32).T

    def columns(start: int, stop: int, after: Sequence[mx.array]) -> mx.array:
        return _after(weight[:, start:stop], after).astype(mx.float32)

    return _frozen(rows, columns, weight.shape[0], 1)(x)


def quantized_matmul(
    x: mx.array, packed: mx.array, scales: mx.array, biases: mx.array, group: int, bits: int
) -> mx.array:
    """x W^T for a weight of `mx.quantize` with groups of `group` weights in `bits` bits each."""

    def whole(p: mx.array, s: mx.array, b: mx.array, after: Sequence[mx.array]) -> mx.array:
        return mx.dequantize(_after(p, after), s, b, group_size=group, bits=bits).astype(mx.float32)

    def rows(start: int, stop: int, after: Sequence[mx.array]) -> mx.array:
        return whole(packed[start:stop], scales[start:stop], biases[start:stop], after).T

    def columns(start: int, stop: int, after: Sequence[mx.array]) -> mx.array:
        these = slice(start // group, stop // group)
        return whole(packed[:, start * bits // 32 : stop * bits // 32], scales[:, these], biases[:, these], after)

    return _frozen(rows, columns, packed.shape[0], group)(x)


def attention(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array | None) -> mx.array:
    """Attention with products in float32, in the type of q. q (B, H, Lq, d); k, v (B, H, Lk, d)."""
    dtype = q.dtype
    q, k, v = (x.astype(mx.float32) for x in (q, k, v))
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask).astype(dtype)


def _frozen(rows: Slab, columns: Slab, outputs: int, group: int) -> Pull:
    """x -> x W^T with a gradient for x alone. rows: of W, transposed; columns: of W, in multiples of `group`."""

    @mx.custom_function
    def product(x: mx.array) -> mx.array:
        return _product(x, rows, outputs, 1)

    @product.vjp
    def pull_back(x: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
        return _product(cotangent, columns, x.shape[-1], group)

    return cast(Pull, product)


def _product(x: mx.array, slab: Slab, outputs: int, multiple: int) -> mx.array:
    """x M for a matrix M (in, outputs) given by slabs of its columns, one slab and some tokens at a time."""
    width = x.shape[-1]
    flat = x.reshape(-1, width)
    step = max(1, WEIGHT_BYTES // (4 * width) // multiple) * multiple
    count = max(1, TOKEN_BYTES // (4 * width))
    done: list[mx.array] = []
    after: list[mx.array] = []
    for first in range(0, flat.shape[0], count):
        tokens = _after(flat[first : first + count], after).astype(mx.float32)
        parts: list[mx.array] = []
        starts, sample = range(0, outputs, step), sampled.current()
        made = starts if sample is None else starts[:SAMPLED]
        for start in made:
            parts.append((tokens @ slab(start, min(start + step, outputs), after)).astype(x.dtype))
            after = parts[-1:]
        if sample is not None and len(made) < len(starts):
            sample.leave_out(len(starts) - len(made), partial(_seconds, tokens.shape[0], width, step))
            parts.append(mx.zeros((tokens.shape[0], outputs - step * len(made)), x.dtype))
        done.append(mx.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0])
    found = mx.concatenate(done, axis=0) if len(done) > 1 else done[0]
    return found.reshape(*x.shape[:-1], outputs)


@cache
def _seconds(tokens: int, width: int, columns: int) -> float:
    """What the product of so many tokens with a slab takes."""
    x, slab = mx.zeros((tokens, width)), mx.zeros((width, columns))
    mx.eval(x, slab)
    began = time.perf_counter()
    mx.eval(x @ slab)
    return time.perf_counter() - began


def _after(array: mx.array, others: Sequence[mx.array]) -> mx.array:
    """The same array, there once the others are: MLX evaluates many branches of a graph side by side."""
    return mx.depends([array], list(others))[0] if others else array
