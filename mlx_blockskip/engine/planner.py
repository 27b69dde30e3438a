"""What a sweep will take before it is run: bytes of weights from the index, all else from one traced block of a kind.

A block is traced by running it once, through the sweep itself, at the shapes of the run. Peaks are the least that are
possible (one block in memory, one operation at a time).
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_blockskip.engine import limits, memory, sweep
from mlx_blockskip.engine.stack import Stack, State, Trainable, arrays, like
from mlx_blockskip.engine.sweep import Sample
from mlx_blockskip.engine.weights import BlockReader, Shards


@dataclass(frozen=True)
class Cost:
    """What the work on one block takes: bytes beside its weights and its input, and seconds without the reading (0
    where they were not asked for).
    """

    nbytes: int
    seconds: float


def nbytes(arrays: Iterable[mx.array | None]) -> int:
    """Bytes of a state or of a modulation."""
    return sum(array.nbytes for array in arrays if array is not None)


def forward_cost(
    stack: Stack, shards: Shards, sample: Sample, index: int, trainable: Trainable | None = None, timed: bool = False
) -> Cost:
    """Block `index` applied once. sample: evaluated."""
    one = Sample(sample.state, sample.context, sample.modulation)
    trees = {index: trainable} if trainable else {}

    def run(reader: BlockReader) -> None:
        sweep.forward(stack, reader, [one], [index], trainable=trees)

    return _traced(stack, shards, one, index, run, timed)


def backward_cost(
    stack: Stack, shards: Shards, sample: Sample, index: int, trainable: Trainable, timed: bool = False
) -> Cost:
    """Block `index` recomputed and pulled back, with the gradients of its input and of its trainable tree.

    It is visited twice in a row, since the first block of a path has no use for its input's gradient.
    """
    one = Sample(sample.state, sample.context, sample.modulation)

    def run(reader: BlockReader) -> None:
        sweep.backward(
            stack, reader, [one], [index, index], trainable={index: trainable}, loss=_loss,
            on_grad=lambda block, grads: None, bridge=_as_it_is,
        )  # fmt: skip

    cost = _traced(stack, shards, one, index, run, timed)
    if not timed:
        return cost
    forward = forward_cost(stack, shards, sample, index, trainable, timed)
    return Cost(cost.nbytes, max(0.0, cost.seconds / 2 - forward.seconds))


def kept_bytes(stack: Stack, shards: Shards, sample: Sample, index: int, trainable: Trainable) -> int:
    """What block `index` leaves in memory between forward and back where activations are kept."""
    block = stack.blocks[index]
    ((_, weights),) = BlockReader(shards, stack, 0, prefetch=False).walk([index], sweep.part_of([sample]))
    modulation = sweep.modulation_of(block, weights, sample, index)
    own = arrays(sample.state)

    def run(*values: mx.array) -> list[mx.array]:
        tree = dict(zip(trainable, values[len(own) :], strict=True))
        return arrays(
            block.kind.apply(
                weights, tree, like(sample.state, list(values[: len(own)])), sample.context, modulation, None
            )
        )

    before = mx.get_active_memory()
    found, pulled = mx.vjp(run, [*own, *trainable.values()], [mx.zeros_like(a) for a in own])
    mx.eval(found)
    mx.synchronize()
    after = mx.get_active_memory()
    del pulled
    return max(0, after - before)


def _loss(sample: int, state: State) -> mx.array:
    return sum((mx.mean(mx.square(a.astype(mx.float32))) for a in arrays(state)), mx.array(0.0))


def _as_it_is(sample: int, start: int, stop: int, state: State) -> State:
    return state


def _traced(
    stack: Stack, shards: Shards, sample: Sample, index: int, run: Callable[[BlockReader], None], timed: bool
) -> Cost:
    """Peak of `run` over what is there before it, less the weights of the block."""
    reader = BlockReader(shards, stack, 0, prefetch=False)
    part = sweep.part_of([sample])
    mx.clear_cache()
    with limits.tight():
        before = mx.get_active_memory()
        highest = memory.Peak()
        highest.restart()
        run(reader)
        peak = highest.read()
    cost = Cost(peak - before - reader.nbytes(index, part), 0.0)
    if not timed:
        return cost
    resident = BlockReader(shards, stack, None)
    dict(resident.walk([index], part))
    started = time.perf_counter()
    run(resident)
    return Cost(cost.nbytes, time.perf_counter() - started)


def forward_peak(weights: Sequence[int], costs: Sequence[Cost], state: int, waiting: int = 1) -> int:
    """Peak of a forward sweep of `waiting` samples, by place on the path; the states of all but one are counted."""
    return max(w + cost.nbytes for w, cost in zip(weights, costs, strict=True)) + (waiting - 1) * state


def backward_peak(
    weights: Sequence[int], costs: Sequence[Cost], state: int, trainable: Sequence[int], waiting: int = 1
) -> int:
    """Peak of a backward sweep of `waiting` samples: at each block its weights and its work, beside the inputs of the
    blocks before it and the gradients of those after it.

    trainable: bytes of each block's tree, by place on the path. state: bytes of a sample's state.
    """
    highest, after = 0, 0
    for place in reversed(range(len(weights))):
        others = 3 * (waiting - 1) * state  # the other samples' inputs, ends and cotangents
        sums = 2 * trainable[place] if waiting > 1 else 0  # gradients so far, and with this sample's
        inputs = place * waiting * state
        highest = max(highest, inputs + others + after + sums + weights[place] + costs[place].nbytes)
        after += trainable[place]
    return highest
