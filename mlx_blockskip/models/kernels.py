"""Chains of elementwise operations as one Metal kernel each: GELU, SiLU, modulation, rotary positions, group norm.

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
from mlx_blockskip.models.kernel_sources import ANY_STRIDES, GELU_CUBE, GELU_SLOPE, INPUTS, SOURCES

VARIABLE = "MLX_BLOCKSKIP_KERNELS"

TOGETHER = 256
"""Threads of a group."""


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


def modulate(x: mx.array, shift: mx.array, scale: mx.array) -> mx.array:
    """x (1 + scale) + shift: x (B, L, D); shift, scale (B or 1, 1, D), which get no gradient."""

    @mx.custom_function
    def forward(x: mx.array) -> mx.array:
        return _run("modulate", [x, shift, scale], x.size)

    @forward.vjp
    def back(x: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
        return _run("scale_back", [cotangent, scale], x.size, FROM_ONE=True)

    return cast(mx.array, forward(x))


def gate_add(x: mx.array, gate: mx.array, branch: mx.array) -> mx.array:
    """x + gate branch: x, branch (B, L, D); gate (B or 1, 1, D), which gets no gradient."""

    @mx.custom_function
    def forward(x: mx.array, branch: mx.array) -> mx.array:
        return _run("gate_add", [x, branch, gate], x.size)

    @forward.vjp
    def back(primals: list[mx.array], cotangent: mx.array, _: mx.array) -> tuple[mx.array, mx.array]:
        return cotangent, _run("scale_back", [cotangent, gate], cotangent.size, FROM_ONE=False)

    return cast(mx.array, forward(x, branch))


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
    return {
        f"{name} in {dtype}": pair for dtype in (mx.float32, mx.bfloat16) for name, pair in _trials_in(dtype).items()
    }


def _trials_in(dtype: mx.Dtype) -> dict[str, tuple[mx.array, mx.array]]:
    x, dy = ((mx.sin(mx.arange(1, 97) * step) * 3).reshape(2, 4, 3, 4).astype(dtype) for step in (0.7, 1.3))
    angles = mx.arange(8, dtype=mx.float32).reshape(4, 2)
    cos, sin = mx.cos(angles), mx.sin(angles)
    heads, dy_heads = x.transpose(0, 2, 1, 3), dy.transpose(0, 2, 1, 3)
    mean, inverse = (mx.arange(1, 5, dtype=mx.float32).reshape(2, 1, 2, 1) * by for by in (0.2, 0.7))
    weight, bias = (mx.arange(1, 5).astype(dtype) * by for by in (0.5, -0.5))
    normed = _normed(_wide(x), mean, inverse, _wide(weight), _wide(bias))
    rows, dy_rows = x.reshape(2, 16, 3), dy.reshape(2, 16, 3)
    shift, scale = ((mx.arange(1, 7) * by).reshape(2, 1, 3).astype(dtype) for by in (0.3, -0.2))

    def turn(x: mx.array) -> mx.array:
        return rope(x, cos, sin)

    def plain_turn(x: mx.array) -> mx.array:
        return _rope(x, cos, sin)

    return {
        "gelu": (gelu(x), _gelu(_wide(x))),
        "gelu_back": (_back(gelu, x, dy), _back(_gelu, _wide(x), _wide(dy))),
        "silu": (silu(x), _silu(_wide(x))),
        "silu_back": (_back(silu, x, dy), _back(_silu, _wide(x), _wide(dy))),
        "modulate": (modulate(rows, shift, scale), _wide(rows) * (1 + _wide(scale)) + _wide(shift)),
        "gate_add": (gate_add(rows, scale, dy_rows), _wide(rows) + _wide(scale) * _wide(dy_rows)),
        "scale_back": (
            _back(lambda x: modulate(x, shift, scale), rows, dy_rows),
            _wide(dy_rows) * (1 + _wide(scale)),
        ),
        "scale_back of a gate": (
            _back(lambda x: gate_add(rows, scale, x), rows, dy_rows),
            _wide(dy_rows) * _wide(scale),
        ),
        "rope": (turn(heads), plain_turn(_wide(heads))),
        "rope back": (_back(turn, heads, dy_heads), _back(plain_turn, _wide(heads), _wide(dy_heads))),
        "group_norm": (group_norm(x, mean, inverse, weight, bias, False), normed),
        "group_norm with SiLU": (group_norm(x, mean, inverse, weight, bias, True), _silu(normed)),
    }


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
