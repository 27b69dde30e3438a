"""Peaks of MLX memory that are taken inside one another: a phase's, a block's within it, a timeline's within both."""

from typing import ClassVar
from weakref import WeakSet

import mlx.core as mx


def settled() -> int:
    """Bytes of MLX memory when all that was scheduled is done and has let go of what it held.

    On Metal what was evaluated may hold its inputs a moment longer, so a measurement begins here. Costs a wait.
    """
    mx.synchronize()
    return mx.get_active_memory()


class Peak:
    """The highest bytes of MLX memory since `restart`.

    MLX keeps one peak for all: who restarts hands what was reached so far to everybody else.
    """

    _all: ClassVar["WeakSet[Peak]"] = WeakSet()

    def __init__(self) -> None:
        self._before = 0  # the highest until MLX's own peak was last reset
        self._all.add(self)

    def restart(self, least: int = 0) -> None:
        """Measure from here. least: bytes that count as reached already."""
        reached = mx.get_peak_memory()
        mx.reset_peak_memory()
        for peak in self._all:
            peak._before = max(peak._before, reached)
        self._before = least

    def read(self) -> int:
        """Bytes, the highest since `restart`; 0 where nothing has been allocated since."""
        return max(self._before, mx.get_peak_memory())


_phase, _marked = Peak(), Peak()


def reset() -> None:
    """A new phase begins: its peak starts from what is in memory now."""
    _phase.restart(settled())


def peak() -> int:
    """Bytes of MLX memory, the highest since `reset`."""
    return _phase.read()


def mark() -> None:
    """Start a measurement inside the phase."""
    _marked.restart()


def since_mark() -> int:
    """Bytes of MLX memory, the highest since the last `mark`."""
    return _marked.read()
