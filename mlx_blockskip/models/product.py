"""Products with a frozen weight: MLX's own, but for those that its CPU backend is slow at (`models/cpu.py`)."""

import mlx.core as mx

from mlx_blockskip.models import cpu


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
        y = mx.quantized_matmul(x, packed, scales, biases, transpose=True, group_size=group, bits=bits)
    return y if bias is None else y + bias


def attention(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array | None) -> mx.array:
    """MLX's fused attention: q (B, H, Lq, d); k, v (B, H, Lk, d); mask is added to the scores."""
    if cpu.in_use():
        return cpu.attention(q, k, v, scale, mask)
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
