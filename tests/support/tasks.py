"""Running a task by hand."""

from mlx_blockskip.events import listening


def drive(task, *arguments):
    """(what the task returns, the events it emits)."""
    events = []
    with listening(events.append):
        return task(*arguments), events
