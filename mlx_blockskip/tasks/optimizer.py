"""AdamW on flat trees, with the learning rate a pure function of the step, and global-norm clipping."""

import math
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim

from mlx_blockskip import lora
from mlx_blockskip.settings import TrainSettings, required
from mlx_blockskip.tasks.checkpoints import State


def learning_rate(settings: TrainSettings, step: int) -> float:
    """The rate of step 0, 1, ...: warm-up, then constant, or down to zero along a line or a cosine."""
    (iters,) = required(settings, "iters")
    top = settings.learning_rate or 0.0
    if step < settings.warmup:
        return top * (step + 1) / settings.warmup
    share = (step - settings.warmup) / max(1, iters - settings.warmup)
    falling = {"constant": 1.0, "linear": 1 - share, "cosine": 0.5 * (1 + math.cos(math.pi * share))}
    return top * falling[settings.lr_schedule]


def flat(tree: lora.Tree) -> dict[str, mx.array]:
    """`{"3/attn.to_q.lora_a": array}`."""
    return {f"{block}/{name}": value for block, factors in tree.items() for name, value in factors.items()}


def nested(tensors: Mapping[str, mx.array]) -> lora.Tree:
    """The inverse of `flat`."""
    tree: lora.Tree = {}
    for key, value in tensors.items():
        block, name = key.split("/", 1)
        tree.setdefault(int(block), {})[name] = value
    return tree


def global_norm(grads: Mapping[str, mx.array]) -> float:
    """Euclidean norm over all gradients, in float32."""
    return math.sqrt(sum(float(mx.sum(mx.square(g.astype(mx.float32)))) for g in grads.values()))


def update(state: State, grads: dict[str, mx.array], settings: TrainSettings, norm: float) -> State:
    """One AdamW step (bias-corrected); returns the new state, evaluated. `state.step` is left to the caller."""
    factor = min(1.0, settings.clip / (norm + 1e-6)) if settings.clip > 0 else 1.0
    adam = optim.AdamW(
        learning_rate=learning_rate(settings, state.step), weight_decay=settings.weight_decay, bias_correction=True
    )
    parameters: dict[str, Any] = flat(state.tree)
    adam.init(parameters)
    adam.state["step"] = mx.array(state.updates, mx.uint64)
    for name, both in state.moments.items():
        adam.state[name] = dict(both)
    scaled = {name: g * factor for name, g in grads.items()} if factor < 1 else grads
    updated = adam.apply_gradients({name: scaled[name] for name in parameters}, parameters)
    moments: dict[str, Any] = {name: dict(adam.state[name]) for name in parameters}
    mx.eval(updated, moments)
    return State(nested(updated), moments, state.step, state.updates + 1, state.skipped, state.at_chunk)
