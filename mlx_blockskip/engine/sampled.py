"""What work takes that is made of many like passes (strips of a map, parts of a weight), from a few of them.

Inside `sampled` few passes are made, and all arrays have their sizes: the peak of memory is that of the whole run, in a
small part of its time. Values mean nothing there.
"""

import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import mlx.core as mx


@dataclass
class Sample:
    """A run of which few passes are made. left_out: the passes over whole maps that were not."""

    left_out: int = 0
    _seconds: float = 0.0
    _known: dict[Hashable, tuple[int, float]] = field(default_factory=dict)
    _later: list[tuple[int, Callable[[], float]]] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """What was left out would have taken this. Asked for when the run is over: some of it is timed then."""
        return self._seconds + sum(count * once() for count, once in self._later)

    def passes(self, starts: range, kind: Hashable) -> Iterator[int]:
        """The first pass, or none where one of its kind was made with as much memory in use. It ends with mx.eval."""
        held, left_out = mx.get_active_memory(), len(starts)
        before, seconds = self._known.get(kind, (-1, 0.0))
        if held > before:
            began = time.perf_counter()
            yield starts[0]
            seconds, left_out = time.perf_counter() - began, left_out - 1
            self._known[kind] = held, seconds
        self.left_out += left_out
        self._seconds += left_out * seconds

    def leave_out(self, count: int, once: Callable[[], float]) -> None:
        """Say that `count` passes are left out of a graph. once: the seconds that one of them takes."""
        self._later.append((count, once))


_sample: Sample | None = None


def current() -> Sample | None:
    """The sample that is being taken; None outside of `sampled`."""
    return _sample


@contextmanager
def sampled() -> Iterator[Sample]:
    """Inside, few passes are made."""
    global _sample
    before, _sample = _sample, Sample()
    try:
        yield _sample
    finally:
        _sample = before


def passes(starts: range, kind: Hashable) -> Iterator[int]:
    """Where passes begin that are evaluated one by one: `starts`, but for what a sample leaves out. kind: what decides
    the work of a pass.
    """
    return iter(starts) if _sample is None else _sample.passes(starts, kind)
