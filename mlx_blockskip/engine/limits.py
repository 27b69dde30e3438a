"""How far MLX may run ahead of itself. It allocates the outputs of operations that it has only scheduled yet, dozens of
them, until its memory limit is reached; from there on it waits for one to finish before it schedules the next. So the
limit decides the peak of any graph, and never a result.

On Metal what is waited for is a command buffer and not an operation: all that its operations touched lives until it has
run. How many go into one can only be changed by the environment, before MLX's first use, and then for every budget
(MLX_MAX_OPS_PER_BUFFER, MLX_MAX_MB_PER_BUFFER). So it is left as it is, and memory is reserved for one.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx

COMMAND_BUFFER = 200 << 20
"""What a command buffer of Metal may hold beside what lives anyway: up to 50 operations, or 50 million elements."""

RUN_AHEAD = 256 << 20
"""What stays free of kept blocks on Metal, so that a command buffer is encoded while another one runs."""

LEAST_CACHE, MOST_CACHE = 64 << 20, 2 << 30
"""Freed buffers that MLX may keep to use again, the fewest and the most. Metal maps and zeroes each new one, and the
work on a block of a large model takes a GiB of them.
"""

_own: int | None = None  # MLX's own limit, known once it was replaced
_budget: int | None = None  # what MLX is bound to


@dataclass(frozen=True)
class Machine:
    """Bytes of memory that there are, and of them what Metal recommends that one program works with; None elsewhere."""

    memory: int
    recommended: int | None = None


def machine() -> Machine:
    """This one."""
    if on_metal():
        info = mx.device_info()
        return Machine(int(info["memory_size"]), int(info["max_recommended_working_set_size"]))
    return Machine(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def on_metal() -> bool:
    """Whether MLX works on Metal here."""
    return bool(mx.metal.is_available())


@dataclass(frozen=True)
class Limits:
    """What a budget comes to, in bytes. memory: MLX's memory limit; None for its own. cache: freed buffers that MLX may
    keep. free: what blocks that are kept between walks leave, whatever the work takes.
    """

    budget: int | None
    memory: int | None
    cache: int
    free: int


def of(budget: int | None, metal: bool) -> Limits:
    """The limits of a budget (bytes of all of MLX's memory; None for any).

    MLX's memory limit is a sixteenth below the budget, since one operation more is scheduled when it is reached; on
    Metal a command buffer. There freed buffers count within that limit; elsewhere they come on top, so they are few.
    """
    if not metal:
        return Limits(budget, None if budget is None else max(1, budget - budget // 16), LEAST_CACHE, 0)
    if budget is None:
        return Limits(None, None, MOST_CACHE, RUN_AHEAD)
    limit = max(1, budget - max(budget // 16, COMMAND_BUFFER))
    return Limits(budget, limit, min(max(budget // 8, LEAST_CACHE), MOST_CACHE), RUN_AHEAD)


def ahead(scratch: int, metal: bool) -> int:
    """How far over what is there MLX may go before it waits, where the work was measured to take `scratch` bytes.

    Half of it, since one operation more is scheduled then; on Metal a command buffer.
    """
    return min(scratch // 2, max(0, scratch - COMMAND_BUFFER)) if metal else scratch // 2


def in_force() -> Limits:
    """The limits of the budget that MLX is bound to."""
    return of(_budget, on_metal())


def bound(budget: int | None) -> None:
    """From here on MLX waits rather than go over `budget` bytes; None for MLX's own limit."""
    global _own, _budget
    _budget = budget
    limit = in_force().memory or _own
    if limit is None:
        return
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
