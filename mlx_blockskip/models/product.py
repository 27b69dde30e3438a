"""Products with a frozen weight: MLX's own, but for those that its CPU backend is slow at (`models/cpu.py`)."""

import os
from collections.abc import Callable
from functools import cache
from typing import cast

import mlx.core as mx

from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.models import cpu

GRADIENT_VARIABLE = "MLX_BLOCKSKIP_QUANTIZED_GRADIENT"

Quantized = tuple[mx.array, mx.array, mx.array]
"""Packed weights, scales and biases of `mx.quantize`."""

Pull = Callable[[mx.array, Quantized, int, int], mx.array]
"""`(cotangent, weight, group, bits) -> cotangent of the input`."""


def matmul(x: mx.array, weight: mx.array, bias: mx.array | None = None) -> mx.array:
    """x W^T + b: x (..., in), weight (out, in), bias (out,) -> (..., out).

    On the CPU a weight that is not in float32 gets no gradient.
    """
    if weight.dtype != mx.float32 and cpu.in_use():
        y = cpu.matmul(x, weight)
        return y if bias is None else y + bias
    return x @ weight.T if bias is None else mx.addmm(bias, x, weight.T)


def quantized_matmul(
    x: mx.array, packed: mx.array, scales: mx.array, biases: mx.array, bias: mx.array | None = None
) -> mx.array:
    """x W^T + b for a weight of `mx.quantize`; bits and group size follow from the shapes."""
    group = x.shape[-1] // scales.shape[-1]
    bits = packed.shape[-1] * 32 // x.shape[-1]
    if cpu.in_use():
        y = cpu.quantized_matmul(x, packed, scales, biases, group, bits)
    else:
        y = _quantized((packed, scales, biases), group, bits)(x)
    return y if bias is None else y + bias


def _quantized(weight: Quantized, group: int, bits: int) -> Callable[[mx.array], mx.array]:
    """MLX's product, whose gradient for x goes as `gradient_through` says."""
    pull = GRADIENTS[gradient_through()]

    @mx.custom_function
    def product(x: mx.array) -> mx.array:
        return mx.quantized_matmul(x, *weight, transpose=True, group_size=group, bits=bits)

    @product.vjp
    def pull_back(x: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
        return pull(cotangent, weight, group, bits)

    return cast(Callable[[mx.array], mx.array], product)


def through_packed(cotangent: mx.array, weight: Quantized, group: int, bits: int) -> mx.array:
    """The gradient through a quantized weight as MLX has it: cotangent (..., out) -> (..., in)."""
    return mx.quantized_matmul(cotangent, *weight, transpose=False, group_size=group, bits=bits)


def through_whole(cotangent: mx.array, weight: Quantized, group: int, bits: int) -> mx.array:
    """The same by a weight that is made whole first, which takes its memory in the cotangent's type."""
    return cotangent @ mx.dequantize(*weight, group_size=group, bits=bits).astype(cotangent.dtype)


GRADIENTS: dict[str, Pull] = {"packed": through_packed, "whole": through_whole}


@cache
def gradient_through() -> str:
    """Which of GRADIENTS is used on Metal, read once from MLX_BLOCKSKIP_QUANTIZED_GRADIENT; packed where it is not set.

    An M5's matrix units take the whole weight and not the packed one; which is faster there has to be measured.
    """
    name = os.environ.get(GRADIENT_VARIABLE) or "packed"
    if name not in GRADIENTS:
        raise UserError(f"{GRADIENT_VARIABLE}: {name!r} is not known; use {' or '.join(GRADIENTS)}")
    return name


def attention(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array | None) -> mx.array:
    """softmax(scale q k^T + mask) v with its scores written out: q (B, H, Lq, d); k, v (B, H, Lk, d).

    Not `mx.fast.scaled_dot_product_attention` on Metal: it takes one kernel outside `mx.vjp` and another inside.
    """
    if cpu.in_use():
        return cpu.attention(q, k, v, scale, mask)
    scores = (q * scale) @ k.swapaxes(-1, -2)
    scores = scores if mask is None else scores + mask.astype(scores.dtype)
    return mx.softmax(scores, axis=-1, precise=True) @ v


FUSED_HEAD_DIMS = (64, 72, 80, 96, 128)
"""Head dims of Metal's fused attention. It has 192 and 256 too, where MLX finds the scores written out faster."""

FUSED_QUERIES = 9
"""The fewest queries that this kernel takes."""


def is_fused(q: mx.array, v: mx.array) -> bool:
    """Whether Metal's fused attention is there and takes these queries and values; by device and shapes alone."""
    return bool(mx.metal.is_available()) and not cpu.in_use() and fits_fused(q, v)


def fits_fused(q: mx.array, v: mx.array) -> bool:
    """Whether that kernel takes queries and values of these shapes."""
    return q.shape[-1] == v.shape[-1] and q.shape[-1] in FUSED_HEAD_DIMS and q.shape[2] >= FUSED_QUERIES


def fused_attention(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array | None) -> mx.array:
    """The same by Metal's fused kernel, which keeps no scores; where `is_fused`. It has no gradient of its own."""
    mask = None if mask is None else mask.astype(q.dtype)
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask, force_fused=True)
