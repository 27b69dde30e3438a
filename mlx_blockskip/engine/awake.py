"""A Mac that nobody touches falls asleep, and a run with it: macOS's own `caffeinate` keeps it awake."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from mlx_blockskip.engine import system

VARIABLE = "MLX_BLOCKSKIP_KEEP_AWAKE"

COMMAND = "caffeinate"


def wanted() -> bool:
    """Whether the user has not turned it off."""
    return os.environ.get(VARIABLE) != "0"


def available() -> bool:
    """Whether this machine can be kept awake."""
    return system.is_mac() and shutil.which(COMMAND) is not None


@contextmanager
def kept_awake() -> Iterator[None]:
    """Inside, a Mac does not fall asleep by itself; its screen may. Elsewhere nothing is done."""
    process = _start() if wanted() and available() else None
    try:
        yield
    finally:
        if process is not None:
            process.terminate()
            process.wait()


def _start() -> subprocess.Popen[bytes] | None:
    """`caffeinate`, which ends with this process however that ends. A Ctrl-C of the terminal does not reach it, as the
    run goes on then to the end of a step.
    """
    nothing = subprocess.DEVNULL
    try:
        return subprocess.Popen(
            [COMMAND, "-i", "-w", str(os.getpid())], stdin=nothing, stdout=nothing, stderr=nothing, process_group=0
        )
    except OSError:
        return None
