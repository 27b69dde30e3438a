"""The seconds of a training step, from rates, from blocks that were timed, and from what a model is made of.

Linear layers: a product there, one when the block is computed again, one back to the input; their weights get no
gradient. What a timed block took beyond its products (attention, norms, modulation, LoRA) is other work; what Python
and synchronisation take is waiting. Reading goes on beside all of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mlx_blockskip.blockskip import plan as plans
from mlx_blockskip.tasks.doctor import hollows
from mlx_blockskip.tasks.doctor.blocks import Timed, counted, sample_of
from mlx_blockskip.tasks.doctor.hollows import Hollow
from mlx_blockskip.tasks.doctor.rates import Rates
from mlx_blockskip.tasks.doctor.workshop import Workshop

RATIO = 0.5
PRECISIONS = {"4 bit": 4, "bf16": 0}
OTHER = "attention and elementwise"

BESIDE = 2 << 30
"""Bytes of a budget that are left for other things than weights that stay in memory."""


@dataclass(frozen=True)
class Step:
    """A predicted step, in seconds. binds: the largest of its parts. basis: whose block told of other work; empty where
    none was timed, and other work is left out.
    """

    model: str
    precision: str
    seconds: float
    products: float
    other: float
    waiting: float
    reading: float
    binds: str
    basis: str


def steps(workshop: Workshop, rates: Rates, timed: Sequence[Timed], budget: int) -> tuple[Step, ...]:
    """Of every preset in both precisions, the largest first."""
    found = []
    for name in reversed(hollows.sizes()):
        counts = counts_of(hollows.published(workshop, name))
        for precision, bits in PRECISIONS.items():
            found.append(step(hollows.published(workshop, name, bits), precision, counts, rates, timed, budget))
    return tuple(found)


def counts_of(of: Hollow) -> dict[str, int]:
    """Operations of the linear layers of a block on the way there, by its kind."""
    sample = sample_of(of)
    return {kind: counted(of, kind, sample) for kind in of.kinds}


def step(
    of: Hollow, precision: str, counts: Mapping[str, int], rates: Rates, timed: Sequence[Timed], budget: int
) -> Step:
    """One step of a model with RATIO of its blocks skipped. counts: see `counts_of`."""
    model = of.model
    plan = plans.choose(model.stack.depth, ratio=RATIO, recorded=model.defaults.plans)
    products = other = waiting = 0.0
    for kind in of.kinds:
        count = sum(model.stack.kinds[index] == kind for index in plan.retained)
        flops, like = counts[kind], nearest(timed, of.name, kind)
        products += count * rates.products(flops, precision)
        waiting += count * rates.waits(like.building if like else 0.0)
        other += count * like.other * flops / like.flops if like else 0.0
    weights = sum(model.reader.nbytes(index, "body") for index in plan.retained)
    reading = 2 * max(0, weights - max(0, budget - BESIDE)) / rates.reading
    parts = {"products": products, OTHER: other, "waiting": waiting, "reading": reading}
    seconds = max(products + other + waiting, reading)
    binds = max(parts, key=lambda part: parts[part])
    basis = nearest(timed, of.name, of.kinds[-1])
    return Step(
        of.name,
        precision,
        seconds,
        products,
        other,
        waiting,
        reading,
        binds,
        f"{basis.model}, {basis.tokens} tokens" if basis else "",
    )


def nearest(timed: Sequence[Timed], model: str, kind: str) -> Timed | None:
    """A timed block to go by: of this model, else of this kind, else any; None where none was timed."""
    order = sorted(timed, key=lambda one: (one.model != model, one.kind != kind))
    return order[0] if order else None
