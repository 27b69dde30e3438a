"""What a model must offer to be swept: a row of blocks, each with a kind, and a pure function for each kind.

A *state* is what flows from block to block: a named tuple whose fields are arrays or None. A *context* is what stays
the same over one forward pass; the engine hands it through and never looks inside. The *trainable* tree of a block
maps names to arrays; the engine differentiates with respect to it and does not know what it is.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

Weights = Mapping[str, mx.array]
Trainable = Mapping[str, mx.array]
State = Any  # a NamedTuple of mx.array | None
Context = Any
Modulation = Any  # None, or a (nested) tuple of arrays
Mask = Any  # what the model's attention seam takes; None is full attention

Apply = Callable[[Weights, Trainable, State, Context, Modulation, Mask], State]
Modulate = Callable[[Weights, Context], Modulation]


@dataclass(frozen=True)
class BlockKind:
    """One kind of block.

    apply: `(weights, trainable, state, context, modulation, mask) -> state`, pure.
    modulate: `(weights, context) -> modulation`, for blocks with adaptive norms; None where there is none.
    modulation_modules: modules (by their path inside the block) that only `modulate` reads.
    """

    name: str
    apply: Apply
    modulate: Modulate | None = None
    modulation_modules: tuple[str, ...] = ()

    def is_modulation(self, name: str) -> bool:
        """Whether the tensor of this name (inside the block) belongs to the modulation."""
        return any(name.startswith(module + ".") for module in self.modulation_modules)


@dataclass(frozen=True)
class Block:
    """One block of a stack: `prefix` is its path in the weight files, with the final dot."""

    prefix: str
    kind: BlockKind


@dataclass(frozen=True)
class Stack:
    """The blocks of a model in the order in which the state passes them. Boundary b lies before block b.

    prelude: blocks before block 0 that are swept like the others but not counted: they have the indices -1 (the last of
    them), -2 and so on.
    """

    blocks: tuple[Block, ...]
    prelude: tuple[Block, ...] = ()

    @property
    def depth(self) -> int:
        """The number of blocks without the prelude."""
        return len(self.blocks)

    @property
    def path(self) -> range:
        """The indices of all blocks, the prelude's first."""
        return range(-len(self.prelude), len(self.blocks))

    def block(self, index: int) -> Block:
        """The block of this index; below zero it is one of the prelude."""
        return self.blocks[index] if index >= 0 else self.prelude[index]

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(block.kind.name for block in self.blocks)


def arrays(state: State) -> list[mx.array]:
    """The arrays of a state, without its Nones."""
    return [field for field in state if field is not None]


def like(state: State, values: list[mx.array]) -> State:
    """A state of the same type and the same Nones as `state`, holding `values`."""
    rest = iter(values)
    return type(state)(*(None if field is None else next(rest) for field in state))
