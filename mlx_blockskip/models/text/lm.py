"""Language models as text encoders: mlx-lm's decoders, a layer at a time. Source of the layers: `mlx_lm.models`.

mlx-lm has the networks, and gives their last state alone, with all weights in memory. Here its `TransformerBlock` is a
block of a stack of ours: one of them is made, and is lent the weights of each layer in turn. Its products go by
`layers.linear`, so that quantized weights, LoRA and the CPU backend are as everywhere else.

mlx-lm is imported when a stack is made: that takes seconds, and pulls in transformers.
"""

import importlib
import os
import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Annotated, NamedTuple, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path, tree_unflatten

from mlx_blockskip.engine.reader import BlockReader
from mlx_blockskip.engine.shards import Shards
from mlx_blockskip.engine.stack import Block, BlockKind, Stack, Trainable, Weights
from mlx_blockskip.engine.sweep import Batch, Tap, forward
from mlx_blockskip.models import cpu
from mlx_blockskip.models.config import NonNegativeInt, OneOf, PositiveFloat, PositiveInt
from mlx_blockskip.models.layers import linear
from mlx_blockskip.models.text.rope import DecoderConfig, RopeParameters

PREFIX = "model."
"""Before every name of a decoder that came with a head, as those of text-to-image checkpoints do."""


@dataclass(frozen=True)
class Qwen3Config(DecoderConfig):
    """Source: transformers Qwen3Config."""

    model_type: Annotated[str, OneOf("qwen3")] = "qwen3"
    vocab_size: PositiveInt = 151936
    hidden_size: PositiveInt = 4096
    intermediate_size: PositiveInt = 22016
    num_hidden_layers: NonNegativeInt = 32
    num_attention_heads: PositiveInt = 32
    num_key_value_heads: PositiveInt = 32
    head_dim: PositiveInt = 128
    hidden_act: Annotated[str, OneOf("silu")] = "silu"
    max_position_embeddings: PositiveInt = 32768
    rms_norm_eps: PositiveFloat = 1e-6
    rope_parameters: RopeParameters = RopeParameters()
    attention_bias: bool = False
    use_sliding_window: Annotated[bool, OneOf(False)] = False


class Decoder(Protocol):
    """What is asked of a decoder's config beside what mlx-lm reads in it. model_type: a module of `mlx_lm.models`."""

    @property
    def model_type(self) -> str: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def rope_parameters(self) -> RopeParameters: ...


class Hidden(NamedTuple):
    """hidden: (B, L, D)."""

    hidden: mx.array


def stack(config: Decoder, prefix: str = PREFIX) -> Stack:
    """The layers of a decoder. Context: (B, 1, L, L), whether the query (third axis) sees the key. Imports mlx-lm."""
    kind = BlockKind(config.model_type, _Layer(config))
    return Stack(tuple(Block(f"{prefix}layers.{i}.", kind) for i in range(config.num_hidden_layers)))


def hidden_states(
    shards: Shards,
    config: Decoder,
    ids: Sequence[np.ndarray],
    masks: Sequence[np.ndarray],
    layers: Sequence[int],
    budget: int | None = None,
) -> list[list[mx.array]]:
    """The hidden states (B, L, D) after so many layers, in the order of `layers`, for each array of ids (B, L).

    layers: 0 for the embeddings; below zero from the end, where -1 is after the last layer. No layer after the last of
    them is read. None is normed: as transformers' `hidden_states` but for its last one. masks: (B, L) each, 1 for a
    token and 0 for padding, which is on the right and sees the tokens. On the CPU states are in float32, whatever the
    weights are in. Raises ValueError for a layer that is not there.
    """
    whole = stack(config)
    wanted = [layer if layer >= 0 else whole.depth + 1 + layer for layer in layers]
    if not wanted or not all(0 <= layer <= whole.depth for layer in wanted):
        raise ValueError(f"layers {list(layers)} are not within 0 to {whole.depth}")
    batches = [
        Batch(Hidden(embedded(shards, row, config.hidden_size)), mx.array(causal(mask)))
        for row, mask in zip(ids, masks, strict=True)
    ]
    found: list[dict[int, mx.array]] = [{} for _ in batches]

    def tap(layer: int) -> Tap:
        return lambda i, state: found[i].__setitem__(layer, state.hidden)

    taps = {layer: tap(layer) for layer in wanted}
    forward(whole, BlockReader(shards, whole, budget), batches, range(max(wanted)), taps=taps)
    return [[states[layer] for layer in wanted] for states in found]


def embedded(shards: Shards, ids: np.ndarray, width: int) -> mx.array:
    """The ids' rows of the table, gathered from the file: (*ids.shape, D). Never in float16: it overflows.

    A table that mlx-lm quantized is made whole in these rows alone.
    """
    table = f"{PREFIX}embed_tokens"
    rows = shards.rows(f"{table}.weight", ids)
    if f"{table}.scales" in shards.names:
        scales, biases = (shards.rows(f"{table}.{kind}", ids) for kind in ("scales", "biases"))
        group, bits = width // scales.shape[-1], rows.shape[-1] * 32 // width
        rows = mx.dequantize(rows, scales, biases, group_size=group, bits=bits)
    return rows.astype(mx.float32) if rows.dtype == mx.float16 or cpu.in_use() else rows


def causal(mask: np.ndarray) -> np.ndarray:
    """(B, L) of tokens and padding -> (B, 1, L, L): a query sees the tokens up to itself."""
    length = mask.shape[1]
    return np.tril(np.ones((length, length), bool)) & mask.astype(bool)[:, None, None, :]


class _Layer:
    """One of mlx-lm's blocks, called as a block of ours. Between calls it holds no weights but a few norms."""

    def __init__(self, config: Decoder):
        module = imported(config.model_type)
        given = asdict(config) | asdict(config.rope_parameters)  # type: ignore[call-overload]
        given["tie_word_embeddings"] = True  # there is no head
        self._lent = _Lent()
        self._block = module.TransformerBlock(module.ModelArgs.from_dict(given))
        leaves = tree_map_with_path(self._product, self._block.leaf_modules(), is_leaf=nn.Module.is_module)
        self._block.update_modules(leaves)
        self._norms = [name for name, _ in tree_flatten(self._block.parameters())]

    def _product(self, name: str, leaf: nn.Module) -> nn.Module:
        return _Product(name, self._lent) if isinstance(leaf, nn.Linear) else leaf

    def __call__(self, w: Weights, t: Trainable, x: Hidden, seen: mx.array, mod: None, mask: None) -> Hidden:
        self._block.update(tree_unflatten([(name, w[name]) for name in self._norms]))
        with self._lent(w, t), _not_compiled():
            return Hidden(self._block(x.hidden, mask=seen, cache=None))


class _Lent:
    """The weights of the layer at work."""

    def __init__(self) -> None:
        self.weights: Weights = {}
        self.trainable: Trainable = {}

    @contextmanager
    def __call__(self, weights: Weights, trainable: Trainable) -> Iterator[None]:
        self.weights, self.trainable = weights, trainable
        try:
            yield
        finally:
            self.weights, self.trainable = {}, {}


class _Product(nn.Module):
    """A linear layer of a block, by its name in it."""

    def __init__(self, name: str, lent: _Lent):
        super().__init__()
        self._name, self._lent = name, lent

    def __call__(self, x: mx.array) -> mx.array:
        return linear(self._lent.weights, self._name, x, self._lent.trainable)


@contextmanager
def _not_compiled() -> Iterator[None]:
    """On the CPU mlx-lm's compiled chains are run as they are written: MLX would call a C++ compiler for each."""
    if not cpu.in_use() or "MLX_DISABLE_COMPILE" in os.environ:
        yield
        return
    mx.disable_compile()
    try:
        yield
    finally:
        mx.enable_compile()


def imported(model_type: str) -> ModuleType:
    """A module of `mlx_lm.models`. Its import would lower how many files this process may have open, for good."""
    setrlimit = resource.setrlimit
    resource.setrlimit = lambda which, limits: None
    try:
        return importlib.import_module(f"mlx_lm.models.{model_type}")
    finally:
        resource.setrlimit = setrlimit
