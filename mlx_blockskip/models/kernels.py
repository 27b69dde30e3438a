"""Chains of elementwise operations as one Metal kernel each: GELU, SiLU, rotary positions, group norm.

MLX runs each operation of such a chain as a kernel of its own, which reads and writes the whole array. `mx.compile` is
no way out: it leaves a function alone whose inputs are being differentiated, so a block's forward pass would be made
by one kernel and its recomputation by others, which may round otherwise. A kernel of ours is the same both ways.

They compute in float32 and round once, and are taken on Metal alone. Before the first use each is held against the same
chain in MLX's own operations; if one does not compile or says something else, none is used. `MLX_BLOCKSKIP_KERNELS=0`
turns them off.
"""

import os
from collections.abc import Callable, Sequence
from functools import cache
from typing import cast

import mlx.core as mx

from mlx_blockskip.models import cpu

VARIABLE = "MLX_BLOCKSKIP_KERNELS"

GELU_SLOPE, GELU_CUBE = 0.7978845608028654, 0.044715

TOGETHER = 256
"""Threads of a group."""

SOURCES = {
    # x, dy, y: any shape
    "gelu": f"""
        uint i = thread_position_in_grid.x;
        float v = float(x[i]);
        float t = metal::precise::tanh({GELU_SLOPE}f * (v + {GELU_CUBE}f * v * v * v));
        y[i] = T(0.5f * v * (1.0f + t));
    """,
    "gelu_back": f"""
        uint i = thread_position_in_grid.x;
        float v = float(x[i]);
        float t = metal::precise::tanh({GELU_SLOPE}f * (v + {GELU_CUBE}f * v * v * v));
        float slope = {GELU_SLOPE}f * (1.0f + 3.0f * {GELU_CUBE}f * v * v);
        y[i] = T(float(dy[i]) * 0.5f * (1.0f + t + v * (1.0f - t * t) * slope));
    """,
    "silu": """
        uint i = thread_position_in_grid.x;
        float v = float(x[i]);
        y[i] = T(v / (1.0f + metal::precise::exp(-v)));
    """,
    "silu_back": """
        uint i = thread_position_in_grid.x;
        float v = float(x[i]);
        float s = 1.0f / (1.0f + metal::precise::exp(-v));
        y[i] = T(float(dy[i]) * s * (1.0f + v * (1.0f - s)));
    """,
    # x: (B, H, L, d), any strides; cosines, sines: (L, d / 2), float32; a thread turns a pair
    "rope": """
        uint pair = thread_position_in_grid.x;
        uint half_width = x_shape[3] / 2;
        uint column = pair % half_width;
        uint row = pair / half_width % x_shape[2];
        uint head = pair / half_width / x_shape[2] % x_shape[1];
        uint sample = pair / half_width / x_shape[2] / x_shape[1];
        size_t at = sample * x_strides[0] + head * x_strides[1] + row * x_strides[2] + 2 * column * x_strides[3];
        float even = float(x[at]);
        float odd = float(x[at + x_strides[3]]);
        float c = cosines[row * cosines_strides[0] + column * cosines_strides[1]];
        float s = sines[row * sines_strides[0] + column * sines_strides[1]];
        s = BACK ? -s : s;
        y[2 * pair] = T(even * c - odd * s);
        y[2 * pair + 1] = T(odd * c + even * s);
    """,
    # x: (B, rows, W, C); mean, inverse: (B, 1, groups, 1), float32; weight, bias: (C,)
    "group_norm": """
        uint i = thread_position_in_grid.x;
        uint channels = x_shape[3];
        uint channel = i % channels;
        uint sample = i / channels / x_shape[2] / x_shape[1];
        uint group = sample * mean_shape[2] + channel * mean_shape[2] / channels;
        float v = (float(x[i]) - mean[group]) * inverse[group];
        v = v * float(weight[channel]) + float(bias[channel]);
        y[i] = T(SILU ? v / (1.0f + metal::precise::exp(-v)) : v);
    """,
}
"""Bodies of kernels that write y from the inputs in INPUTS. T is the type of x and y."""

INPUTS = {
    "gelu": ("x",),
    "gelu_back": ("x", "dy"),
    "silu": ("x",),
    "silu_back": ("x", "dy"),
    "rope": ("x", "cosines", "sines"),
    "group_norm": ("x", "mean", "inverse", "weight", "bias"),
}

ANY_STRIDES = ("rope",)
"""Kernels whose inputs need not be contiguous."""


def _differentiable(name: str) -> Callable[[mx.array], mx.array]:
    """A kernel for x of any shape, whose gradient is another: the cotangent times its derivative at x."""

    @mx.custom_function
    def forward(x: mx.array) -> mx.array:
        return _run(name, [x], x.size)

    @forward.vjp
    def back(x: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
        return _run(f"{name}_back", [x, cotangent], x.size)

    return cast(Callable[[mx.array], mx.array], forward)


gelu = _differentiable("gelu")
"""The tanh approximation of GELU."""

silu = _differentiable("silu")
"""x sigmoid(x)."""


def rope(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """Neighbouring pairs of the last axis, turned: x (B, H, L, d); cos, sin (L, d / 2), which get no gradient."""

    @mx.custom_function
    def turned(x: mx.array) -> mx.array:
        return _run("rope", [x, cos, sin], x.size // 2, BACK=False)

    @turned.vjp
    def back(x: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
        return _run("rope", [cotangent, cos, sin], x.size // 2, BACK=True)

    return cast(mx.array, turned(x))


def group_norm(
    x: mx.array, mean: mx.array, inverse: mx.array, weight: mx.array, bias: mx.array, silu: bool
) -> mx.array:
    """(x - mean) inverse weight + bias, then SiLU if wished, of some rows of a map (B, rows, W, C); without a gradient.

    mean and inverse: (B, 1, groups, 1), float32; weight and bias: (C,).
    """
    return _run("group_norm", [x, mean, inverse, weight, bias], x.size, SILU=silu)


def in_use() -> bool:
    """Whether the kernels are there, wanted and right; found out once."""
    return not cpu.in_use() and refusal() is None


@cache
def refusal() -> str | None:
    """Why the kernels are not used, in a sentence; None where they are."""
    if os.environ.get(VARIABLE) == "0":
        return f"{VARIABLE} is 0"
    if not mx.metal.is_available():
        return "there is no Metal here"
    try:
        wrong = [name for name, (ours, plain) in _trials().items() if not _near(ours, plain)]
    except Exception as error:
        return f"they do not run: {error}"
    return f"other values than MLX's own operations: {', '.join(wrong)}" if wrong else None


def _run(name: str, inputs: Sequence[mx.array], threads: int, **constants: bool) -> mx.array:
    x = inputs[0]
    (y,) = _kernel(name)(
        inputs=list(inputs),
        template=[("T", x.dtype), *constants.items()],
        grid=(threads, 1, 1),
        threadgroup=(TOGETHER, 1, 1),
        output_shapes=[x.shape],
        output_dtypes=[x.dtype],
    )
    return y


@cache
def _kernel(name: str) -> Callable[..., list[mx.array]]:
    return cast(
        Callable[..., list[mx.array]],
        mx.fast.metal_kernel(
            name=f"blockskip_{name}",
            input_names=list(INPUTS[name]),
            output_names=["y"],
            source=SOURCES[name],
            ensure_row_contiguous=name not in ANY_STRIDES,
        ),
    )


def _trials() -> dict[str, tuple[mx.array, mx.array]]:
    """By kernel and type what it says of a small input, and what MLX's own operations say of the same in float32."""
    angles = mx.arange(8, dtype=mx.float32).reshape(4, 2)
    cos, sin = mx.cos(angles), mx.sin(angles)
    mean, inverse = (mx.arange(1, 5, dtype=mx.float32).reshape(2, 1, 2, 1) * by for by in (0.2, 0.7))

    def turn(x: mx.array) -> mx.array:
        return rope(x, cos, sin)

    def plain_turn(x: mx.array) -> mx.array:
        return _rope(x, cos, sin)

    found: dict[str, tuple[mx.array, mx.array]] = {}
    for dtype in (mx.float32, mx.bfloat16):
        x, dy = ((mx.sin(mx.arange(1, 97) * step) * 3).reshape(2, 4, 3, 4).astype(dtype) for step in (0.7, 1.3))
        heads, dy_heads = x.transpose(0, 2, 1, 3), dy.transpose(0, 2, 1, 3)
        weight, bias = (mx.arange(1, 5).astype(dtype) * by for by in (0.5, -0.5))
        normed = _normed(_wide(x), mean, inverse, _wide(weight), _wide(bias))
        these = {
            "gelu": (gelu(x), _gelu(_wide(x))),
            "gelu_back": (_back(gelu, x, dy), _back(_gelu, _wide(x), _wide(dy))),
            "silu": (silu(x), _silu(_wide(x))),
            "silu_back": (_back(silu, x, dy), _back(_silu, _wide(x), _wide(dy))),
            "rope": (turn(heads), plain_turn(_wide(heads))),
            "rope back": (_back(turn, heads, dy_heads), _back(plain_turn, _wide(heads), _wide(dy_heads))),
            "group_norm": (group_norm(x, mean, inverse, weight, bias, False), normed),
            "group_norm with SiLU": (group_norm(x, mean, inverse, weight, bias, True), _silu(normed)),
        }
        found |= {f"{name} in {dtype}": pair for name, pair in these.items()}
    return found


def _back(function: Callable[[mx.array], mx.array], x: mx.array, cotangent: mx.array) -> mx.array:
    return mx.vjp(function, [x], [cotangent])[1][0]


def _near(ours: mx.array, plain: mx.array) -> bool:
    bound = 1e-5 if ours.dtype == mx.float32 else 2**-8
    return bool(mx.all(mx.abs(_wide(ours) - plain) <= bound * (1 + mx.abs(plain))).item())


def _wide(x: mx.array) -> mx.array:
    return x.astype(mx.float32)


def _gelu(x: mx.array) -> mx.array:
    return 0.5 * x * (1 + mx.tanh(GELU_SLOPE * (x + GELU_CUBE * x * x * x)))


def _silu(x: mx.array) -> mx.array:
    return x * mx.sigmoid(x)


def _rope(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    even, odd = x[..., ::2], x[..., 1::2]
    return mx.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1).reshape(x.shape)


def _normed(x: mx.array, mean: mx.array, inverse: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    groups = x.reshape(x.shape[0], -1, mean.shape[2], x.shape[3] // mean.shape[2])
    return ((groups - mean) * inverse).reshape(x.shape) * weight + bias
