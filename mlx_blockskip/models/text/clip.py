"""CLIP's text tower as a stack. Source: transformers CLIPTextModel (without projection)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_blockskip.engine.reader import BlockReader
from mlx_blockskip.engine.shards import Shards
from mlx_blockskip.engine.stack import Block, BlockKind, Stack, Trainable, Weights
from mlx_blockskip.engine.sweep import Batch, forward
from mlx_blockskip.models.attention import attention
from mlx_blockskip.models.config import Config, NonNegativeInt, OneOf, PositiveFloat, PositiveInt
from mlx_blockskip.models.layers import layer_norm, linear, merge_heads, quick_gelu, split_heads

ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": nn.gelu}
LEGACY_EOS = 2
"""Configs with this eos_token_id are from before the id was right; the end token is then the largest id."""


Activation = Annotated[str, OneOf(*ACTIVATIONS)]


class Layers(Protocol):
    """What the layers of both of CLIP's towers take of their configuration."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def hidden_act(self) -> str: ...
    @property
    def layer_norm_eps(self) -> float: ...


@dataclass(frozen=True)
class CLIPTextConfig(Config):
    """Source: transformers CLIPTextConfig."""

    vocab_size: PositiveInt = 49408
    hidden_size: PositiveInt = 512
    intermediate_size: PositiveInt = 2048
    num_hidden_layers: NonNegativeInt = 12
    num_attention_heads: PositiveInt = 8
    max_position_embeddings: PositiveInt = 77
    hidden_act: Activation = "quick_gelu"
    layer_norm_eps: PositiveFloat = 1e-5
    eos_token_id: NonNegativeInt = 49407

    def contradiction(self) -> str | None:
        return undivided(self)


def undivided(config: Layers) -> str | None:
    """That the heads do not divide the width; None where they do."""
    if config.hidden_size % config.num_attention_heads:
        return f"num_attention_heads {config.num_attention_heads} does not divide hidden_size {config.hidden_size}"
    return None


class Hidden(NamedTuple):
    """hidden: (B, L, D)."""

    hidden: mx.array


def stack(config: Layers) -> Stack:
    """The layers of CLIP's text or vision tower. Context: what is added to the scores (causal), or None."""
    heads, eps = config.num_attention_heads, config.layer_norm_eps
    activation = ACTIVATIONS[config.hidden_act]

    def layer(w: Weights, t: Trainable, x: Hidden, causal: mx.array | None, mod: None, mask: None) -> Hidden:
        normed = layer_norm(x.hidden, eps, w, "layer_norm1")
        q, k, v = (split_heads(linear(w, f"self_attn.{n}_proj", normed, t), heads) for n in "qkv")
        attended = merge_heads(attention(q, k, v, scale=1 / math.sqrt(q.shape[-1]), bias=causal))
        hidden = x.hidden + linear(w, "self_attn.out_proj", attended, t)
        normed = layer_norm(hidden, eps, w, "layer_norm2")
        return Hidden(hidden + linear(w, "mlp.fc2", activation(linear(w, "mlp.fc1", normed, t)), t))

    kind = BlockKind("clip", layer)
    return Stack(tuple(Block(f"encoder.layers.{i}.", kind) for i in range(config.num_hidden_layers)))


def encode(
    shards: Shards, ids: Sequence[np.ndarray], budget: int | None = None, dtype: mx.Dtype | None = None
) -> list[tuple[mx.array, mx.array]]:
    """(last hidden state (B, L, D), pooled (B, D)) for each array of ids (B, L), in one sweep.

    Pooled is the final state at the end token: the arg-max id where eos_token_id is 2, else the first end token.
    dtype: of the states; by default that of the embeddings.
    """
    config = CLIPTextConfig.from_dict(shards.config, shards.path / "config.json")
    samples = []
    for row in ids:
        length = row.shape[1]
        position = shards.rows("embeddings.position_embedding.weight", np.arange(length))
        embedded = shards.rows("embeddings.token_embedding.weight", row)
        hidden = embedded.astype(dtype or embedded.dtype) + position.astype(dtype or position.dtype)
        causal = mx.triu(mx.full((length, length), -float("inf")), k=1).astype(hidden.dtype)
        samples.append(Batch(Hidden(hidden), causal))
    layers = stack(config)
    forward(layers, BlockReader(shards, layers, budget), samples)
    final = shards.load(shards.under("final_layer_norm."))
    found = []
    for row, sample in zip(ids, samples):
        hidden = layer_norm(sample.state.hidden, config.layer_norm_eps, final, "final_layer_norm")
        eos = config.eos_token_id
        at = row.argmax(-1) if eos == LEGACY_EOS else (row == eos).argmax(-1)
        found.append((hidden, hidden[mx.arange(len(row)), mx.array(at)]))
    mx.eval(found)
    return found


def pooled(
    shards: Shards, ids: Sequence[np.ndarray], budget: int | None = None, dtype: mx.Dtype | None = None
) -> list[mx.array]:
    """The pooled states alone."""
    return [p for _, p in encode(shards, ids, budget, dtype)]
