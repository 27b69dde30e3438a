"""The backward sweep where memory is ample: weights stay, and so do activations, which are then not recomputed.

Two units of work (forward, back) instead of three, and the bits of `sweep.backward`. One batch at a time is in memory.
"""

from collections.abc import Callable, Mapping, Sequence

import mlx.core as mx

from mlx_blockskip.engine import timeline
from mlx_blockskip.engine.reader import BlockReader
from mlx_blockskip.engine.stack import Stack, Trainable
from mlx_blockskip.engine.sweep import Batch, Bridge, Loss, cross, modulation_of, part_of


def backward(
    stack: Stack,
    reader: BlockReader,
    batches: Sequence[Batch],
    path: Sequence[int],
    *,
    trainable: Mapping[int, Trainable],
    loss: Loss,
    on_grad: Callable[[int, dict[str, mx.array]], None],
    bridge: Bridge | None = None,
) -> list[mx.array]:
    """As `sweep.backward`, with every block of `path` and all its activations in memory at once."""
    part = part_of(batches)
    weights = dict(timeline.walk(reader, path, part, "forward"))
    names = [(block, name) for block in path for name in trainable.get(block, {})]
    total: dict[int, dict[str, mx.array]] = {}
    losses: list[mx.array] = []
    for i, batch in enumerate(batches):

        def run(*values: mx.array, i: int = i, batch: Batch = batch) -> list[mx.array]:
            trees: dict[int, dict[str, mx.array]] = {block: {} for block in path}
            for (block, name), value in zip(names, values, strict=True):
                trees[block][name] = value
            state, before = batch.state, path[0]
            for block in path:
                state = cross(i, before, block, state, bridge)
                one = stack.block(block)
                modulation = modulation_of(one, weights[block], batch, block)
                state = one.kind.apply(
                    weights[block], trees[block], state, batch.context, modulation, batch.masks.get(block)
                )
                before = block + 1
            state = cross(i, before, stack.depth, state, bridge)
            batch.state = state
            return [loss(i, state)]

        (value,), pulled = mx.vjp(run, [trainable[block][name] for block, name in names], [mx.array(1.0)])
        grads = dict(zip(names, pulled, strict=True))
        del pulled
        for block in reversed(path):
            own = {name: grads.pop((block, name)) for name in trainable.get(block, {})}
            found = total.get(block)
            total[block] = {name: found[name] + g for name, g in own.items()} if found else own
            mx.eval(value, batch.state, total[block])
            timeline.visit(reader, block, part, "backward")
        losses.append(value)
    for block in reversed(path):
        on_grad(block, total.pop(block))
    return losses
