"""A directory for one run at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlx_blockskip.engine.locks import lock
from mlx_blockskip.events import Warning, emit


@contextmanager
def alone(path: Path, kept: bool = False) -> Iterator[None]:
    """Inside, no other process works in the directory of the file `path`: see `lock`. Warns where no one can tell."""
    with lock(path, kept) as held:
        if not held:
            emit(Warning(f"{path.parent}: its disk has no locks; see to it that no other run works in this directory"))
        yield
