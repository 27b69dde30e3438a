"""How far MLX may run ahead of itself. It allocates the outputs of operations that it has only scheduled yet, dozens of
them, until its memory limit is reached; from there on it waits for one to finish before it schedules the next. So the
limit decides the peak of any graph, and never a result.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx

_own: int | None = None  # MLX's own limit, known once it was replaced


@dataclass(frozen=True)
class Machine:
    """Bytes of memory that there are, and of them what Metal recommends that one program works with; None elsewhere."""

    memory: int
    recommended: int | None = None


def machine() -> Machine:
    """This one."""
    if mx.metal.is_available():
        info = mx.device_info()
        return Machine(int(info["memory_size"]), int(info["max_recommended_working_set_size"]))
    return Machine(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def bound(budget: int | None) -> None:
    """From here on MLX waits rather than go over `budget` bytes; None for MLX's own limit.

    MLX gets a sixteenth less: it schedules one operation more when its limit is reached.
    """
    global _own
    if budget is None and _own is None:
        return
    limit = _own if budget is None else max(1, budget - budget // 16)
    assert limit is not None
    before = mx.set_memory_limit(limit)
    _own = before if _own is None else _own


@contextmanager
def at_least(nbytes: int) -> Iterator[None]:
    """Inside, MLX's limit is no lower than this: where it is reached all the time, MLX waits busily."""
    before = mx.set_memory_limit(nbytes)
    if before > nbytes:
        mx.set_memory_limit(before)
    try:
        yield
    finally:
        mx.set_memory_limit(before)


@contextmanager
def tight() -> Iterator[None]:
    """Inside, one operation at a time is scheduled: the least memory that a graph can do with."""
    before = mx.set_memory_limit(1)
    try:
        yield
    finally:
        mx.set_memory_limit(before)
