"""CLIP's text tower as a stack. Source: transformers CLIPTextModel (without projection)."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.engine.stack import Block, BlockKind, Stack, Trainable, Weights
from mlx_blockskip.engine.sweep import Sample, forward
from mlx_blockskip.engine.weights import BlockReader, Shards
from mlx_blockskip.models.attention import attention
from mlx_blockskip.models.layers import layer_norm, linear, merge_heads, quick_gelu, split_heads

ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": nn.gelu}
LEGACY_EOS = 2
"""Configs with this eos_token_id are from before the id was right; the end token is then the largest id."""


class Hidden(NamedTuple):
    """hidden: (B, L, D)."""

    hidden: mx.array


def stack(config: Mapping[str, Any]) -> Stack:
    """The layers of a CLIP text or vision config. Context: what is added to the scores (causal), or None.

    Raises UserError for an activation that is not implemented.
    """
    heads, eps = config["num_attention_heads"], config["layer_norm_eps"]
    activation = ACTIVATIONS.get(config["hidden_act"])
    if activation is None:
        raise UserError(f"CLIP: hidden_act {config['hidden_act']!r} is not implemented; use {', '.join(ACTIVATIONS)}")

    def layer(w: Weights, t: Trainable, x: Hidden, causal: mx.array | None, mod: None, mask: None) -> Hidden:
        normed = layer_norm(x.hidden, eps, w, "layer_norm1")
        q, k, v = (split_heads(linear(w, f"self_attn.{n}_proj", normed, t), heads) for n in "qkv")
        attended = merge_heads(attention(q, k, v, scale=1 / math.sqrt(q.shape[-1]), bias=causal))
        hidden = x.hidden + linear(w, "self_attn.out_proj", attended, t)
        normed = layer_norm(hidden, eps, w, "layer_norm2")
        return Hidden(hidden + linear(w, "mlp.fc2", activation(linear(w, "mlp.fc1", normed, t)), t))

    kind = BlockKind("clip", layer)
    return Stack(tuple(Block(f"encoder.layers.{i}.", kind) for i in range(config["num_hidden_layers"])))


def encode(
    shards: Shards, ids: Sequence[np.ndarray], budget: int | None = None, dtype: mx.Dtype | None = None
) -> list[tuple[mx.array, mx.array]]:
    """(last hidden state (B, L, D), pooled (B, D)) for each array of ids (B, L), in one sweep.

    Pooled is the final state at the end token: the arg-max id where eos_token_id is 2, else the first end token.
    dtype: of the states; by default that of the embeddings.
    """
    config = shards.config
    samples = []
    for row in ids:
        length = row.shape[1]
        position = shards.rows("embeddings.position_embedding.weight", np.arange(length))
        embedded = shards.rows("embeddings.token_embedding.weight", row)
        hidden = embedded.astype(dtype or embedded.dtype) + position.astype(dtype or position.dtype)
        causal = mx.triu(mx.full((length, length), -float("inf")), k=1).astype(hidden.dtype)
        samples.append(Sample(Hidden(hidden), causal))
    layers = stack(config)
    forward(layers, BlockReader(shards, layers, budget), samples)
    final = shards.load(shards.under("final_layer_norm."))
    found = []
    for row, sample in zip(ids, samples):
        hidden = layer_norm(sample.state.hidden, config["layer_norm_eps"], final, "final_layer_norm")
        eos = config["eos_token_id"]
        at = row.argmax(-1) if eos == LEGACY_EOS else (row == eos).argmax(-1)
        found.append((hidden, hidden[mx.arange(len(row)), mx.array(at)]))
    mx.eval(found)
    return found


def pooled(
    shards: Shards, ids: Sequence[np.ndarray], budget: int | None = None, dtype: mx.Dtype | None = None
) -> list[mx.array]:
    """The pooled states alone."""
    return [p for _, p in encode(shards, ids, budget, dtype)]
