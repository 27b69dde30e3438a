"""Draw a task's events as plain lines or as JSON. Bars for terminals are in display_rich."""

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

from mlx_blockskip.engine import interrupt
from mlx_blockskip.events import Event, Image, Note, Phase, PhaseEnd, Saved, Step, Table, Warning, as_record, listening
from mlx_blockskip.printable import one_line, printable

SECONDS_BETWEEN = 5.0
SHARE_BETWEEN = 0.1


class Drawer(Protocol):
    """Shows events; `close` leaves the terminal as it was."""

    def draw(self, event: Event) -> None: ...

    def close(self) -> None: ...


class Stopped(KeyboardInterrupt):
    """A run that a signal stopped. number: the signal's."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


@contextmanager
def drawn_by(drawer: Drawer) -> Iterator[None]:
    """Inside, events are drawn, a warning once.

    A first Ctrl-C (or SIGTERM, or SIGHUP) waits for the next event, and is raised where the task emits it, so that a
    training step is whole; a second stops at once. (Python can lose an exception that a signal raises inside a
    callback; a flag is not lost.) Where nobody is left to read, the run goes on unseen.
    """
    pressed: list[int] = []

    def press(number: int, frame: Any) -> None:
        if pressed:
            raise Stopped(number)
        pressed.append(number)
        with suppress(OSError):
            print("stopping after the step under way; Ctrl-C again stops at once", file=sys.stderr, flush=True)

    shown = [drawer]
    said: set[Event] = set()

    def draw(event: Event) -> None:
        again = event in said
        if isinstance(event, Warning):
            said.add(event)
        try:
            for one in shown if not again else ():
                one.draw(event)
        except OSError:  # the terminal is closed, or `| head` has seen enough
            shown.clear()
            unseen()
        if pressed and not raised:
            raised.append(True)
            raise Stopped(pressed[0])

    raised: list[bool] = []
    with interrupt.handled(press):
        try:
            with listening(draw):
                yield
        finally:
            with suppress(OSError):
                drawer.close()


def unseen() -> None:
    """From now on what is printed goes nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def memory(count: int) -> str:
    """Bytes for a person: 812 MiB, 1.24 GiB."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def duration(seconds: float) -> str:
    """Seconds for a person: 4.2 s, 3:07, 1:02:33."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def amount(count: float, unit: str) -> str:
    """How much of a phase: a number of steps, or bytes for a person where its unit is B."""
    return memory(int(count)) if unit == "B" else f"{count:.0f}"


def speed(rate: float, unit: str) -> str:
    """How fast a phase is: 2.50 it/s, 61 MiB/s."""
    return f"{amount(rate, unit)}/s" if unit == "B" else f"{rate:.2f} {unit}/s"


def message(event: Event) -> str | None:
    """What to print for an event that is not progress: a line, or of a note several."""
    match event:
        case Image(path, caption):
            return one_line(f"{path}: {caption}")
        case Saved(path, what):
            return one_line(f"{what}: {path}")
        case Note(text):
            return printable(text)
        case Warning(text):
            return one_line(f"warning: {text}")
        case PhaseEnd(name, seconds, peak):
            return f"{one_line(name)}: {duration(seconds)}, peak {memory(peak)}"
    return None


def markdown(table: Table) -> list[str]:
    """The lines of a table, its columns as wide as they need."""
    cells = [[one_line(cell) for cell in row] for row in (table.columns, *table.rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(table.columns))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    return [
        "",
        one_line(table.title),
        "",
        lines[0],
        "|" + "|".join("-" * (width + 2) for width in widths) + "|",
        *lines[1:],
        "",
    ]


class Plain:
    """Lines for a file or a pipe: a line a few seconds apart, or each tenth of a phase."""

    def __init__(self) -> None:
        self.phase = Phase("")
        self.started = self.last_time = time.monotonic()
        self.first_done = self.last_done = 0

    def draw(self, event: Event) -> None:
        if isinstance(event, Phase):
            self.phase, self.started = event, time.monotonic()
            self.last_time, self.first_done, self.last_done = self.started, -1, 0
        elif isinstance(event, Step):
            self._step(event)
        elif isinstance(event, Table):
            print("\n".join(markdown(event)), flush=True)
        elif (text := message(event)) is not None:
            print(text, file=sys.stderr if isinstance(event, Warning) else sys.stdout, flush=True)

    def _step(self, event: Step) -> None:
        now = time.monotonic()
        if self.first_done < 0:
            self.first_done = event.done - 1
        total = self.phase.total or 0
        due = now - self.last_time >= SECONDS_BETWEEN
        if total and event.done - self.last_done >= SHARE_BETWEEN * total and now - self.last_time > 0.5:
            due = True
        if not due:
            return
        self.last_time, self.last_done = now, event.done
        rate = (event.done - self.first_done) / max(1e-9, now - self.started)
        unit = self.phase.unit
        parts = [
            f"{event.phase}: {amount(event.done, unit)}/{amount(total, unit) if total else '?'}",
            speed(rate, unit),
        ]
        if event.loss is not None:
            parts.append(f"loss {event.loss:.4f}")
        if total:
            parts.append(f"{duration((total - event.done) / max(rate, 1e-9))} left")
        if event.peak_memory:
            parts.append(f"peak {memory(event.peak_memory)}")
        print(one_line(", ".join(parts)), flush=True)

    def close(self) -> None:
        sys.stdout.flush()


class Json:
    """Every event as one line of JSON."""

    def draw(self, event: Event) -> None:
        record: dict[str, Any] = as_record(event)
        print(json.dumps(record), flush=True)

    def close(self) -> None:
        sys.stdout.flush()


class Silent:
    """Nothing at all."""

    def draw(self, event: Event) -> None:
        pass

    def close(self) -> None:
        pass
