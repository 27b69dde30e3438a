"""What a sweep will take before it is run: bytes of weights from the index, all else from one traced block of a kind.

A block is traced by running it, through the sweep itself, at the shapes of the run. Peaks are the least that are
possible (one block in memory, one operation at a time).
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_blockskip.engine import limits, memory, sweep
from mlx_blockskip.engine.reader import BlockReader
from mlx_blockskip.engine.shards import Shards
from mlx_blockskip.engine.stack import Stack, State, Trainable, arrays, like
from mlx_blockskip.engine.sweep import Batch

Done = Callable[[], None]
"""Says that a part of what is traced is done."""

Run = Callable[[BlockReader, Done, int], None]
"""`(reader, done, visits)`: visits a block so often."""

SMALL, TRIES, LARGE_TRIES = 64 << 20, 5, 2
"""How often a block is traced: TRIES times where its peak is below SMALL bytes. MLX looks at its limit at every tenth
task that it hands on (two an operation), so what is in memory side by side depends on how many went before: there are
five cases, and a sweep meets them all. Once is enough where there is plenty of room.
"""

TINY, VISITS = 8 << 20, 10
"""Where a peak is below TINY bytes, operations are so short that by chance the next is there before the last is let go;
a sweep of many blocks meets the worst, so each try but the first makes about VISITS visits in a row.
"""


@dataclass(frozen=True)
class Cost:
    """What the work on one block takes: bytes beside its weights and its input, and seconds without the reading (0
    where they were not asked for). first: bytes at the first block of a path back, whose input wants no gradient.
    """

    nbytes: int
    seconds: float
    first: int = 0


def nbytes(arrays: Iterable[mx.array | None]) -> int:
    """Bytes of a state or of a modulation."""
    return sum(array.nbytes for array in arrays if array is not None)


def forward_cost(
    stack: Stack,
    shards: Shards,
    sample: Batch,
    index: int,
    trainable: Trainable | None = None,
    timed: bool = False,
    once: bool = False,
) -> Cost:
    """Block `index` applied. sample: evaluated. once: it is not traced again."""
    one = _copy(sample)
    run = _forward(stack, one, index, trainable)
    (peak,) = _traced(stack, shards, one, index, run, once)
    return Cost(peak, _seconds(stack, shards, one, index, run) if timed else 0.0)


def _copy(sample: Batch) -> Batch:
    """With a state of its own, since a sweep replaces it."""
    return Batch(sample.state, sample.context, sample.modulation)


def _forward(stack: Stack, one: Batch, index: int, trainable: Trainable | None) -> Run:
    trees = {index: trainable} if trainable else {}

    def run(reader: BlockReader, done: Done, visits: int) -> None:
        sweep.forward(stack, reader, [one], [index] * visits, trainable=trees, bridge=_as_it_is)
        done()

    return run


def backward_cost(
    stack: Stack,
    shards: Shards,
    sample: Batch,
    index: int,
    trainable: Trainable,
    timed: bool = False,
    once: bool = False,
) -> Cost:
    """Block `index` recomputed and pulled back, with the gradients of its input and of its trainable tree.

    It is visited twice in a row, as an inner block of a path and as the first one.
    """
    one = _copy(sample)

    def run(reader: BlockReader, done: Done, visits: int) -> None:
        for _ in range(max(1, visits // 2)):
            sweep.backward(
                stack, reader, [one], [index, index], trainable={index: trainable}, loss=_loss,
                on_grad=lambda block, grads: done(), bridge=_as_it_is,
            )  # fmt: skip

    inner, first = _traced(stack, shards, one, index, run, once)
    inner -= nbytes(one.state)  # its own input, which here was made on the way
    seconds = 0.0
    if timed:
        forward = _seconds(stack, shards, one, index, _forward(stack, one, index, trainable))
        seconds = max(0.0, _seconds(stack, shards, one, index, run) / 2 - forward)
    return Cost(inner, seconds, first)


def kept_bytes(stack: Stack, shards: Shards, sample: Batch, index: int, trainable: Trainable) -> int:
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


def _traced(stack: Stack, shards: Shards, sample: Batch, index: int, run: Run, once: bool) -> list[int]:
    """For each part of a visit, of which `run` says when it is done: the highest peak over what is there before, less
    the weights of the block.
    """

    def trace(visits: int) -> list[int]:
        reader = BlockReader(shards, stack, 0, prefetch=False)
        mx.clear_cache()
        with limits.tight():
            return _peaks(lambda done: run(reader, done, visits))

    weights = BlockReader(shards, stack, 0, prefetch=False).nbytes(index, sweep.part_of([sample]))
    found = trace(1)
    parts, peak = len(found), max(found)
    for _ in range(0 if once else (TRIES if peak < SMALL else LARGE_TRIES) - 1):
        found += trace(VISITS if peak < TINY else 1)
    return [max(found[place::parts]) - weights for place in range(parts)]


def _seconds(stack: Stack, shards: Shards, sample: Batch, index: int, run: Run) -> float:
    """Of one visit, the block's weights in memory."""
    resident = BlockReader(shards, stack, None)
    dict(resident.walk([index], sweep.part_of([sample])))
    started = time.perf_counter()
    run(resident, lambda: None, 1)
    return time.perf_counter() - started


def _peaks(run: Callable[[Done], None]) -> list[int]:
    """Bytes over what is there before, the highest up to each call of `done`."""
    before, highest, found = mx.get_active_memory(), memory.Peak(), list[int]()

    def done() -> None:
        found.append(highest.read() - before)
        highest.restart()

    highest.restart()
    run(done)
    return found


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
        own = costs[place].nbytes if place else costs[place].first
        highest = max(highest, inputs + others + after + sums + weights[place] + own)
        after += trainable[place]
    return highest
