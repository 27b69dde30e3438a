"""Every phase of a task reports its own peak of MLX memory."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

from mlx_blockskip.engine import memory, timeline
from mlx_blockskip.events import Phase, PhaseEnd, Step

CACHE_LIMIT = 64 << 20
"""Freed buffers that MLX may keep, so that they do not count twice."""


class Track:
    """A phase under way. `begin` and `end` are the events to yield."""

    def __init__(self, name: str, total: int | None, unit: str):
        self.begin = Phase(name, total, unit)
        self.name = name
        self.started = time.perf_counter()
        self.end = PhaseEnd(name, 0.0, 0)

    def step(self, done: int, loss: float | None = None, learning_rate: float | None = None) -> Step:
        timeline.step(done)
        return Step(self.name, done, loss, learning_rate, memory.peak())


@contextmanager
def phase(name: str, total: int | None = None, unit: str = "it") -> Iterator[Track]:
    """Count peak memory and time from here to the end of the block."""
    mx.set_cache_limit(CACHE_LIMIT)
    mx.clear_cache()
    memory.reset()
    track = Track(name, total, unit)
    with timeline.phase(name):
        yield track
    track.end = PhaseEnd(name, time.perf_counter() - track.started, memory.peak())
