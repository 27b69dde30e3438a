"""AdamW, block by block, with the learning rate a pure function of the step, and global-norm clipping."""

import math
from collections.abc import MutableMapping
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim

from mlx_blockskip.engine.interrupt import deferred
from mlx_blockskip.tasks.defaults import TrainConfig
from mlx_blockskip.tasks.train.checkpoints import State

Grads = MutableMapping[int, dict[str, mx.array]]
"""Gradients of a LoRA tree, by block, in memory or on disk."""


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of step 0, 1, ...: warm-up, then constant, or down to zero along a line or a cosine."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    share = (step - config.warmup) / max(1, config.iters - config.warmup)
    falling = {"constant": 1.0, "linear": 1 - share, "cosine": 0.5 * (1 + math.cos(math.pi * share))}
    return config.learning_rate * falling[config.lr_schedule]


def global_norm(grads: Grads) -> float:
    """Euclidean norm over all gradients, in float32. The device is waited for once; once a block where the gradients
    are on disk.
    """
    evaluate = mx.async_eval if isinstance(grads, dict) else mx.eval
    squares: list[mx.array] = []
    for tree in grads.values():
        own = [mx.sum(mx.square(g.astype(mx.float32))) for g in tree.values()]
        evaluate(own)  # a block at a time, as MLX would have the squares of many gradients in memory at once
        squares += own
    mx.eval(squares)
    return math.sqrt(sum(float(square) for square in squares))


def update(state: State, grads: Grads, config: TrainConfig, norm: float) -> None:
    """One AdamW step (bias-corrected), block by block; `grads` is emptied. `state.step` is left to the caller.

    The state is never half-updated: a Ctrl-C waits. The device is waited for once where the moments are in memory, and
    twice a block where they are read from files and written again.
    """
    factor = min(1.0, config.clip / (norm + 1e-6)) if config.clip > 0 else 1.0
    rate = learning_rate(config, state.step)
    with deferred():
        for block in list(state.tree):
            own = grads.pop(block)
            parameters: dict[str, Any] = dict(state.tree[block])
            adam = optim.AdamW(learning_rate=rate, weight_decay=config.weight_decay, bias_correction=True)
            adam.init(parameters)
            adam.state["step"] = mx.array(state.updates, mx.uint64)
            for name, both in state.moments.get(block).items():
                adam.state[name] = dict(both)
            scaled = {name: g * factor for name, g in own.items()} if factor < 1 else own
            updated = adam.apply_gradients({name: scaled[name] for name in parameters}, parameters)
            moments: dict[str, Any] = {name: dict(adam.state[name]) for name in parameters}
            (mx.async_eval if state.moments.in_memory else mx.eval)(updated, moments)
            state.tree = {**state.tree, block: updated}
            state.moments.put(block, moments)
        if state.moments.in_memory:
            mx.eval(state.tree, [state.moments.get(block) for block in state.tree])
        state.updates += 1
