"""What MLX memory a run may take."""

from mlx_blockskip.engine import limits
from mlx_blockskip.engine.limits import Limits, Machine
from mlx_blockskip.options import parse_size
from mlx_blockskip.tasks.defaults import ANY

AUTO = "auto"

LEAST = 0
"""A budget of 0 asks for the least that is possible, whatever that is; nothing is refused then."""

MARGIN = 1.15
"""What is chosen for the user has to fit with this much to spare: one trace of a block may be an operation's output
below what a sweep takes.
"""


def fits(peak: int, budget: int) -> bool:
    """Whether what was traced fits with MARGIN."""
    return MARGIN * peak <= budget


def budget_of(text: str | None, machine: Machine | None = None) -> int | None:
    """Bytes of a --memory-budget: a size, or "auto" for what fits the machine (by default this one). None: any.

    Raises UserError for what is no size.
    """
    if text in (None, ANY):
        return None
    return automatic(machine or limits.machine()) if text == AUTO else parse_size(text, "--memory-budget")


def automatic(machine: Machine) -> int:
    """Of what Metal recommends four fifths, since the system draws its windows from the same memory; elsewhere three
    quarters of all there is.
    """
    return machine.memory * 3 // 4 if machine.recommended is None else machine.recommended * 4 // 5


def described(limits: Limits) -> str:
    """What MLX keeps to, in a sentence."""
    kept = f"up to {_size(limits.cache)} of freed buffers are kept"
    if limits.budget is None:
        return f"No memory budget; {kept}"
    if limits.budget == LEAST:
        return f"Memory budget 0, the least that is possible; {kept}"
    free = f"; blocks that stay in memory leave {_size(limits.free)} free" if limits.free else ""
    return f"Memory budget {_size(limits.budget)}: MLX waits at {_size(limits.memory or 0)}; {kept}{free}"


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
