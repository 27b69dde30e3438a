"""How many operations the linear layers of a block take, counted from shapes while the block's graph is built."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mlx_blockskip.models import layers

SEAMS = ("matmul", "quantized_matmul")
"""What `layers.linear` multiplies with: `(x, weight, ...)`, a row of the weight per output."""


@contextmanager
def linear_flops() -> Iterator[list[int]]:
    """Inside, each linear layer adds its floating point operations to the list. Nothing is evaluated for it."""
    found: list[int] = []
    own = {name: getattr(layers, name) for name in SEAMS}

    def counted(multiply: Callable[..., Any]) -> Callable[..., Any]:
        def product(x: Any, weight: Any, *more: Any) -> Any:
            found.append(2 * math.prod(x.shape) * weight.shape[0])
            return multiply(x, weight, *more)

        return product

    for name, multiply in own.items():
        setattr(layers, name, counted(multiply))
    try:
        yield found
    finally:
        for name, multiply in own.items():
            setattr(layers, name, multiply)
