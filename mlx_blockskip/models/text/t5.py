"""The T5 encoder as a stack. Source: transformers T5EncoderModel. No attention mask: FLUX.1 attends to padding."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_blockskip.engine.reader import BlockReader
from mlx_blockskip.engine.shards import Shards
from mlx_blockskip.engine.stack import Block, BlockKind, Stack, Trainable, Weights
from mlx_blockskip.engine.sweep import Batch, forward
from mlx_blockskip.models.attention import attention
from mlx_blockskip.models.config import AtLeast, Config, NonNegativeInt, OneOf, PositiveFloat, PositiveInt
from mlx_blockskip.models.layers import gelu_tanh, linear, merge_heads, rms_norm, split_heads

BIAS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
FEED_FORWARDS = {"relu": ("relu",), "gated-gelu": ("gelu_new", "gelu_pytorch_tanh")}
"""Kinds of feed-forward, and the names that a config may give their activations."""


@dataclass(frozen=True)
class T5Config(Config):
    """Source: transformers T5Config. Of what follows from feed_forward_proj there, a file may hold something else,
    which is then what the network has: `dense_act_fn`, `is_gated_act`.
    """

    vocab_size: PositiveInt = 32128
    d_model: PositiveInt = 512
    d_kv: PositiveInt = 64
    d_ff: PositiveInt = 2048
    num_layers: NonNegativeInt = 6
    num_heads: PositiveInt = 8
    relative_attention_num_buckets: Annotated[int, AtLeast(4)] = 32
    relative_attention_max_distance: PositiveInt = 128
    layer_norm_epsilon: PositiveFloat = 1e-6
    feed_forward_proj: Annotated[str, OneOf(*FEED_FORWARDS)] = "relu"
    dense_act_fn: str | None = None
    is_gated_act: bool | None = None

    @property
    def gated(self) -> bool:
        return self.feed_forward_proj.startswith("gated")

    def contradiction(self) -> str | None:
        beside = f"with feed_forward_proj {self.feed_forward_proj!r} is not implemented"
        if self.dense_act_fn not in (None, *FEED_FORWARDS[self.feed_forward_proj]):
            return f"dense_act_fn {self.dense_act_fn!r} {beside}"
        if self.is_gated_act not in (None, self.gated):
            return f"is_gated_act {self.is_gated_act} {beside}"
        return None


class Hidden(NamedTuple):
    """hidden: (B, L, D), float32 or bfloat16."""

    hidden: mx.array


def stack(config: T5Config) -> Stack:
    """The layers of a T5 encoder. Context: the relative position bias (1, heads, L, L)."""
    heads, eps = config.num_heads, config.layer_norm_epsilon

    def feed_forward(w: Weights, t: Trainable, x: mx.array) -> mx.array:
        if not config.gated:
            return mx.maximum(linear(w, "layer.1.DenseReluDense.wi", x, t), 0)
        gate = gelu_tanh(linear(w, "layer.1.DenseReluDense.wi_0", x, t))
        return gate * linear(w, "layer.1.DenseReluDense.wi_1", x, t)

    def layer(w: Weights, t: Trainable, x: Hidden, bias: mx.array, mod: None, mask: None) -> Hidden:
        normed = rms_norm(w, "layer.0.layer_norm", x.hidden, eps)
        q, k, v = (split_heads(linear(w, f"layer.0.SelfAttention.{n}", normed, t), heads) for n in "qkv")
        attended = merge_heads(attention(q, k, v, scale=1.0, bias=bias.astype(q.dtype)))
        hidden = x.hidden + linear(w, "layer.0.SelfAttention.o", attended, t)
        normed = rms_norm(w, "layer.1.layer_norm", hidden, eps)
        return Hidden(hidden + linear(w, "layer.1.DenseReluDense.wo", feed_forward(w, t, normed), t))

    kind = BlockKind("t5", layer)
    return Stack(tuple(Block(f"encoder.block.{i}.", kind) for i in range(config.num_layers)))


def hidden(shards: Shards, ids: Sequence[np.ndarray], budget: int | None = None) -> list[mx.array]:
    """The last hidden state (B, L, D) for each array of ids (B, L), in one sweep. Never in float16: it overflows."""
    config = T5Config.from_dict(shards.config, shards.path / "config.json")
    layers = stack(config)
    lengths = {row.shape[1] for row in ids}
    biases = {length: position_bias(shards, config, length) for length in lengths}
    samples = []
    for row in ids:
        embedded = shards.rows("shared.weight", row)
        embedded = embedded.astype(mx.float32) if embedded.dtype == mx.float16 else embedded
        samples.append(Batch(Hidden(embedded), biases[row.shape[1]]))
    forward(layers, BlockReader(shards, layers, budget), samples)
    final = shards.load(["encoder.final_layer_norm.weight"])
    found = [rms_norm(final, "encoder.final_layer_norm", s.state.hidden, config.layer_norm_epsilon) for s in samples]
    mx.eval(found)
    return found


def position_bias(shards: Shards, config: T5Config, length: int) -> mx.array:
    """(1, heads, L, L) from the table that block 0 carries for all blocks."""
    buckets = relative_buckets(
        length,
        config.relative_attention_num_buckets,
        config.relative_attention_max_distance,
    )
    table = shards.rows(BIAS, np.arange(shards.shape(BIAS)[0]))
    return table[mx.array(buckets)].transpose(2, 0, 1)[None]


def relative_buckets(length: int, buckets: int, max_distance: int) -> np.ndarray:
    """(L, L) bucket of key minus query: half for each direction, exact when near, logarithmic when far."""
    position = np.arange(length)
    relative = position[None, :] - position[:, None]
    half = buckets // 2
    exact = half // 2
    distance = np.abs(relative)
    scaled = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    far = exact + (scaled / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)).astype(np.int64)
    return np.where(relative > 0, half, 0) + np.where(distance < exact, distance, np.minimum(far, half - 1))
