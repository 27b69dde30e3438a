"""Trials of memory: one block of the smallest published model under the tightest limit."""

import mlx.core as mx
import numpy as np

from mlx_blockskip.engine import planner, sweep
from mlx_blockskip.engine.reader import BlockReader
from mlx_blockskip.engine.stack import State, arrays
from mlx_blockskip.engine.sweep import Batch
from mlx_blockskip.tasks.doctor import hollows
from mlx_blockskip.tasks.doctor.hollows import Hollow
from mlx_blockskip.tasks.doctor.trials import Trial
from mlx_blockskip.tasks.doctor.workshop import Workshop

SIDE, TEXT = 256, 64
PEAK = "peak/block"

MIB = 2**20
RESERVE = 200.0
"""MiB by which MLX may go over the CPU backend's figure: a command buffer of Metal keeps what it touches."""

NOISE = 40.0
"""MiB between two runs of the same work: outputs that are there a moment longer by chance."""

PREDICTED = (
    "A block takes more memory than is predicted for it, so a run may be let through that does not fit. Give "
    "--memory-budget a smaller size than the machine has, and report it."
)
STORED = (
    "A block takes more memory here than the figures of README, docs/memory.md and the table above were traced with. "
    "Add the difference to them, and report it."
)


def block(workshop: Workshop) -> tuple[Hollow, Batch]:
    """The smallest published model, and a sample of it."""

    def make() -> tuple[Hollow, Batch]:
        found = hollows.published(workshop, next(iter(hollows.sizes())))
        return found, evaluated(found, found.sample(SIDE, SIDE, TEXT))

    return workshop.once(("peaks",), make)


def evaluated(of: Hollow, sample: Batch) -> Batch:
    """The same, in memory."""
    modulations = [sample.modulation(of.index(kind)) for kind in of.kinds] if sample.modulation else []
    mx.eval(sample.state, sample.context, modulations)
    return sample


def predicted(workshop: Workshop) -> int:
    """Bytes of the way there and back over one block, with its weights, as the planner has it."""
    of, sample = block(workshop)
    index, factors = _first(of)
    cost = planner.backward_cost(of.model.stack, of.model.reader.shards, sample, index, factors)
    weights, state = of.model.reader.nbytes(index, "body"), planner.nbytes(arrays(sample.state))
    return planner.backward_peak([weights], [cost], state, [planner.nbytes(factors.values())])


def measured(workshop: Workshop) -> int:
    """The same, of a sweep that does it."""
    return workshop.once(("peaks", "measured"), lambda: _swept(workshop))


def _swept(workshop: Workshop) -> int:
    of, sample = block(workshop)
    index, factors = _first(of)
    stack = of.model.stack
    reader = BlockReader(of.model.reader.shards, stack, 0, prefetch=False)
    batch = Batch(sample.state, sample.context, sample.modulation)

    def loss(_: int, state: State) -> mx.array:
        return mx.sum(arrays(state)[0].astype(mx.float32))

    def there_and_back() -> None:
        sweep.backward(
            stack, reader, [batch], [index], trainable={index: factors}, loss=loss, on_grad=lambda *_: None,
            bridge=lambda batch, start, stop, state: state,
        )  # fmt: skip
        mx.synchronize()

    return planner.measured(there_and_back)[0]


def _first(of: Hollow) -> tuple[int, dict[str, mx.array]]:
    index = of.index(of.kinds[0])
    factors = of.factors(of.kinds[0])
    mx.eval(factors)
    return index, factors


def over_prediction(workshop: Workshop) -> float:
    """MiB above what is predicted."""
    return (measured(workshop) - predicted(workshop)) / MIB


def over_reference(workshop: Workshop) -> float:
    """MiB above what the CPU backend took."""
    return (measured(workshop) - int(workshop.references[PEAK][0])) / MIB


TRIALS = (
    Trial("peak of a block: above the predicted", over_prediction, NOISE, "MiB", PREDICTED),
    Trial("peak of a block: above the CPU's", over_reference, RESERVE, "MiB", STORED),
)


def references(workshop: Workshop) -> dict[str, np.ndarray]:
    """What TRIALS hold this machine against."""
    return {PEAK: np.array([measured(workshop)], np.int64)}
