"""`--trace-memory`: the timeline of a run as a trace file, which ui.perfetto.dev draws. Written however the run ends.

The file is in the JSON object format of Chrome's trace events: a counter of MLX's memory (now, and at its highest since
the point before), and under it the phases with the blocks that a sweep visits in them. Times are microseconds since the
run began, memory is bytes; what concerns the whole run is under `otherData`.
"""

import functools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from mlx_blockskip.engine import files, timeline
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.engine.timeline import FIRST_SWEEPS, Point, Timeline
from mlx_blockskip.events import Saved, Warning, emit
from mlx_blockskip.shared_options import MemoryOptions
from mlx_blockskip.tasks import targets
from mlx_blockskip.tasks.memory.limit import AUTO, budget_of

S = TypeVar("S", bound=MemoryOptions)
R = TypeVar("R")
Task = Callable[[S], R]
Event = dict[str, Any]


def traced(task: Task[S, R]) -> Task[S, R]:
    """The task, with its timeline where `trace_memory` asks for one."""

    @functools.wraps(task)
    def run(settings: S) -> R:
        return task(settings) if settings.trace_memory is None else _recorded(task, settings)

    return run


def _recorded(task: Task[S, R], settings: S) -> R:
    (target,) = trace_paths(settings.trace_memory)
    budget = None if settings.memory_budget == AUTO else budget_of(settings.memory_budget)
    check_writable(target)
    try:
        with timeline.recording() as recorded:
            result = task(settings)
    except BaseException as error:
        _write(target, recorded, task.__name__, budget, type(error).__name__)
        raise
    _write(target, recorded, task.__name__, budget, None)
    return result


def trace_paths(path: str | None) -> tuple[Path, ...]:
    """The file of `--trace-memory`; none where it is off. Raises UserError for what names no file."""
    if path is None:
        return ()
    given = Path(path).expanduser()
    if not given.name or given.name == "..":
        raise UserError(f"--trace-memory {path}: name a file, such as memory; memory.json is written")
    return (given if given.suffix.lower() == ".json" else given.with_name(given.name + ".json"),)


def check_writable(target: Path) -> None:
    """Raise UserError where the file cannot be written."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"--trace-memory: {target.parent} cannot be written ({reason}); choose another") from None
    if target.is_dir():
        raise UserError(f"--trace-memory: {target} is a directory; choose another name")


def _write(target: Path, recorded: Timeline, task: str, budget: int | None, stopped: str | None) -> None:
    """Write the file, unless no phase was begun. What goes wrong here does not undo the run."""
    if not recorded.phases:
        return
    target = targets.free(target)  # what is there stays, also what the run itself has written
    try:
        files.write_json(target, as_trace(recorded, task, budget, stopped))
    except OSError as error:
        emit(Warning(f"--trace-memory: {error.filename or target} could not be written ({error.strerror or error})"))
        return
    emit(Saved(target, "memory timeline; ui.perfetto.dev draws it"))


def as_trace(recorded: Timeline, task: str, budget: int | None, stopped: str | None) -> dict[str, Any]:
    """The timeline as JSON values. stopped: what ended the run before its time."""
    points = recorded.points
    kept = "every point"
    if len(points) < recorded.count:
        kept = (
            f"{len(points)} of {recorded.count} points: of the phases of one name the first {FIRST_SWEEPS} sweeps, the "
            f"highest and 1 in {recorded.stride}; of each phase its start, highest point and end"
        )
    return {
        "traceEvents": [
            {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": f"mlx-blockskip {task}"}},
            *_phases(recorded),
            *_points(points),
        ],
        "displayTimeUnit": "ms",
        "otherData": {"format": 2, "task": task, "memory_budget": budget, "stopped": stopped, "kept": kept},
    }


def _phases(recorded: Timeline) -> Iterator[Event]:
    """A slice for each phase, up to its last point."""
    for span in recorded.phases:
        args = {"peak": span.highest.peak, "highest": span.highest.number}
        yield _slice(span.name, span.start.seconds, (span.end or span.highest).seconds, args)


def _points(points: list[Point]) -> Iterator[Event]:
    """For each point memory, and what was at work since the point before, where that is kept too."""
    began = {point.number + 1: point.seconds for point in points}
    for point in points:
        memory = {"active": point.active, "peak": point.peak}
        yield {"ph": "C", "name": "MLX memory", "pid": 1, "ts": _microseconds(point.seconds), "args": memory}
        args: dict[str, Any] = {"number": point.number, "what": point.what, "phase": point.phase, "done": point.done}
        name = point.what
        if point.visit is not None:
            visit = asdict(point.visit)
            args |= {"weights": visit.pop("nbytes"), **visit}
            name = f"{point.visit.direction} {point.visit.block} {point.visit.kind}"
        yield _slice(name, began.get(point.number, point.seconds), point.seconds, args | memory)


def _slice(name: str, start: float, stop: float, args: dict[str, Any]) -> Event:
    ts = _microseconds(start)
    return {"ph": "X", "name": name, "pid": 1, "tid": 1, "ts": ts, "dur": _microseconds(stop) - ts, "args": args}


def _microseconds(seconds: float) -> int:
    return round(1e6 * seconds)
