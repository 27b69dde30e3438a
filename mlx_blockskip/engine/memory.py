"""Peaks of MLX memory that can be taken inside one another: a phase's, and a block's within it."""

import mlx.core as mx

_highest = 0  # the peak of the phase before the last mark


def reset() -> None:
    """A new phase begins: its peak starts from what is in memory now."""
    global _highest
    mx.reset_peak_memory()
    _highest = 0


def peak() -> int:
    """Bytes of MLX memory, the highest since `reset`."""
    return max(_highest, mx.get_peak_memory())


def mark() -> None:
    """Start a measurement inside the phase."""
    global _highest
    _highest = peak()
    mx.reset_peak_memory()


def since_mark() -> int:
    """Bytes of MLX memory, the highest since the last `mark`."""
    return mx.get_peak_memory()
