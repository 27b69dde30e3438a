"""What every command does around its task, from the command line as from Python."""

from collections.abc import Iterator
from contextlib import contextmanager

from mlx_blockskip.engine import awake, device, oserrors, system
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.engine.leftovers import sweeping
from mlx_blockskip.events import Note, emit

LONG = ("convert", "train", "select", "generate", "evaluate", "fuse")
"""Commands that may take hours."""


@contextmanager
def running(command: str) -> Iterator[None]:
    """Inside, a Mac stays awake where the command may take long, what killed runs left is removed where something is
    written, and an error of the device or of a file becomes a UserError.
    """
    try:
        with sweeping(lambda path, what: emit(Note(f"{path}: {what}"))), _awake(command):
            yield
    except OSError as error:
        raise UserError(oserrors.sentence(error)) from error
    except RuntimeError as error:
        if oserrors.is_unread(error):
            raise UserError(f"{error}; see what became of this file, and give the command again") from error
        if not device.is_device_error(error):
            raise
        device.drain()
        raise UserError(
            f"{device.described(error)}; close other programs, and give a smaller --memory-budget"
        ) from error


@contextmanager
def _awake(command: str) -> Iterator[None]:
    if command not in LONG or not awake.wanted():
        yield
        return
    with awake.kept_awake():
        if system.power() == "battery":
            emit(Note("the machine runs on battery: plug it in, a long run may empty it"))
        yield
