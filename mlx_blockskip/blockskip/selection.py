"""Which blocks to skip (DiT-BlockSkip, Eq. 2 and Algorithm 1).

    (n*, m*) = argmin over n + m = k of the sum over subjects of D(x, x_n) + D(x, x^m)

x is made with full attention, x_n (x^m) with attention from image to text masked in the first n (last m) blocks. The
sum falls apart into one for n and one for m, so one table of distances answers for every k.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_blockskip.blockskip import masking
from mlx_blockskip.engine.reader import BlockReader
from mlx_blockskip.engine.stack import Stack, State, Trainable
from mlx_blockskip.engine.sweep import Batch, forward

FULL, FIRST, LAST = "full", "first", "last"
Variant = tuple[str, int]
"""Which end is masked, and how many blocks of it: (FULL, 0), (FIRST, n) or (LAST, m)."""


@dataclass(frozen=True)
class Distances:
    """first[n] = D(x, x_n) and last[m] = D(x, x^m) for n, m = 0..k; what is at 0 is 0.

    Raises ValueError where the two are not of one length.
    """

    first: tuple[float, ...]
    last: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.first) != len(self.last):
            raise ValueError(f"{len(self.first)} and {len(self.last)} distances do not make a table")

    @property
    def k(self) -> int:
        return len(self.first) - 1

    @property
    def table(self) -> np.ndarray:
        """(k + 1, k + 1): the sum of Eq. 2 for every n (row) and m (column)."""
        return np.array(self.first)[:, None] + np.array(self.last)[None, :]

    def best(self, k: int) -> tuple[int, int]:
        """(n*, m*) for a budget of k blocks. Of equal ones that with more at the start, where skipping is exact.

        Raises ValueError for a budget that the table does not cover.
        """
        if not 0 <= k <= self.k:
            raise ValueError(f"the table is for at most {self.k} blocks, not {k}")
        return min(((n, k - n) for n in range(k, -1, -1)), key=lambda pair: self.first[pair[0]] + self.last[pair[1]])

    def plans(self, depth: int) -> dict[int, tuple[int, int]]:
        """(n*, m*) by k, for every k that leaves a block to train."""
        return {k: self.best(k) for k in range(1, min(self.k, depth - 1) + 1)}


def mean(tables: Sequence[Distances]) -> Distances:
    """Over subjects, prompts and seeds."""
    first, last = (np.mean([getattr(t, end) for t in tables], axis=0) for end in (FIRST, LAST))
    return Distances(tuple(map(float, first)), tuple(map(float, last)))


def variants(k: int) -> list[Variant]:
    """What Algorithm 1 makes of one prompt and seed: the full one, then every n and every m up to k."""
    return [(FULL, 0), *((FIRST, n) for n in range(1, k + 1)), *((LAST, m) for m in range(1, k + 1))]


def masks_of(variant: Variant, depth: int) -> dict[int, str]:
    """The masks of a variant's samples."""
    end, count = variant
    return {FULL: {}, FIRST: masking.first(count), LAST: masking.last(count, depth)}[end]


def collect(distances: Mapping[Variant, float], k: int) -> Distances:
    """A table from distances by variant; what lies between two that are known is interpolated."""

    def curve(end: str) -> tuple[float, ...]:
        known = {0: 0.0} | {count: value for (which, count), value in distances.items() if which == end}
        places = sorted(known)
        return tuple(float(x) for x in np.interp(range(k + 1), places, [known[place] for place in places]))

    return Distances(curve(FIRST), curve(LAST))


def probed(k: int, stride: int) -> list[int]:
    """The n (and m) that are looked at: every stride-th, and k."""
    return sorted({*range(stride, k + 1, stride), k} - {0})


def evaluations(depth: int, k: int, stride: int = 1) -> tuple[int, int]:
    """Evaluations of a block for one sample: (with prefixes and suffixes shared, each variant on its own)."""
    looked_at = probed(k, stride)
    # the full pass; the masked start, which goes on to the end as the variant k; the others, each from its own place on
    shared = depth + depth * bool(k) + sum(depth - n for n in looked_at if n < k) + sum(looked_at)
    return shared, depth * (1 + 2 * len(looked_at))


@dataclass
class Probed:
    """Distances by sample and variant, and how often a block was evaluated."""

    distances: list[dict[Variant, float]]
    evaluations: int


def probe(
    stack: Stack,
    reader: BlockReader,
    samples: Sequence[Batch],
    k: int,
    *,
    stride: int = 1,
    trainable: Mapping[int, Trainable] | None = None,
    velocity: Callable[[int, State], mx.array],
    wait: Callable[[Batch], Batch] = lambda sample: sample,
) -> Probed:
    """How far the predicted velocity goes from that with full attention, for every variant, in one sweep.

    The states at a boundary are shared: x_n leaves the masked start at boundary n, x^m the full pass at boundary
    L - m. So every block's weights are read once. `samples` wait at boundary 0; `velocity(sample, state at the end)`
    gives what is compared; `wait` may put a new sample where there is room.
    """
    depth = stack.depth
    looked_at = probed(k, stride)
    masked = [replace(sample, masks=masking.first(k)) for sample in samples] if k else []
    waiting = [*samples, *masked]
    whose: list[tuple[int, Variant]] = [(i, (FULL, 0)) for i in range(len(samples))]
    whose += [(i, (FIRST, k)) for i in range(len(masked))]
    count = 0

    def join(boundary: int) -> None:
        nonlocal count
        if boundary < 0:  # in the prelude
            return
        if boundary in looked_at and boundary < k:
            for i, sample in enumerate(masked):
                waiting.append(wait(replace(sample, masks={})))
                whose.append((i, (FIRST, boundary)))
        if depth - boundary in looked_at:
            for i, sample in enumerate(samples):
                waiting.append(wait(replace(sample, masks=masking.last(depth - boundary, depth))))
                whose.append((i, (LAST, depth - boundary)))
        count += len(waiting)

    forward(stack, reader, waiting, trainable=trainable, on_boundary=join)
    full = [velocity(i, sample.state) for i, sample in enumerate(samples)]
    found: list[dict[Variant, float]] = [{} for _ in samples]
    for (i, variant), sample in zip(whose[len(samples) :], waiting[len(samples) :], strict=True):
        found[i][variant] = difference(full[i], velocity(i, sample.state))
    return Probed(found, count)


def difference(full: mx.array, masked: mx.array) -> float:
    """|v - v_n|^2 / |v|^2, in float32."""
    full, masked = full.astype(mx.float32), masked.astype(mx.float32)
    return float(mx.sum(mx.square(full - masked)) / mx.maximum(mx.sum(mx.square(full)), 1e-12))


def as_json(distances: Distances, depth: int) -> dict[str, Any]:
    """What `plan.from_selection` reads, and the table that it comes from."""
    plans = {str(k): {"n": n, "m": m} for k, (n, m) in distances.plans(depth).items()}
    return {"depth": depth, "plans": plans, "first": list(distances.first), "last": list(distances.last)}


def windows(depth: int, width: int) -> Iterable[tuple[int, int]]:
    """start, stop of every run of `width` blocks (the paper's Figure 3)."""
    return ((start, start + width) for start in range(depth - width + 1))
