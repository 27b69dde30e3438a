"""Winograd's F(6 x 6, 3 x 3) as MLX's Metal backend does it (`winograd_conv_2D_gpu`, conv.metal), in numpy: transformed
inputs, weights and products are kept in a type of their own.
"""

from collections.abc import Callable

import numpy as np

OUT, TILE = 6, 8
INPUT = np.array([
    [1, 0, 0, 0, 0, 0, 0, 0],
    [0, 1, -1, 0.5, -0.5, 2, -2, -1],
    [-5.25, 1, 1, 0.25, 0.25, 4, 4, 0],
    [0, -4.25, 4.25, -2.5, 2.5, -2.5, 2.5, 5.25],
    [5.25, -4.25, -4.25, -1.25, -1.25, -5, -5, 0],
    [0, 1, -1, 2, -2, 0.5, -0.5, -5.25],
    [-1, 1, 1, 1, 1, 1, 1, 0],
    [0, 0, 0, 0, 0, 0, 0, 1],
])  # fmt: skip
POINTS = np.array([1, -1, 2, -2, 0.5, -0.5])
OUTPUT = np.vstack([np.eye(1, OUT), POINTS[:, None] ** np.arange(OUT), np.eye(1, OUT, OUT - 1)])
WEIGHT = np.array([
    [1, 0, 0],
    [-2 / 9, -2 / 9, -2 / 9],
    [-2 / 9, 2 / 9, -2 / 9],
    [1 / 90, 1 / 45, 2 / 45],
    [1 / 90, -1 / 45, 2 / 45],
    [32 / 45, 16 / 45, 8 / 45],
    [32 / 45, -16 / 45, 8 / 45],
    [0, 0, 1],
])  # fmt: skip


def bfloat16(x: np.ndarray) -> np.ndarray:
    """Rounded to the nearest."""
    bits = np.asarray(x, np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return rounded.astype(np.uint32).view(np.float32)


def convolved(x: np.ndarray, weight: np.ndarray, keep: Callable[[np.ndarray], np.ndarray] = bfloat16) -> np.ndarray:
    """A 3 x 3 convolution with one pixel of zeros around: (1, H, W, C), (O, 3, 3, C) -> (1, H, W, O). keep: how what
    lies between the steps is stored.
    """
    _, height, width, channels = x.shape
    rows, columns = -(-height // OUT), -(-width // OUT)
    padded = np.zeros((rows * OUT + 2, columns * OUT + 2, channels), x.dtype)
    padded[1 : height + 1, 1 : width + 1] = x[0]
    tiles = np.stack([
        padded[OUT * i : OUT * i + TILE, OUT * j : OUT * j + TILE] for i in range(rows) for j in range(columns)
    ])  # fmt: skip
    inputs = keep(np.einsum("ha,thwc,wb->abtc", INPUT, tiles, INPUT, optimize=True))
    weights = keep(np.einsum("ah,ohwc,bw->abco", WEIGHT, weight, WEIGHT, optimize=True))
    products = keep(inputs @ weights)
    found = np.einsum("ah,abto,bw->thwo", OUTPUT, products, OUTPUT, optimize=True)
    whole = found.reshape(rows, columns, OUT, OUT, -1).transpose(0, 2, 1, 3, 4).reshape(rows * OUT, columns * OUT, -1)
    return keep(whole[None, :height, :width])
