"""LoRA: W' = W + scale A B, float32 factors on the linear layers of chosen blocks.

A tree is `{block index: {"attn.to_q.lora_a": (in, r), "attn.to_q.lora_b": (r, out), ...}}`. In files the names are
mlx-lm's: the module's path, then `.lora_a` or `.lora_b`.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_blockskip import differences
from mlx_blockskip.differences import LowRank
from mlx_blockskip.engine import dtypes, philox
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.engine.reader import BlockReader
from mlx_blockskip.engine.shards import Added
from mlx_blockskip.engine.stack import Apply, Context, Mask, Modulation, Stack, State, Trainable, Weights
from mlx_blockskip.models.family import DiffusionModel

Tree = dict[int, dict[str, mx.array]]

Factors = tuple[mx.array, mx.array]
"""(in, r) and (r, out), float32."""

PHILOX_KEY = 0x10A
"""Keeps the factors' random stream apart from the samples' (which are keyed by their number)."""


@dataclass(frozen=True)
class Adapter:
    """An adapter that is not trained further. tree: factors that the blocks add as they work. worn: by full name, what
    is added to layers as their weights are read: those outside of the blocks, modulation, and all that is no factors.
    """

    tree: Tree = field(default_factory=dict)
    worn: Mapping[str, Added] = field(default_factory=dict)

    def layers(self, stack: Stack) -> dict[str, Added]:
        """What is added to every layer, by its full name."""
        found = {name: Added(LowRank(*both)) for name, both in layers(self.tree, stack).items()}
        for name, added in self.worn.items():
            found[name] = added if name not in found else differences.together([found[name], added], [1, 1])
        return found

    def checksum(self) -> str:
        """A checksum of all numbers, in order."""
        return checksum(self.tree, self.worn)


def divided(found: Mapping[str, Added], stack: Stack, choices: Mapping[str, Mapping[str, tuple[str, ...]]]) -> Adapter:
    """An adapter of these layers (by full name). choices: the family's, whose modules apply a tree themselves."""
    places = {
        block.prefix + module: (index, module)
        for index in stack.path
        for block in (stack.block(index),)
        for choice in choices.values()
        for module in choice.get(block.kind.name, ())
        if not block.kind.is_modulation(f"{module}.")
    }
    tree: Tree = {index: {} for index in sorted({places[name][0] for name in found.keys() & places.keys()})}
    worn: dict[str, Added] = {}
    for name, added in found.items():
        if name in places and isinstance(added.weight, LowRank):
            index, module = places[name]
            tree[index] |= {f"{module}.lora_a": added.weight.a, f"{module}.lora_b": added.weight.b}
            added = replace(added, weight=None)
        if not added.nothing:
            worn[name] = added
    return Adapter({index: factors for index, factors in tree.items() if factors}, worn)


@contextmanager
def worn(model: DiffusionModel, adapter: Adapter) -> Iterator[Tree]:
    """Inside, the model's weights are read with what the adapter adds to them; yields the tree for its blocks."""
    if not adapter.worn:
        yield adapter.tree
        return
    shards = model.reader.shards
    model.release()
    shards.added = adapter.worn
    try:
        yield adapter.tree
    finally:
        shards.added = {}
        model.release()


def targets(choices: Mapping[str, Mapping[str, tuple[str, ...]]], choice: str) -> Mapping[str, tuple[str, ...]]:
    """The modules of a choice such as "attention" or "all", by block kind. Raises UserError for another."""
    try:
        return choices[choice]
    except KeyError:
        raise UserError(f"--lora-targets {choice}: is not known; use {' or '.join(sorted(choices))}") from None


def init(
    reader: BlockReader, blocks: Iterable[int], modules: Mapping[str, tuple[str, ...]], rank: int, seed: int
) -> Tree:
    """New factors: A uniform in +-1/sqrt(in) (as peft and mlx-lm), B zero. A function of the seed and the place."""
    tree: Tree = {}
    for index in blocks:
        block = reader.stack.block(index)
        tree[index] = {}
        for number, module in enumerate(modules[block.kind.name]):
            width_out, width_in = linear_shape(reader, index, module)
            bound = 1 / math.sqrt(width_in)
            a = philox.generator(seed, PHILOX_KEY, index, number).uniform(-bound, bound, (width_in, rank))
            tree[index][f"{module}.lora_a"] = mx.array(a.astype(np.float32))
            tree[index][f"{module}.lora_b"] = mx.zeros((rank, width_out))
        mx.eval(tree[index])
    return tree


def blank(reader: BlockReader, index: int, modules: Iterable[str], rank: int) -> dict[str, mx.array]:
    """Zeros in the shapes of one block's factors. Not evaluated: shapes are often enough."""
    found: dict[str, mx.array] = {}
    for module in modules:
        out, width = linear_shape(reader, index, module)
        found[f"{module}.lora_a"] = mx.zeros((width, rank))
        found[f"{module}.lora_b"] = mx.zeros((rank, out))
    return found


def linear_shape(reader: BlockReader, index: int, module: str) -> tuple[int, int]:
    """(out, in) of a linear layer of a block."""
    return layer_shape(reader, reader.stack.block(index).prefix + module)


def layer_shape(reader: BlockReader, module: str) -> tuple[int, int]:
    """(out, in) of a layer, quantized or not, from the file's header."""
    out, *rest = reader.shards.shape(f"{module}.weight")
    group_size = reader.shards.group_sizes.get(module)
    if group_size is None:
        return out, math.prod(rest)
    return out, reader.shards.shape(f"{module}.scales")[1] * group_size


def attach(stack: Stack, scale: float) -> Stack:
    """The stack with the low-rank term multiplied by `scale` (alpha / rank)."""
    if scale == 1.0:
        return stack
    kinds = {}
    for block in (*stack.prelude, *stack.blocks):
        if block.kind.name not in kinds:
            kinds[block.kind.name] = replace(block.kind, apply=_with_scale(block.kind.apply, scale))
    scaled_kinds = [
        tuple(replace(block, kind=kinds[block.kind.name]) for block in part) for part in (stack.blocks, stack.prelude)
    ]
    return Stack(*scaled_kinds)


def _with_scale(inner: Apply, scale: float) -> Apply:
    def apply(w: Weights, t: Trainable, x: State, c: Context, m: Modulation, mask: Mask) -> State:
        return inner(w, scaled(t, scale), x, c, m, mask)

    return apply


def scaled(tree: Trainable, scale: float) -> dict[str, mx.array]:
    """The same factors with the second multiplied by `scale`."""
    return {name: value * scale if name.endswith(".lora_b") else value for name, value in tree.items()}


def together(adapters: Sequence[Adapter], scales: Sequence[float]) -> Adapter:
    """One adapter that adds up several, each with its scale."""
    scaled_by = list(zip(adapters, scales, strict=True))
    found: dict[str, Added] = {}
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.worn):
        own = [(adapter.worn[name], scale) for adapter, scale in scaled_by if name in adapter.worn]
        found[name] = differences.together([added for added, _ in own], [scale for _, scale in own])
    return Adapter(combine([adapter.tree for adapter in adapters], scales), found)


def combine(trees: Sequence[Tree], scales: Sequence[float]) -> Tree:
    """One tree that adds up several adapters, each with its scale: their factors side by side (ranks add up)."""
    found: Tree = {}
    for tree, scale in zip(trees, scales, strict=True):
        for index, factors in tree.items():
            own = found.setdefault(index, {})
            for name, value in scaled(factors, scale).items():
                axis = 1 if name.endswith(".lora_a") else 0
                own[name] = mx.concatenate([own[name], value], axis=axis) if name in own else value
    return found


def flatten(tree: Tree, stack: Stack) -> dict[str, mx.array]:
    """Full names (`transformer_blocks.0.attn.to_q.lora_a`) for a file."""
    return {stack.block(i).prefix + name: value for i, factors in tree.items() for name, value in factors.items()}


def layers(tree: Tree, stack: Stack) -> dict[str, Factors]:
    """Both factors of every layer, by its full name (`transformer_blocks.0.attn.to_q`)."""
    return paired(flatten(tree, stack))


def paired(tensors: Mapping[str, mx.array]) -> dict[str, Factors]:
    """Both factors of every layer of a file, by the module's path."""
    modules = [name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a")]
    return {module: (tensors[f"{module}.lora_a"], tensors[f"{module}.lora_b"]) for module in modules}


def unflatten(tensors: Mapping[str, mx.array], stack: Stack, source: Path) -> Tree:
    """The inverse of `flatten`. Raises UserError for a name that the model does not have."""
    prefixes = {stack.block(index).prefix: index for index in stack.path}
    tree: Tree = {}
    for name, value in tensors.items():
        prefix = next((p for p in prefixes if name.startswith(p)), None)
        if prefix is None:
            raise UserError(f"{source}: {name} belongs to no block of this model; it was made for another one")
        tree.setdefault(prefixes[prefix], {})[name[len(prefix) :]] = value.astype(mx.float32)
    return dict(sorted(tree.items()))


def check(tensors: Mapping[str, mx.array], reader: BlockReader, source: Path) -> None:
    """Raise UserError where a factor, by its full name, does not fit the layer it is for, or has no other half."""
    for module in dict.fromkeys(name.rpartition(".")[0] for name in tensors):
        if f"{module}.weight" not in reader.shards.weight_map:
            raise UserError(f"{source}: this model has no layer {module}; the adapter is for another one")
        out, width = layer_shape(reader, module)
        a, b = (tensors.get(f"{module}.{kind}") for kind in ("lora_a", "lora_b"))
        shapes = [None if factor is None else tuple(factor.shape) for factor in (a, b)]
        rank = a.shape[-1] if a is not None else 0
        if a is None or b is None or shapes != [(width, rank), (rank, out)]:
            raise UserError(
                f"{source}: the factors of {module} do not fit a layer of {width} -> {out}; "
                "the adapter is for another model"
            )
        for name, value in ((f"{module}.lora_a", a), (f"{module}.lora_b", b)):
            if not bool(mx.isfinite(value).all()):
                raise UserError(f"{source}: {name} holds NaN or infinity; the file is damaged or its training diverged")


def checksum(tree: Tree, worn: Mapping[str, Added] | None = None) -> str:
    """A checksum of all numbers, in order. worn: as an `Adapter` has it."""
    state = hashlib.sha256()

    def count(name: str, value: mx.array) -> None:
        state.update(f"{name} {value.shape}".encode())
        state.update(dtypes.raw_bytes(value))

    for index, factors in sorted(tree.items()):
        for name, value in factors.items():
            count(f"{index} {name}", value)
    for module, added in (worn or {}).items():
        if added.weight is not None:
            for value in added.weight.tensors():
                count(f"{module} {type(added.weight).__name__}", value)
        if added.bias is not None:
            count(f"{module}.bias", added.bias)
    return state.hexdigest()
