"""Every phase of a task reports its own peak of MLX memory."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import mlx.core as mx

from mlx_blockskip.engine import limits, memory, timeline
from mlx_blockskip.events import Phase, PhaseEnd, Step, emit


class Track:
    """A phase under way."""

    def __init__(self, name: str):
        self.name = name
        self.started = time.perf_counter()

    def step(self, done: int, loss: float | None = None, learning_rate: float | None = None) -> None:
        """Say how far the phase is."""
        timeline.step(done)
        emit(Step(self.name, done, loss, learning_rate, memory.peak()))


@contextmanager
def phase(
    name: str, total: int | None = None, unit: str = "it", *, release: Callable[[], None] | None = None
) -> Iterator[Track]:
    """Say that a phase begins, and when the block has ended well what it took, after `release` has let go of what is
    not needed any more.
    """
    emit(Phase(name, total, unit))
    mx.set_cache_limit(limits.in_force().cache)
    memory.reset()
    mx.clear_cache()
    track = Track(name)
    with timeline.phase(name):
        yield track
    end = PhaseEnd(name, time.perf_counter() - track.started, memory.peak())
    if release is not None:
        release()
    emit(end)
