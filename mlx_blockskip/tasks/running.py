"""What every command does around its task, from the command line as from Python."""

from collections.abc import Iterator
from contextlib import contextmanager

from mlx_blockskip.engine import awake, device, system
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.events import Note, emit

LONG = ("convert", "train", "select", "generate", "evaluate", "fuse")
"""Commands that may take hours."""


@contextmanager
def running(command: str) -> Iterator[None]:
    """Inside, a Mac stays awake where the command may take long, and an error of the device becomes a UserError."""
    try:
        if command in LONG and awake.wanted():
            with awake.kept_awake():
                if system.power() == "battery":
                    emit(Note("the machine runs on battery: plug it in, a long run may empty it"))
                yield
        else:
            yield
    except RuntimeError as error:
        if not device.is_device_error(error):
            raise
        device.drain()
        raise UserError(
            f"{device.described(error)}; close other programs, and give a smaller --memory-budget"
        ) from error
