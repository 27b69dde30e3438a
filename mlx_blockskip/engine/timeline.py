"""A timeline of MLX memory: a point for every block that a sweep visits, within the phases of a task.

While nobody records, `walk` is the reader's own walk and the rest does nothing. A point covers all that happened since
the one before it, so the highest point of a phase is the phase's peak. A block's point therefore has in it what is done
on the way to the block and while it is bound: reading it, crossing to it, taps, and at the turning point the loss.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from mlx_blockskip.engine import memory
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.engine.reader import BlockReader, Part

KEPT_POINTS = 4096
"""Points of thinned sweeps that a timeline holds."""

FIRST_SWEEPS = 4
"""Sweeps of every phase's name that are never thinned out."""


@dataclass(frozen=True)
class Visit:
    """A block that a sweep was at. prefix: its path in the weight files; nbytes: of its weights that are read."""

    direction: str
    block: int
    kind: str
    prefix: str
    nbytes: int


@dataclass(frozen=True)
class Point:
    """Memory at one moment, and the highest since the point before.

    phase: index among the timeline's phases, None between two; what: start or end of a phase, block, step, or other,
    which is work before a sweep or between phases; done: steps of the phase that are done; seconds: since the recording
    began; active: bytes now; peak: bytes.
    """

    number: int
    phase: int | None
    what: str
    done: int
    seconds: float
    active: int
    peak: int
    visit: Visit | None = None


@dataclass
class Span:
    """A phase: its points of the start, of the highest and, when it is over, of the end."""

    name: str
    start: Point
    highest: Point
    end: Point | None = None


@dataclass(eq=False)
class Stretch:
    """The points of a sweep and of what follows it. number: among those of phases with this name."""

    name: str
    number: int
    points: list[Point] = field(default_factory=list)

    @property
    def peak(self) -> int:
        return max(point.peak for point in self.points)


class Timeline:
    """What was recorded.

    limit: of the sweeps after the first FIRST_SWEEPS of a phase, and beside the highest, every `stride`-th is kept; the
    stride doubles whenever those would have more points than this. A phase's start, highest and end are always kept.
    count: points so far, kept or not.
    """

    def __init__(self, limit: int = KEPT_POINTS):
        self.limit = limit
        self.stride = 1
        self.count = 0
        self.phases: list[Span] = []
        self._began = time.perf_counter()
        self._peak = memory.Peak()
        self._peak.restart()
        self._phase: int | None = None
        self._done = 0
        self._stretch: Stretch | None = None
        self._kept: list[Stretch] = []
        self._seen: dict[str, int] = {}
        self._highest: dict[str, Stretch] = {}

    @property
    def points(self) -> list[Point]:
        """What is kept, in order."""
        found = [point for stretch in self._held() for point in stretch.points]
        for span in self.phases:
            found += [point for point in (span.start, span.highest, span.end) if point is not None]
        return sorted({point.number: point for point in found}.values(), key=lambda point: point.number)

    def begin(self, name: str) -> None:
        """A phase begins."""
        self.close()
        self._phase = len(self.phases)
        start = self._take("start")
        self.phases.append(Span(name, start, start))

    def end(self) -> None:
        """The phase that is open, if there is one, is over."""
        if self._phase is not None:
            self._cut()
            span = self.phases[self._phase]
            span.end = self._take("end")
            span.highest = max(span.highest, span.end, key=lambda point: point.peak)
            self._phase, self._done = None, 0

    def close(self) -> None:
        """Nothing is under way any more; what was done since the last point is a point too."""
        self.end()
        self._cut()
        self._put(self._take("other"))
        self._cut()

    def step(self, done: int) -> None:
        """So many steps of the phase are done."""
        if self._stretch is not None and any(point.what == "step" for point in self._stretch.points):
            self._cut()
        self._done = done
        self._put(self._take("step"))

    def walk(self, reader: BlockReader, blocks: Sequence[int], part: Part, directions: Sequence[str]) -> Iterator:
        """The reader's walk, with a point for each block when the next is asked for, or the walk is left."""
        self._cut()
        self._put(self._take("other"))
        walk = reader.walk(blocks, part)
        for position, index in enumerate(blocks):
            try:
                yield next(walk)  # never held here: the caller lets the weights go
            finally:
                direction = directions[position * len(directions) // len(blocks)]
                self._put(self._take("block", _visit(reader, index, part, direction)))
        next(walk, None)

    def visit(self, reader: BlockReader, index: int, part: Part, direction: str) -> None:
        """A sweep that is no walk is done with a block."""
        self._put(self._take("block", _visit(reader, index, part, direction)))

    def _take(self, what: str, visit: Visit | None = None) -> Point:
        active, seconds = memory.settled(), time.perf_counter() - self._began
        highest = max(active, self._peak.read())
        self._peak.restart()
        self.count += 1
        return Point(self.count, self._phase, what, self._done, seconds, active, highest, visit)

    def _put(self, point: Point) -> None:
        if point.phase is not None and point.peak > self.phases[point.phase].highest.peak:
            self.phases[point.phase].highest = point
        if self._stretch is None:
            name = "" if point.phase is None else self.phases[point.phase].name
            self._stretch = Stretch(name, self._seen.get(name, 0))
            self._seen[name] = self._stretch.number + 1
        self._stretch.points.append(point)

    def _cut(self) -> None:
        """The stretch under way is whole: keep it, or let it go."""
        self._kept, self._stretch = self._held(), None
        while sum(len(s.points) for s in self._kept if not self._always(s)) > self.limit:
            self.stride *= 2
            self._kept = [s for s in self._kept if self._keeps(s)]

    def _held(self) -> list[Stretch]:
        new = self._stretch
        if new is None:
            return self._kept
        if new.name not in self._highest or new.peak > self._highest[new.name].peak:
            self._highest[new.name] = new
        return [s for s in (*self._kept, new) if self._keeps(s)]

    def _always(self, stretch: Stretch) -> bool:
        return stretch.number < FIRST_SWEEPS or stretch is self._highest[stretch.name]

    def _keeps(self, stretch: Stretch) -> bool:
        return stretch.number % self.stride == 0 or self._always(stretch)


def _visit(reader: BlockReader, index: int, part: Part, direction: str) -> Visit:
    block = reader.stack.block(index)
    try:
        size = reader.nbytes(index, part)
    except UserError:  # the walk says so itself
        size = 0
    return Visit(direction, index, block.kind.name, block.prefix, size)


_recording: list[Timeline] = []


@contextmanager
def recording(limit: int = KEPT_POINTS) -> Iterator[Timeline]:
    """Record what happens until the end of the block."""
    timeline = Timeline(limit)
    _recording.append(timeline)
    try:
        yield timeline
    finally:
        timeline.close()
        _recording.remove(timeline)


@contextmanager
def phase(name: str) -> Iterator[None]:
    """A phase of the task, for who records."""
    timeline = _recording[-1] if _recording else None
    if timeline is not None:
        timeline.begin(name)
    try:
        yield
    finally:
        if timeline is not None:
            timeline.end()


def step(done: int) -> None:
    """So many steps of the phase are done, for who records."""
    if _recording:
        _recording[-1].step(done)


def visit(reader: BlockReader, index: int, part: Part, direction: str) -> None:
    """A sweep whose weights all stay is done with a block, for who records."""
    if _recording:
        _recording[-1].visit(reader, index, part, direction)


def walk(reader: BlockReader, blocks: Sequence[int], part: Part, *directions: str) -> Iterator[tuple[int, Any]]:
    """`reader.walk(blocks, part)`, for who records. directions: names of the walk's equal parts, in order."""
    return _recording[-1].walk(reader, blocks, part, directions) if _recording else reader.walk(blocks, part)
