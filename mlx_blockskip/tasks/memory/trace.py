"""`--trace-memory`: the timeline of a run as PATH.json and, drawn, as PATH.png. Written however the run ends."""

import functools
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from mlx_blockskip.engine import files, timeline
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.engine.timeline import FIRST_SWEEPS, Point, Timeline
from mlx_blockskip.events import Saved, Warning, emit
from mlx_blockskip.settings import MemoryOptions
from mlx_blockskip.tasks.memory.limit import AUTO, budget_of
from mlx_blockskip.tasks.memory.trace_plot import draw

SUFFIXES = (".json", ".png")

S = TypeVar("S", bound=MemoryOptions)
R = TypeVar("R")
Task = Callable[[S], R]


def traced(task: Task[S, R]) -> Task[S, R]:
    """The task, with its timeline where `trace_memory` asks for one."""

    @functools.wraps(task)
    def run(settings: S) -> R:
        return task(settings) if settings.trace_memory is None else _recorded(task, settings)

    return run


def _recorded(task: Task[S, R], settings: S) -> R:
    targets = trace_paths(settings.trace_memory)
    budget = None if settings.memory_budget == AUTO else budget_of(settings.memory_budget)
    check_writable(targets)
    try:
        with timeline.recording() as recorded:
            result = task(settings)
    except BaseException as error:
        _written(targets, as_json(recorded, task.__name__, budget, type(error).__name__))
        raise
    _written(targets, as_json(recorded, task.__name__, budget, None))
    return result


def trace_paths(path: str | None) -> tuple[Path, ...]:
    """The JSON and the PNG file of `--trace-memory`; none where it is off. Raises UserError for what names no file."""
    if path is None:
        return ()
    given = Path(path).expanduser()
    if not given.name or given.name == "..":
        raise UserError(f"--trace-memory {path}: name a file, such as memory; memory.json and memory.png are written")
    stem = given.stem if given.suffix.lower() in SUFFIXES else given.name
    return tuple(given.with_name(stem + suffix) for suffix in SUFFIXES)


def check_writable(targets: tuple[Path, ...]) -> None:
    """Raise UserError where the files cannot be written."""
    for target in targets:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=target.parent):
                pass
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"--trace-memory: {target.parent} cannot be written ({reason}); choose another") from None
        if target.is_dir():
            raise UserError(f"--trace-memory: {target} is a directory; choose another name")


def _written(targets: tuple[Path, ...], record: dict[str, Any]) -> None:
    """Write both files, unless no phase was begun. What goes wrong here does not undo the run."""
    if not record["phases"]:
        return
    as_data, as_picture = targets
    try:
        files.write_json(as_data, record)
        with files.atomic_file(as_picture) as temporary:
            draw(record).save(temporary, format="PNG")
    except OSError as error:
        emit(Warning(f"--trace-memory: {error.filename or as_data} could not be written ({error.strerror or error})"))
        return
    for target in targets:
        emit(Saved(target, "memory timeline"))


def as_json(recorded: Timeline, task: str, budget: int | None, stopped: str | None) -> dict[str, Any]:
    """The timeline as JSON values. Memory is in bytes, time in seconds since the run began.

    stopped: what ended the run before its time.
    """
    points = recorded.points
    kept = "every point"
    if len(points) < recorded.count:
        kept = (
            f"{len(points)} of {recorded.count} points: of the phases of one name the first {FIRST_SWEEPS} sweeps, the "
            f"highest and 1 in {recorded.stride}; of each phase its start, highest point and end"
        )
    return {
        "format": 1,
        "task": task,
        "memory_budget": budget,
        "stopped": stopped,
        "kept": kept,
        "phases": [
            {
                "name": span.name,
                "seconds": [span.start.seconds, span.end.seconds if span.end else None],
                "peak_memory": span.highest.peak,
                "highest": span.highest.number,
            }
            for span in recorded.phases
        ],
        "points": [_point(point) for point in points],
    }


def _point(point: Point) -> dict[str, Any]:
    found: dict[str, Any] = {
        "number": point.number,
        "phase": point.phase,
        "what": point.what,
        "done": point.done,
        "seconds": round(point.seconds, 6),
        "active_memory": point.active,
        "peak_memory": point.peak,
    }
    if point.visit is not None:
        visit = asdict(point.visit)
        found |= {"weights": visit.pop("nbytes"), **visit}
    return found
