"""Rounding that loses nothing on average.

A step of bfloat16 is 1/128 to 1/256 of a weight, and what an adapter adds is often smaller than half of it: rounded to
the nearest number most of it would be gone. Rounded up or down with a probability that goes by the distance, the mean
is exact, and the error is that of any weight in bfloat16. The probabilities are a function of the place in the weight.
"""

import math
from functools import cache

import mlx.core as mx
import numpy as np

from mlx_blockskip.engine import philox

ROWS = 16
"""Rows after which the random numbers repeat."""

KEY = 0xD17


def dithered(values: mx.array, start: int = 0) -> mx.array:
    """The rows of a weight from `start` on, (rows, ...) float32, in bfloat16. What that can hold is left as it is."""
    rows = (np.arange(len(values)) + start) % ROWS
    noise = _noise(math.prod(values.shape[1:]))[mx.array(rows)].reshape(values.shape)
    bits = values.astype(mx.float32).view(mx.uint32) + noise.astype(mx.uint32)
    return (bits >> 16).astype(mx.uint16).view(mx.bfloat16)


@cache
def _noise(width: int) -> mx.array:
    """(ROWS, width) uint16, uniform."""
    drawn = philox.generator(0, KEY, width).integers(0, 1 << 16, (ROWS, width), np.uint16)
    noise = mx.array(drawn)
    mx.eval(noise)
    return noise
