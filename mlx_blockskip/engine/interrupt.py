"""What stops a run from outside: Ctrl-C, and what a system, a scheduler or a closed terminal sends (SIGTERM, SIGHUP).
Each waits while something is half-done.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

Handler = Callable[[int, FrameType | None], object]


@contextmanager
def handled(handler: Handler) -> Iterator[None]:
    """Inside, the signals that stop a run come to `handler`; not one that is ignored, as SIGHUP is under nohup. Does
    nothing outside of the main thread, which alone has handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard = [one for one in SIGNALS if signal.getsignal(one) is not signal.SIG_IGN or one is signal.SIGINT]
    usual = {one: signal.signal(one, handler) for one in heard}
    try:
        yield
    finally:
        for one, before in usual.items():
            signal.signal(one, signal.SIG_DFL if before is None else before)


@contextmanager
def deferred() -> Iterator[None]:
    """Hold back what stops a run until the block is done, then let it have its usual effect."""
    met: list[int] = []
    with handled(lambda number, frame: met.append(number)):
        yield
    if met:
        signal.raise_signal(met[0])
