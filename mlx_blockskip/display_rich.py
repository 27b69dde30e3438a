"""Draw a task's events as bars in a terminal, one a phase, with loss, rate, time left and peak memory."""

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table as RichTable
from rich.text import Text

from mlx_blockskip.display import amount, memory, message, speed
from mlx_blockskip.events import Event, Phase, PhaseEnd, Step, Table, Warning
from mlx_blockskip.printable import one_line


class Rate(ProgressColumn):
    """Steps a second, or seconds a step where it is slow."""

    def render(self, task: Task) -> Text:
        rate = task.finished_speed or task.speed
        if not rate:
            return Text("")
        unit = task.fields.get("unit", "it")
        return Text(speed(rate, unit) if rate >= 1 else f"{1 / rate:.1f} s/{unit}", style="dim")


class Amount(ProgressColumn):
    """How much of how much, bytes as such."""

    def render(self, task: Task) -> Text:
        unit = task.fields.get("unit", "it")
        return Text(f"{amount(task.completed, unit)}/{amount(task.total or 0, unit)}")


class Bars:
    """A bar a phase; what is over stays as a line."""

    def __init__(self, console: Console | None = None) -> None:
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            Amount(),
            Rate(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[detail]}", markup=False),
            console=console or Console(),
            transient=True,
        )
        self.progress.start()
        self.task: TaskID | None = None

    def draw(self, event: Event) -> None:
        if isinstance(event, Phase):
            self._drop()
            self.task = self.progress.add_task(one_line(event.name), total=event.total or 1, unit=event.unit, detail="")
        elif isinstance(event, Step) and self.task is not None:
            detail = "" if event.loss is None else f"loss {event.loss:.4f}  "
            detail += f"peak {memory(event.peak_memory)}" if event.peak_memory else ""
            self.progress.update(self.task, completed=event.done, detail=detail)
        elif isinstance(event, Table):
            title, *columns = (Text(one_line(text)) for text in (event.title, *event.columns))
            grid = RichTable(title=title)
            for column in columns:
                grid.add_column(column)
            for row in event.rows:
                grid.add_row(*(Text(one_line(cell)) for cell in row))
            self.progress.console.print(grid)
        elif (text := message(event)) is not None:
            if isinstance(event, PhaseEnd):
                self._drop()
            style = "yellow" if isinstance(event, Warning) else "dim" if isinstance(event, PhaseEnd) else None
            self.progress.console.print(Text(text, style=style or ""))

    def _drop(self) -> None:
        if self.task is not None:
            self.progress.remove_task(self.task)
            self.task = None

    def close(self) -> None:
        self.progress.stop()
