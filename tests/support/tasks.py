"""Running a task by hand."""


def drive(task):
    """(what the task returns, the events it yields)."""
    events = []
    while True:
        try:
            events.append(next(task))
        except StopIteration as done:
            return done.value, events
