"""The sweep: bind one block's weights, apply the block to everything that waits at it, let the weights go, move on.

The device is waited for once a block, a direction and a batch, which bounds what is in memory, and nowhere else.

Forward keeps nothing but the states. Backward keeps each visited block's input, then goes back from the last block to
the first: recompute the block under `mx.vjp` with respect to its state and its trainable tree, evaluate, hand the
gradient over, pass the cotangent on. Resident and streamed weights take the same steps, so they give the same bits.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from mlx_blockskip.engine import timeline
from mlx_blockskip.engine.reader import BlockReader, Part
from mlx_blockskip.engine.stack import Block, Context, Mask, Modulation, Stack, State, Trainable, Weights, arrays, like

Bridge = Callable[[int, int, int, State], State]
"""`(batch, start, stop, state) -> state`: crosses the blocks start..stop-1 that a path leaves out.

In the backward sweep the gradient passes a bridge as the identity.
"""

Tap = Callable[[int, State], None]
"""`(batch, state)`: sees a batch's state at a boundary."""

Loss = Callable[[int, State], mx.array]
"""`(batch, state at the end) -> scalar`."""

Hold = Callable[[int, int, State], Callable[[], State]]
"""`(place on the path, batch, input of the block there) -> a function that gives it back, once`."""


@dataclass
class Batch:
    """What waits at a block: a micro-batch's state, and what stays the same for it over the pass.

    modulation: gives the modulation of a block by its index; None computes it from the block's own weights.
    masks: what the attention seam takes, by block; blocks that are not in it have full attention.
    """

    state: State
    context: Context = None
    modulation: Callable[[int], Modulation] | None = None
    masks: Mapping[int, Mask] = field(default_factory=dict)

    def settle(self) -> None:
        """Have the state computed."""
        mx.eval(self.state)


def forward(
    stack: Stack,
    reader: BlockReader,
    batches: Sequence[Batch],
    path: Sequence[int] | None = None,
    *,
    trainable: Mapping[int, Trainable] | None = None,
    taps: Mapping[int, Tap] | None = None,
    bridge: Bridge | None = None,
    on_boundary: Callable[[int], None] | None = None,
    on_modulation: Callable[[int, int, Modulation], None] | None = None,
) -> None:
    """Carry every batch's state along `path` (by default the whole stack); the states are replaced in place.

    Where the path leaves out blocks, or ends before the last one, `bridge` crosses them. `taps` maps a boundary (b lies
    before block b; the depth is the end) to a function that sees the states there. `on_boundary` is called before each
    block and may change which batches wait there; `on_modulation` is told of each `(batch, block, modulation)`.
    """
    trainable, taps = trainable or {}, taps or {}
    path = stack.path if path is None else path
    before = path[0] if path else 0
    for batch in batches:
        batch.settle()
    for block, weights in timeline.walk(reader, path, part_of(batches), "forward"):
        _cross(batches, before, block, bridge)
        _tap(taps, block, batches)
        if on_boundary is not None:
            on_boundary(block)
        kind = stack.block(block).kind
        for i, batch in enumerate(batches):
            modulation = modulation_of(stack.block(block), weights, batch, block)
            if on_modulation is not None:
                on_modulation(i, block, modulation)
            tree = trainable.get(block, {})
            mask = batch.masks.get(block)
            batch.state = kind.apply(weights, tree, batch.state, batch.context, modulation, mask)
            batch.settle()
            del modulation
        del weights
        before = block + 1
    if bridge is not None:
        _cross(batches, before, stack.depth, bridge)
    _tap(taps, before if bridge is None else stack.depth, batches)


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
    hold: Hold | None = None,
) -> list[mx.array]:
    """Run `path` forward, then back; give each block's gradients, summed over batches, to `on_grad(block, grads)`.

    hold: keeps each block's input for the way back; None keeps it in memory. The cotangent of the loss starts at the
    end of the stack. Returns the loss of each batch, evaluated. The batches'
    states are left at the end of the stack.
    """
    path = list(path)
    turn = len(path)
    hold = hold or _in_memory
    inputs: list[list[Callable[[], State]]] = []
    losses: list[mx.array] = []
    cotangents: list[list[mx.array]] = []
    before = path[0]
    steps = iter(range(2 * turn))
    for block, weights in timeline.walk(reader, path + path[::-1], part_of(batches), "forward", "backward"):
        step = next(steps)  # enumerate would hold the weights of the block before
        tree = trainable.get(block, {})
        if step < turn:
            inputs.append([])
            for i, batch in enumerate(batches):
                batch.state = cross(i, before, block, batch.state, bridge)
                inputs[-1].append(hold(step, i, batch.state))
                modulation = modulation_of(stack.block(block), weights, batch, block)
                apply = stack.block(block).kind.apply
                batch.state = apply(weights, tree, batch.state, batch.context, modulation, batch.masks.get(block))
                mx.eval(batch.state)
            before = block + 1
            if step == turn - 1:
                losses, cotangents = _loss_cotangents(batches, loss, before, stack.depth, bridge)
        else:
            position = 2 * turn - 1 - step
            grads: dict[str, mx.array] = {}
            for i, (batch, take) in enumerate(zip(batches, inputs.pop(), strict=True)):
                passed = Batch(take(), batch.context, batch.modulation, batch.masks)
                cotangents[i], own = _pull_back(
                    stack.block(block), weights, tree, passed, block, cotangents[i], wants_state=position > 0
                )
                grads = {name: grads[name] + g for name, g in own.items()} if grads else own
                mx.eval(cotangents[i], grads)
                del passed, take, own
            on_grad(block, grads)
        del weights, tree
    return losses


def _in_memory(place: int, batch: int, state: State) -> Callable[[], State]:
    return lambda: state


def modulations(
    stack: Stack, reader: BlockReader, contexts: Sequence[Context], path: Sequence[int] | None = None
) -> list[dict[int, Modulation]]:
    """The modulation of every block on `path` for each context, in one sweep over the modulation weights alone."""
    found: list[dict[int, Modulation]] = [{} for _ in contexts]
    blocks = [b for b in (stack.path if path is None else path) if stack.block(b).kind.modulate]
    for block, weights in timeline.walk(reader, blocks, "modulation", "modulation"):
        modulate = stack.block(block).kind.modulate
        assert modulate is not None
        for per_block, context in zip(found, contexts, strict=True):
            per_block[block] = modulate(weights, context)
            mx.eval(per_block[block])
        del weights
    return found


def part_of(batches: Sequence[Batch]) -> Part:
    """What of a block a sweep reads: its body alone where every batch brings the modulation."""
    return "body" if batches and all(batch.modulation is not None for batch in batches) else "all"


def modulation_of(block: Block, weights: Weights, batch: Batch, index: int) -> Modulation:
    """The modulation of one block for a batch: brought along, or computed from the block's own weights."""
    if block.kind.modulate is None:
        return None
    return block.kind.modulate(weights, batch.context) if batch.modulation is None else batch.modulation(index)


def _pull_back(
    block: Block,
    weights: Weights,
    trainable: Trainable,
    batch: Batch,
    index: int,
    cotangent: list[mx.array],
    wants_state: bool,
) -> tuple[list[mx.array], dict[str, mx.array]]:
    """The cotangent of the block's state (empty where it is not wanted) and the gradients of its trainable tree."""
    names = list(trainable)
    modulation = modulation_of(block, weights, batch, index)
    own_state = arrays(batch.state)
    count = len(own_state) if wants_state else 0

    def run(*primals: mx.array) -> list[mx.array]:
        state = like(batch.state, list(primals[:count])) if wants_state else batch.state
        tree = dict(zip(names, primals[count:], strict=True))
        return arrays(block.kind.apply(weights, tree, state, batch.context, modulation, batch.masks.get(index)))

    primals = [*(own_state if wants_state else []), *(trainable[name] for name in names)]
    if not primals:
        return [], {}
    _, pulled = mx.vjp(run, primals, cotangent)
    return pulled[:count], dict(zip(names, pulled[count:], strict=True))


def _loss_cotangents(
    batches: Sequence[Batch], loss: Loss, start: int, stop: int, bridge: Bridge | None
) -> tuple[list[mx.array], list[list[mx.array]]]:
    """The loss of each batch and its cotangent where the blocks start..stop-1 were crossed."""
    losses: list[mx.array] = []
    cotangents: list[list[mx.array]] = []
    for i, batch in enumerate(batches):
        batch.state = cross(i, start, stop, batch.state, bridge)

        def at_end(*values: mx.array, i: int = i, state: Any = batch.state) -> list[mx.array]:
            return [loss(i, like(state, list(values)))]

        values = arrays(batch.state)
        (value,), cotangent = mx.vjp(at_end, values, [mx.array(1.0)])
        mx.eval(value, cotangent, batch.state)
        losses.append(value)
        cotangents.append(list(cotangent))
    return losses, cotangents


def cross(batch: int, start: int, stop: int, state: State, bridge: Bridge | None) -> State:
    """The state after the blocks start..stop-1, which the path leaves out. Raises ValueError without a bridge."""
    if start == stop:
        return state
    if bridge is None:
        raise ValueError(f"the path leaves out blocks {start} to {stop - 1}, and no bridge crosses them")
    return bridge(batch, start, stop, state)


def _cross(batches: Sequence[Batch], start: int, stop: int, bridge: Bridge | None) -> None:
    if start == stop:
        return
    for i, batch in enumerate(batches):
        batch.state = cross(i, start, stop, batch.state, bridge)
        batch.settle()


def _tap(taps: Mapping[int, Tap], boundary: int, batches: Sequence[Batch]) -> None:
    tap = taps.get(boundary)
    if tap is not None:
        for i, batch in enumerate(batches):
            tap(i, batch.state)
