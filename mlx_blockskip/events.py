"""What a task emits while it works, and who hears it. The CLI draws events; log.jsonl and reports hold the same."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Phase:
    """A phase begins: `total` steps of `unit` (None where the number is not known)."""

    name: str
    total: int | None = None
    unit: str = "it"


@dataclass(frozen=True)
class Step:
    """Progress inside the phase: `done` of its total. Loss and rate only where there is one."""

    phase: str
    done: int
    loss: float | None = None
    learning_rate: float | None = None
    peak_memory: int | None = None  # bytes, since the phase began


@dataclass(frozen=True)
class PhaseEnd:
    """A phase is over. peak_memory: bytes of MLX memory, the highest during the phase."""

    phase: str
    seconds: float
    peak_memory: int


@dataclass(frozen=True)
class Image:
    """An image was written."""

    path: Path
    caption: str


@dataclass(frozen=True)
class Saved:
    """A file or directory that a user may want was written."""

    path: Path
    what: str


@dataclass(frozen=True)
class Note:
    """Something the user should know that is no fault: a default that was chosen, a model that was converted."""

    message: str


@dataclass(frozen=True)
class Warning:
    """Something that may not be what the user wants."""

    message: str


@dataclass(frozen=True)
class Table:
    """Rows of text under columns."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


Event = Phase | Step | PhaseEnd | Image | Saved | Note | Warning | Table


def as_record(event: Event) -> dict[str, Any]:
    """The event as JSON values: its type under `event`, then its fields that are set. A number that is not finite has
    no place in JSON, and counts as not set.
    """
    fields = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(event).items()}
    named = {"event": type(event).__name__.lower()}
    return named | {k: v for k, v in fields.items() if v is not None and not (isinstance(v, float) and not isfinite(v))}


Listener = Callable[[Event], None]

_listeners: ContextVar[tuple[Listener, ...]] = ContextVar("listeners", default=())


def emit(event: Event) -> None:
    """Tell everyone who listens, the innermost first. What a listener raises ends the task at this place."""
    for listener in _listeners.get():
        listener(event)


@contextmanager
def listening(listener: Listener | None) -> Iterator[None]:
    """Inside, `listener` is told every event that is emitted, before those outside are."""
    token = _listeners.set((*([listener] if listener else []), *_listeners.get()))
    try:
        yield
    finally:
        _listeners.reset(token)


@contextmanager
def unheard() -> Iterator[None]:
    """Inside, nobody is told anything: a task's work that another task does for reasons of its own."""
    token = _listeners.set(())
    try:
        yield
    finally:
        _listeners.reset(token)
