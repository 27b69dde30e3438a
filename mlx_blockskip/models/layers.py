"""Layers as functions of a flat dictionary of weights, shared by every network of the project.

Weights carry diffusers' module paths: `linear(w, "attn.to_q", x)` reads `attn.to_q.weight` and, where they exist,
`.bias`, `.scales` and `.biases` (quantized by `mx.quantize`; bits and group size follow from the shapes).
"""

import math
from collections.abc import Callable, Mapping
from typing import cast

import mlx.core as mx

from mlx_blockskip.models import kernels
from mlx_blockskip.models.kernels import GELU_CUBE, GELU_SLOPE
from mlx_blockskip.models.product import matmul, quantized_matmul

Weights = Mapping[str, mx.array]


class UsedOnce(dict[str, mx.array]):
    """Weights for one run through a network, which lets go of each layer's when it is through."""


def through(w: Weights, prefix: str) -> None:
    """Say that nothing under `prefix` is needed any more: of weights that are `UsedOnce` it is let go."""
    if isinstance(w, UsedOnce):
        for name in [name for name in w if name.startswith(prefix)]:
            del w[name]


TOKEN_ROWS = 1024
"""Tokens that a feed-forward takes at a time. A constant, so that parts follow from shapes alone."""


def by_rows(function: Callable[..., mx.array], *inputs: mx.array) -> mx.array:
    """function(*inputs), TOKEN_ROWS tokens at a time: exact where each token's output depends on that token alone.

    inputs: (B, L, ...) each. What the function makes in between is then in memory for some tokens only: each part waits
    for the one before it, because MLX evaluates many branches of a graph side by side.
    """
    length = inputs[0].shape[1]
    if length <= TOKEN_ROWS:
        return function(*inputs)
    done: list[mx.array] = []
    for start in range(0, length, TOKEN_ROWS):
        part = [x[:, start : start + TOKEN_ROWS] for x in inputs]
        done.append(function(*(mx.depends(part, done[-1:]) if done else part)))
    return mx.concatenate(done, axis=1)


def linear(w: Weights, name: str, x: mx.array, trainable: Weights | None = None) -> mx.array:
    """y = x W^T + b, plus (x A) B where `trainable` has `{name}.lora_a` (in, r) and `{name}.lora_b` (r, out).

    x: (..., in). The low-rank factors are cast to x's dtype.
    """
    weight, bias, scales = w[f"{name}.weight"], w.get(f"{name}.bias"), w.get(f"{name}.scales")
    packed = None if scales is None else (scales, w[f"{name}.biases"])
    y = matmul(x, weight, bias) if packed is None else quantized_matmul(x, weight, *packed, bias)
    if trainable and (a := trainable.get(f"{name}.lora_a")) is not None:
        b = trainable[f"{name}.lora_b"]
        y = y + (x @ a.astype(x.dtype)) @ b.astype(x.dtype)
    return y


def layer_norm(x: mx.array, eps: float, w: Weights | None = None, name: str = "") -> mx.array:
    """LayerNorm over the last axis; affine where `w` is given."""
    if w is None:
        return mx.fast.layer_norm(x, None, None, eps)
    return mx.fast.layer_norm(x, w[f"{name}.weight"], w.get(f"{name}.bias"), eps)


def rms_norm(w: Weights, name: str, x: mx.array, eps: float) -> mx.array:
    """RMSNorm over the last axis with a learned scale."""
    return mx.fast.rms_norm(x, w[f"{name}.weight"], eps)


def modulated(x: mx.array, shift: mx.array, scale: mx.array) -> mx.array:
    """x (1 + scale) + shift: x (B, L, D); shift, scale (B or 1, 1, D). On Metal it is one kernel, and its derivative
    by x another; the modulation gets no gradient there.
    """
    return kernels.modulate(x, shift, scale) if kernels.in_use() else x * (1 + scale) + shift


def gate_add(x: mx.array, gate: mx.array, branch: mx.array) -> mx.array:
    """x + gate branch: x, branch (B, L, D); gate (B or 1, 1, D). As `modulated`."""
    return kernels.gate_add(x, gate, branch) if kernels.in_use() else x + gate * branch


def silu(x: mx.array) -> mx.array:
    """x sigmoid(x). On Metal it is one kernel, and its derivative another."""
    return kernels.silu(x) if kernels.in_use() else x * mx.sigmoid(x)


def gelu_tanh(x: mx.array) -> mx.array:
    """The tanh approximation of GELU (`gelu-approximate` in diffusers, `gelu_new` in transformers).

    Its derivative is written out: autograd would hold ten arrays of x's size. On Metal each is one kernel.
    """
    return kernels.gelu(x) if kernels.in_use() else cast(mx.array, _gelu(x))


@mx.custom_function
def _gelu(x: mx.array) -> mx.array:
    return 0.5 * x * (1 + _gelu_tanh(x))


@_gelu.vjp
def _gelu_vjp(x: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
    t = _gelu_tanh(x)
    slope = GELU_SLOPE * (1 + 3 * GELU_CUBE * (x * x))
    return cotangent * (0.5 * (1 + t + x * (1 - t * t) * slope))


def _gelu_tanh(x: mx.array) -> mx.array:
    return mx.tanh(GELU_SLOPE * (x + GELU_CUBE * x * x * x))


def quick_gelu(x: mx.array) -> mx.array:
    """x sigmoid(1.702 x), CLIP's activation."""
    return x * mx.sigmoid(1.702 * x)


def sinusoid(t: mx.array, width: int = 256) -> mx.array:
    """(B, width): cosines, then sines. Source: diffusers Timesteps(flip_sin_to_cos=True, downscale_freq_shift=0)."""
    frequencies = mx.exp(-math.log(10000) * mx.arange(width // 2, dtype=mx.float32) / (width // 2))
    angles = t.astype(mx.float32)[:, None] * frequencies[None]
    return mx.concatenate([mx.cos(angles), mx.sin(angles)], axis=-1)


def split_heads(x: mx.array, heads: int) -> mx.array:
    """(B, L, heads * d) -> (B, heads, L, d)."""
    batch, length, width = x.shape
    return x.reshape(batch, length, heads, width // heads).transpose(0, 2, 1, 3)


def merge_heads(x: mx.array) -> mx.array:
    """(B, heads, L, d) -> (B, L, heads * d)."""
    batch, heads, length, width = x.shape
    return x.transpose(0, 2, 1, 3).reshape(batch, length, heads * width)
