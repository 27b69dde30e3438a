"""What image encoders begin with: patches as tokens, and where each lies. Sources: transformers ViT, Dinov2, CLIP."""

import math
from typing import Protocol

import mlx.core as mx
import numpy as np

from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.models.config import PositiveInt
from mlx_blockskip.models.layers import Weights
from mlx_blockskip.models.product import matmul

CUBIC = -0.75
"""The slope of the cubic that torch interpolates with."""


Sides = PositiveInt | tuple[PositiveInt, PositiveInt]
"""A side of a square, or height and width."""


class Patched(Protocol):
    """What of a configuration says how an image is cut."""

    @property
    def image_size(self) -> int | tuple[int, int]: ...
    @property
    def patch_size(self) -> int | tuple[int, int]: ...


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a config's size, which is one number or two."""
    return value if isinstance(value, tuple) else (value, value)


def grid_of(config: Patched) -> tuple[int, int]:
    """Rows and columns of patches in the size that a model was trained in."""
    (height, width), (h, w) = pair(config.image_size), pair(config.patch_size)
    return height // h, width // w


def patch_tokens(w: Weights, name: str, pixels: mx.array) -> tuple[mx.array, tuple[int, int]]:
    """Pixels (B, H, W, C) -> (B, rows x columns, D), and (rows, columns).

    The patches do not overlap, so the convolution `name` (D, h, w, C) is a product. What does not fill a patch at the
    right and at the bottom is left out, as a convolution leaves it out.
    """
    kernel = w[f"{name}.weight"]
    width, h, v, channels = kernel.shape
    batch, rows, columns = pixels.shape[0], pixels.shape[1] // h, pixels.shape[2] // v
    cut = pixels[:, : rows * h, : columns * v].reshape(batch, rows, h, columns, v, channels)
    flat = cut.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, h * v * channels)
    return matmul(flat, kernel.reshape(width, -1), w.get(f"{name}.bias")), (rows, columns)


def positions(table: mx.array, trained: tuple[int, int], grid: tuple[int, int]) -> mx.array:
    """The position embeddings (1 + rows x columns, D) of a grid of patches, the class token's first.

    Where the grid is not the trained one they are interpolated (bicubic, corners not aligned), in float32.
    Source: `interpolate_pos_encoding`. Raises UserError where the trained grid is not a square one.
    """
    if grid == trained:
        return table
    side = math.isqrt(table.shape[0] - 1)
    if trained[0] != trained[1] or side * side != table.shape[0] - 1:
        raise UserError(
            f"an encoder for {trained[0]} x {trained[1]} patches was given {grid[0]} x {grid[1]}; "
            "let its preprocessor_config.json resize and crop to its image_size"
        )
    rows, columns = (mx.array(bicubic(side, size)) for size in grid)
    patches = table[1:].astype(mx.float32).reshape(side, side * table.shape[1])
    turned = (rows @ patches).reshape(grid[0], side, -1).transpose(1, 0, 2).reshape(side, -1)
    found = (columns @ turned).reshape(grid[1], grid[0], -1).transpose(1, 0, 2).reshape(grid[0] * grid[1], -1)
    return mx.concatenate([table[:1], found.astype(table.dtype)])


def bicubic(before: int, after: int) -> np.ndarray:
    """(after, before) float32: each row's weights of cubic interpolation; the edge goes on beyond the edge.

    Source: torch `interpolate(mode="bicubic", align_corners=False)`.
    """
    centre = (np.arange(after) + 0.5) * before / after - 0.5
    first = np.floor(centre).astype(np.int64)
    matrix = np.zeros((after, before))
    for tap in range(-1, 3):
        weight = _cubic(np.abs(centre - first - tap))
        np.add.at(matrix, (np.arange(after), np.clip(first + tap, 0, before - 1)), weight)
    return matrix.astype(np.float32)


def _cubic(x: np.ndarray) -> np.ndarray:
    """Keys' cubic at a distance of 0 to 2."""
    near = ((CUBIC + 2) * x - (CUBIC + 3)) * x * x + 1
    far = ((CUBIC * x - 5 * CUBIC) * x + 8 * CUBIC) * x - 4 * CUBIC
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))
