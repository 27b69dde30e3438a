"""Trials of single operations that are known to differ between backends: attention, convolution, float32 products; and
of what they depend on.
"""

import math
import os
from collections.abc import Sequence
from functools import partial

import mlx.core as mx
import numpy as np

from mlx_blockskip.engine import environment, limits, philox
from mlx_blockskip.models import kernels as elementwise
from mlx_blockskip.models.attention import attention
from mlx_blockskip.models.vae.strips import conv2d
from mlx_blockskip.tasks.doctor.trials import Trial
from mlx_blockskip.tasks.doctor.workshop import Workshop, as_numpy, difference

SEED = 13
HEAD_DIMS = (64, 128)
"""For these MLX has a fused kernel on Metal, which it leaves aside inside a gradient."""

HEADS, LENGTH = 2, 320
CHANNELS, SIDE = 128, 64
"""A convolution that Metal would give to Winograd: 3 x 3, and no fewer channels and pixels."""

PRODUCT = 512

FUSED = (
    "Attention inside a gradient is another kernel than outside, so a block and its recomputation differ by rounding, "
    "and streamed and kept activations give different adapters. Results are usable; update mlx and mlx-blockskip, and "
    "report it."
)
ATTENTION = "MLX's attention is wrong here at this head dim. Update MLX and macOS, and report it; do not train before."
CONVOLUTION = (
    "Convolutions in bfloat16 lose precision (Winograd): images and latents are off by 2 to 6 % a layer. "
    "Set MLX_CONV_WINOGRAD_WORKING_SET=1 before MLX is imported, with mlx 0.32.4 or later, or convert with --dtype "
    "float32."
)
PRECISE = (
    "Products of float32 are computed with fewer digits (TF32), which parity and SANA's attention rely on. Set "
    "MLX_ENABLE_TF32=0 before MLX is imported."
)


SETTINGS = (
    "MLX_CONV_WINOGRAD_WORKING_SET or MLX_ENABLE_TF32 is not what exact results need, or was set after MLX was in use. "
    "Unset them, and import mlx_blockskip before computing with MLX."
)
ELEMENTWISE = (
    "The elementwise kernels do not run here or give other values than MLX's own operations, which are used instead: "
    "results are right, steps are slower. Report it; MLX_BLOCKSKIP_KERNELS=0 turns the kernels off."
)


def inputs(head_dim: int) -> list[mx.array]:
    """q, k, v and an upstream gradient, each (1, HEADS, LENGTH, head_dim) in bfloat16."""
    shape = (1, HEADS, LENGTH, head_dim)
    return [mx.array(philox.normal(SEED, i, shape=shape)).astype(mx.bfloat16) for i in range(4)]


def attended(head_dim: int) -> list[mx.array]:
    """Attention outside of a gradient, inside of one, and its gradients for q, k and v."""
    *qkv, upstream = inputs(head_dim)
    scale = 1 / math.sqrt(head_dim)
    outside = attention(*qkv, scale=scale)
    mx.eval(outside)
    inside, pulled = mx.vjp(lambda *qkv: [attention(*qkv, scale=scale)], qkv, [upstream])
    mx.eval(inside, pulled)
    return [outside, *inside, *pulled]


def expected(head_dim: int) -> list[np.ndarray]:
    """The output and the gradients of q, k and v, in float64."""
    q, k, v, upstream = (as_numpy(x) for x in inputs(head_dim))
    scale = 1 / math.sqrt(head_dim)
    scores = scale * q @ k.swapaxes(2, 3)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    pulled = upstream @ v.swapaxes(2, 3)
    pulled = scale * weights * (pulled - np.sum(pulled * weights, axis=-1, keepdims=True))
    return [weights @ v, pulled @ k, pulled.swapaxes(2, 3) @ q, weights.swapaxes(2, 3) @ upstream]


def _attended(head_dim: int, workshop: Workshop) -> list[np.ndarray]:
    return workshop.once(("attention", head_dim), lambda: [as_numpy(x) for x in attended(head_dim)])


def fused_error(head_dim: int, workshop: Workshop) -> float:
    """Outside against inside of a gradient."""
    outside, inside, *_ = _attended(head_dim, workshop)
    return difference(inside, outside)


def forward_error(head_dim: int, workshop: Workshop) -> float:
    """Both against float64."""
    outside, inside, *_ = _attended(head_dim, workshop)
    output, *_ = expected(head_dim)
    return max(difference(outside, output), difference(inside, output))


def gradient_error(head_dim: int, workshop: Workshop) -> float:
    """The worst of the three gradients against float64."""
    _, _, *pulled = _attended(head_dim, workshop)
    return _worst(pulled, expected(head_dim)[1:])


def _worst(found: Sequence[np.ndarray], right: Sequence[np.ndarray]) -> float:
    return max(difference(a, b) for a, b in zip(found, right, strict=True))


def convolution_error(_: Workshop) -> float:
    """A convolution in bfloat16 against nine products of the same numbers in float32."""
    x = mx.array(philox.normal(SEED, 5, shape=(1, SIDE, SIDE, CHANNELS))).astype(mx.bfloat16)
    kernel = philox.normal(SEED, 6, shape=(CHANNELS, 3, 3, CHANNELS)) / math.sqrt(9 * CHANNELS)
    weight = mx.array(kernel).astype(mx.bfloat16)
    found = as_numpy(conv2d({"conv.weight": weight}, "conv", x))
    return difference(found, convolved(as_numpy(x), as_numpy(weight)))


def convolved(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """A 3 x 3 convolution with one pixel of zeros around: (1, H, W, C), (O, 3, 3, C) -> (1, H, W, O) in float32."""
    _, height, width, _ = x.shape
    padded = np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)]).astype(np.float32)
    w = weight.astype(np.float32)
    parts = (padded[:, i : i + height, j : j + width] @ w[:, i, j].T for i in range(3) for j in range(3))
    return np.asarray(sum(parts))


def product_error(_: Workshop) -> float:
    """A product of float32 against float64."""
    a, b = (philox.normal(SEED, i, shape=(PRODUCT, PRODUCT)) for i in (8, 9))
    found = multiplied(mx.array(a), mx.array(b))
    return difference(as_numpy(found), a.astype(np.float64) @ b.astype(np.float64))


def multiplied(a: mx.array, b: mx.array) -> mx.array:
    """MLX's own product."""
    return a @ b


def settings_in_doubt(_: Workshop) -> float:
    """How many of MLX's settings are not as the package wants them, or were made after MLX had read them."""
    return sum(setting.value != setting.wanted or setting.late for setting in environment.state().values())


def kernels_refused(_: Workshop) -> float:
    """1 where this machine has Metal and the elementwise kernels are not used there, though nobody turned them off."""
    wanted = limits.on_metal() and os.environ.get(elementwise.VARIABLE) != "0"
    return float(wanted and elementwise.refusal() is not None)


def _trials() -> list[Trial]:
    unit = "relative rms"
    found = [
        Trial("float32 products", product_error, 2e-5, unit, PRECISE, quick=True),
        Trial("convolution in bfloat16", convolution_error, 0.005, unit, CONVOLUTION, quick=True),
        Trial("settings of MLX in doubt", settings_in_doubt, 0, "settings", SETTINGS, quick=True),
        Trial("elementwise kernels refused", kernels_refused, 0, "of 1", ELEMENTWISE, quick=True),
    ]
    for dim in HEAD_DIMS:
        name = f"attention, head dim {dim}"
        found += [
            Trial(f"{name}: with = without gradient", partial(fused_error, dim), 0, unit, FUSED, quick=True),
            Trial(f"{name}: output", partial(forward_error, dim), 0.01, unit, ATTENTION, quick=True),
            Trial(f"{name}: gradient", partial(gradient_error, dim), 0.03, unit, ATTENTION, quick=True),
        ]
    return found


TRIALS = tuple(_trials())
