"""What a sweep will take before it is run: bytes of weights from the index, all else from one traced block of a kind.

A block is traced by running it once at the shapes of the run, where MLX schedules one operation at a time. So peaks are
the least that are possible: one block in memory, one operation at work. They say nothing of an operation's output that
is there a moment longer by chance, which is noise beside a block of a real model and may be a third of a tiny one.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx

from mlx_blockskip.engine import limits, memory, sweep
from mlx_blockskip.engine.reader import BlockReader
from mlx_blockskip.engine.sampled import sampled
from mlx_blockskip.engine.shards import Shards
from mlx_blockskip.engine.stack import Modulation, Stack, Trainable, Weights, arrays, like
from mlx_blockskip.engine.sweep import Batch

MOMENT = 0.2
"""Seconds within which a trace is made again."""


@dataclass(frozen=True)
class Cost:
    """What the work on one block takes: bytes beside its weights and its input, and seconds without the reading.

    kept: bytes that stay between the way there and the way back where activations are kept.
    """

    nbytes: int
    seconds: float
    kept: int = 0


def nbytes(arrays: Iterable[mx.array | None]) -> int:
    """Bytes of a state or of a modulation."""
    return sum(array.nbytes for array in arrays if array is not None)


def measured(run: Callable[[], None]) -> tuple[int, float]:
    """Bytes of MLX memory over what is there before, at the peak of what `run` evaluates, and its seconds."""
    before, highest = memory.settled(), memory.Peak()
    mx.clear_cache()
    with limits.tight():
        highest.restart()
        started = time.perf_counter()
        run()
        seconds = time.perf_counter() - started
    return highest.read() - before, seconds


def traced(run: Callable[[], None]) -> tuple[int, float, bool]:
    """The same, from a sample of the passes that `run` is made of (`engine.sampled`). The last: whether the sample left
    out any over a map.

    What takes a moment is run three times, and the highest peak counts: MLX's CPU backend counts ten operations as one,
    so which of their outputs meet is chance, and these are all that a small model takes.
    """
    peaks: list[int] = []
    seconds: list[float] = []
    left_out = False
    while len(peaks) < 3 and sum(seconds) < MOMENT:
        with sampled() as sample:
            peak, took = measured(run)
        peaks.append(peak)
        seconds.append(took + sample.seconds)
        left_out = sample.left_out > 0
    return max(peaks), min(seconds), left_out


def forward_cost(stack: Stack, shards: Shards, sample: Batch, index: int, trainable: Trainable | None = None) -> Cost:
    """Block `index` applied. sample: evaluated."""
    apply = stack.block(index).kind.apply
    with _bound(stack, shards, sample, index) as (weights, modulation):
        peak, seconds, _ = traced(
            lambda: mx.eval(apply(weights, trainable or {}, sample.state, sample.context, modulation, None))
        )
    return Cost(peak, seconds)


def backward_cost(stack: Stack, shards: Shards, sample: Batch, index: int, trainable: Trainable) -> Cost:
    """Block `index` recomputed and pulled back, with the gradients of its input and of its trainable tree."""
    apply, own, kept = stack.block(index).kind.apply, arrays(sample.state), 0
    with _bound(stack, shards, sample, index) as (weights, modulation):

        def block(*values: mx.array) -> list[mx.array]:
            state, tree = like(sample.state, list(values[: len(own)])), values[len(own) :]
            named = dict(zip(trainable, tree, strict=True))
            return arrays(apply(weights, named, state, sample.context, modulation, None))

        def run() -> None:
            nonlocal kept
            before = memory.settled()
            cotangents = [mx.zeros_like(a) for a in own]
            mx.eval(cotangents)
            found, pulled = mx.vjp(block, [*own, *trainable.values()], cotangents)
            mx.eval(found)
            kept = max(0, memory.settled() - before - nbytes(own))
            del found, cotangents
            mx.eval(pulled)

        peak, seconds, _ = traced(run)
    return Cost(peak, seconds, kept)


def carried(points: Sequence[tuple[int, Cost]], tokens: int) -> Cost:
    """The cost at so many tokens, from those at two smaller counts: bytes grow along a line, and seconds as a t + b t^2
    (products and attention).
    """
    (t0, low), (t1, high) = points
    share = (tokens - t0) / (t1 - t0)
    b = (high.seconds / t1 - low.seconds / t0) / (t1 - t0)
    seconds = tokens * (low.seconds / t0 + b * (tokens - t0))

    def on_line(of_low: int, of_high: int) -> int:
        return int(of_low + share * (of_high - of_low))

    return Cost(on_line(low.nbytes, high.nbytes), max(seconds, high.seconds), on_line(low.kept, high.kept))


@contextmanager
def _bound(stack: Stack, shards: Shards, sample: Batch, index: int) -> Iterator[tuple[Weights, Modulation]]:
    """The weights of a block, in memory, and its modulation."""
    ((_, weights),) = BlockReader(shards, stack, 0, prefetch=False).walk([index], sweep.part_of([sample]))
    modulation = sweep.modulation_of(stack.block(index), weights, sample, index)
    yield weights, modulation


def forward_peak(weights: Sequence[int], costs: Sequence[Cost], state: int, waiting: int = 1) -> int:
    """Peak of a forward sweep of `waiting` samples, by place on the path; the states of all but one are counted."""
    return max(w + cost.nbytes for w, cost in zip(weights, costs, strict=True)) + (waiting - 1) * state


def backward_peak(
    weights: Sequence[int], costs: Sequence[Cost], state: int, trainable: Sequence[int], waiting: int = 1
) -> int:
    """Peak of a backward sweep of `waiting` samples: at each block its weights and its work, where the inputs of the
    blocks before it and the gradients of those after it are on disk.

    trainable: bytes of each block's tree, by place on the path. state: bytes of a sample's state.
    """
    others = 2 * (waiting - 1) * state  # the other samples' ends and cotangents
    sums = 2 if waiting > 1 else 0  # gradients so far, and with this sample's
    return others + max(w + cost.nbytes + sums * t for w, cost, t in zip(weights, costs, trainable, strict=True))
