"""Times of whole blocks of the known models at their training size, on zeros in 4 bit."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_blockskip.engine.stack import arrays, like
from mlx_blockskip.engine.sweep import Batch
from mlx_blockskip.tasks.doctor import hollows
from mlx_blockskip.tasks.doctor.counting import linear_flops
from mlx_blockskip.tasks.doctor.hollows import Hollow
from mlx_blockskip.tasks.doctor.peaks import evaluated
from mlx_blockskip.tasks.doctor.rates import Rates
from mlx_blockskip.tasks.doctor.workshop import Workshop

BITS, PRECISION = 4, "4 bit"
SHARES = (1.0, 0.5, 0.25, 0.125)
"""Of a sample's sides and text, where the whole would take too long."""

RUNS = 3
BLOCK_SECONDS = 20.0
"""That the runs of one block may take."""

OVERHEAD = 1.5
"""What a block is taken to need beside its products until that is known."""


@dataclass(frozen=True)
class Timed:
    """A block that was run. forward, whole: seconds of the way there, and of all that a step does with a block: the way
    there, and the block again and back. building: of these, seconds in Python. flops: of its linear layers on the way
    there. other: seconds that neither its products nor waiting explain. share: of a sample's sides that it was run at.
    """

    model: str
    kind: str
    tokens: int
    share: float
    forward: float
    whole: float
    building: float
    other: float
    flops: int


def timed(workshop: Workshop, rates: Rates, allowed: float, done: Callable[[str], None]) -> tuple[Timed, ...]:
    """A block of each kind, of the largest model first, then of the smallest and the others, in the seconds that are
    allowed.
    """
    names, found, last = list(hollows.sizes()), list[Timed](), time.perf_counter() + allowed
    for name in dict.fromkeys([names[-1], names[0], *names]):
        of = hollows.published(workshop, name, BITS)
        for kind in of.kinds:
            left, overhead = min(last - time.perf_counter(), BLOCK_SECONDS), _overhead(found, rates)
            share = _affordable(of, kind, rates, left / overhead)
            if share is not None:
                found.append(run(of, kind, share, rates))
            done(f"{name}, {kind}")
        of.model.release()
        mx.clear_cache()
    return tuple(found)


def training_size(of: Hollow) -> tuple[int, int]:
    """Pixels a side of a training patch, and text tokens."""
    return of.model.defaults.train_resolution, of.model.defaults.max_sequence_length


def _overhead(found: Sequence[Timed], rates: Rates) -> float:
    """How much longer than its products a block takes, as far as is known."""
    return max([OVERHEAD, *(one.whole / rates.products(one.flops, PRECISION) for one in found)])


def _affordable(of: Hollow, kind: str, rates: Rates, allowed: float) -> float | None:
    """The largest of SHARES at which a block's products take so many seconds at most; None where none does."""
    for share in SHARES:
        seconds = rates.products(counted(of, kind, sample_of(of, share)), PRECISION)
        if (RUNS + 1) * seconds <= allowed:
            return share
    return None


def sample_of(of: Hollow, share: float = 1.0) -> Batch:
    """A training sample, or one with a share of its sides and of its text."""
    (side, length), multiple = training_size(of), of.model.size_multiple
    part = max(multiple, int(side * share) // multiple * multiple)
    return of.sample(part, part, max(1, int(length * share)))


def counted(of: Hollow, kind: str, sample: Batch) -> int:
    """Operations of a block's linear layers on the way there, from the shapes."""
    block, weights = of.model.stack.block(of.index(kind)), of.weights(kind)
    with linear_flops() as found:
        block.kind.apply(weights, {}, sample.state, sample.context, _modulation(of, kind, sample), None)
    return sum(found)


def _modulation(of: Hollow, kind: str, sample: Batch) -> object:
    return sample.modulation(of.index(kind)) if sample.modulation is not None else None


def run(of: Hollow, kind: str, share: float, rates: Rates) -> Timed:
    """The medians of a block's times, its weights in memory."""
    sample = evaluated(of, sample_of(of, share))
    apply, modulation = of.model.stack.block(of.index(kind)).kind.apply, _modulation(of, kind, sample)
    weights, factors, own = dict(of.weights(kind)), of.factors(kind), arrays(sample.state)
    mx.eval(weights, factors)

    def block(*values: mx.array) -> list[mx.array]:
        state = like(sample.state, list(values[: len(own)]))
        tree = dict(zip(factors, values[len(own) :], strict=True))
        return arrays(apply(weights, tree, state, sample.context, modulation, None))

    values, upstream = [*own, *factors.values()], [mx.ones_like(x) for x in own]
    forward, ahead = _times(lambda: block(*values))
    back, behind = _times(lambda: list(mx.vjp(block, values, upstream)))
    whole, building, flops = forward + back, ahead + behind, counted(of, kind, sample)
    other = max(0.0, whole - rates.products(flops, PRECISION) - rates.waits(building))
    tokens = sum(x.shape[1] for x in own)
    return Timed(of.name, kind, tokens, share, forward, whole, building, other, flops)


def _times(build: Callable[[], object]) -> tuple[float, float]:
    """Median seconds of building a graph and evaluating it, and of building it alone, after a run that warms up."""
    found = []
    for _ in range(RUNS + 1):
        mx.synchronize()
        started = time.perf_counter()
        graph = build()
        built = time.perf_counter()
        mx.eval(graph)
        mx.synchronize()
        found.append((time.perf_counter() - started, built - started))
    return sorted(found[1:])[RUNS // 2]
