"""Gemma-2 as a text encoder and as a stack. Source: transformers Gemma2Model with eager attention.

The layers' sliding window is not implemented: sequences that do not fit into it are refused.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.engine.reader import BlockReader
from mlx_blockskip.engine.shards import Shards
from mlx_blockskip.engine.stack import Block, BlockKind, Stack, Trainable, Weights
from mlx_blockskip.engine.sweep import Batch, Tap, forward
from mlx_blockskip.models.config import NonNegativeInt, OneOf, PositiveFloat, PositiveInt
from mlx_blockskip.models.layers import gelu_tanh, linear, merge_heads, split_heads
from mlx_blockskip.models.text.rope import DecoderConfig, RopeParameters


@dataclass(frozen=True)
class Gemma2Config(DecoderConfig):
    """Source: transformers Gemma2Config."""

    model_type: Annotated[str, OneOf("gemma2")] = "gemma2"
    vocab_size: PositiveInt = 256000
    hidden_size: PositiveInt = 2304
    intermediate_size: PositiveInt = 9216
    num_hidden_layers: NonNegativeInt = 26
    num_attention_heads: PositiveInt = 8
    num_key_value_heads: PositiveInt = 4
    head_dim: PositiveInt = 256
    hidden_activation: Annotated[str | None, OneOf("gelu_pytorch_tanh", None)] = "gelu_pytorch_tanh"
    rms_norm_eps: PositiveFloat = 1e-6
    rope_parameters: RopeParameters = RopeParameters()
    attention_bias: bool = False
    query_pre_attn_scalar: PositiveFloat = 256
    sliding_window: PositiveInt | None = 4096
    attn_logit_softcapping: PositiveFloat | None = 50.0
    use_bidirectional_attention: Annotated[bool | None, OneOf(None, False)] = None


class Hidden(NamedTuple):
    """hidden: (B, L, D), float32 or bfloat16."""

    hidden: mx.array


class Context(NamedTuple):
    """cos, sin: (L, d / 2), float32. seen: (B, 1, L, L), whether the query (third axis) sees the key."""

    cos: mx.array
    sin: mx.array
    seen: mx.array


def stack(config: Gemma2Config) -> Stack:
    """The layers of Gemma-2. Context: see `Context`."""
    heads, groups, eps = config.num_attention_heads, config.num_key_value_heads, config.rms_norm_eps
    scale, cap = config.query_pre_attn_scalar**-0.5, config.attn_logit_softcapping

    def attention(w: Weights, t: Trainable, x: mx.array, context: Context) -> mx.array:
        q = split_heads(linear(w, "self_attn.q_proj", x, t), heads)
        k, v = (split_heads(linear(w, f"self_attn.{n}_proj", x, t), groups) for n in "kv")
        q, k = (_turned(part, context.cos, context.sin) for part in (q, k))
        return linear(w, "self_attn.o_proj", merge_heads(_attended(q, k, v, scale, cap, context.seen)), t)

    def feed_forward(w: Weights, t: Trainable, x: mx.array) -> mx.array:
        gate = gelu_tanh(linear(w, "mlp.gate_proj", x, t))
        return linear(w, "mlp.down_proj", gate * linear(w, "mlp.up_proj", x, t), t)

    def layer(w: Weights, t: Trainable, x: Hidden, context: Context, mod: None, mask: None) -> Hidden:
        attended = attention(w, t, norm(w, "input_layernorm", x.hidden, eps), context)
        hidden = x.hidden + norm(w, "post_attention_layernorm", attended, eps)
        fed = feed_forward(w, t, norm(w, "pre_feedforward_layernorm", hidden, eps))
        return Hidden(hidden + norm(w, "post_feedforward_layernorm", fed, eps))

    kind = BlockKind("gemma2", layer)
    return Stack(tuple(Block(f"layers.{i}.", kind) for i in range(config.num_hidden_layers)))


def encode(
    shards: Shards, ids: Sequence[np.ndarray], masks: Sequence[np.ndarray], budget: int | None = None
) -> list[tuple[mx.array, mx.array]]:
    """(last hidden state (B, L, D), mask (B, L) int32) for each array of ids (B, L), in one sweep.

    masks: (B, L) each, 1 for a token and 0 for padding, which is on the right. What is at padding is not to be used.
    Never in float16: it overflows. Raises UserError for sequences that are longer than the sliding window.
    """
    config = Gemma2Config.from_dict(shards.config, shards.path / "config.json")
    layers, samples = stack(config), begin(shards, config, ids, masks)
    forward(layers, BlockReader(shards, layers, budget), samples)
    final = shards.load(["norm.weight"])
    found = [
        (norm(final, "norm", sample.state.hidden, config.rms_norm_eps), mx.array(mask.astype(np.int32)))
        for sample, mask in zip(samples, masks)
    ]
    mx.eval(found)
    return found


def hidden_states(
    shards: Shards,
    ids: Sequence[np.ndarray],
    masks: Sequence[np.ndarray],
    layers: Sequence[int],
    budget: int | None = None,
) -> list[dict[int, mx.array]]:
    """The hidden states (B, L, D) after so many layers (0: the embeddings), by that number, for each array of ids.

    No layer after the last of them is read. They are not normed: as transformers' `hidden_states`, but for its last
    one. Raises UserError as `encode` does, and ValueError for a layer that is not there.
    """
    config = Gemma2Config.from_dict(shards.config, shards.path / "config.json")
    whole, samples = stack(config), begin(shards, config, ids, masks)
    if not layers or not all(0 <= layer <= whole.depth for layer in layers):
        raise ValueError(f"layers {list(layers)} are not within 0 to {whole.depth}")
    found: list[dict[int, mx.array]] = [{} for _ in samples]

    def tap(layer: int) -> Tap:
        return lambda i, state: found[i].__setitem__(layer, state.hidden)

    taps = {layer: tap(layer) for layer in layers}
    forward(whole, BlockReader(shards, whole, budget), samples, range(max(layers)), taps=taps)
    return found


def begin(shards: Shards, config: Gemma2Config, ids: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> list[Batch]:
    """Embedded ids and their contexts, as they wait before the first layer. Raises UserError for what is too long."""
    window, samples = config.sliding_window, []
    for row, mask in zip(ids, masks, strict=True):
        if window is not None and row.shape[1] > window:
            raise UserError(f"Gemma-2: {row.shape[1]} tokens are more than its sliding window of {window}; use fewer")
        cos, sin = rope_tables(config, row.shape[1])
        context = Context(mx.array(cos), mx.array(sin), mx.array(causal(mask)))
        samples.append(Batch(Hidden(embedded(shards, row, config.hidden_size)), context))
    return samples


def embedded(shards: Shards, ids: np.ndarray, width: int) -> mx.array:
    """The ids' rows of the table times sqrt(hidden size), which is rounded to the table's dtype: (*ids.shape, D)."""
    rows = shards.rows("embed_tokens.weight", ids)
    rows = rows.astype(mx.float32) if rows.dtype == mx.float16 else rows
    return rows * mx.array(math.sqrt(width), rows.dtype)


def rope_tables(config: Gemma2Config, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of each position's angles, (length, head_dim / 2), in float32 as the reference has them."""
    theta, width = config.rope_parameters.rope_theta, config.head_dim
    exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    inverse = np.float32(1.0) / np.float32(theta) ** exponents
    angles = np.arange(length, dtype=np.float32)[:, None] * inverse
    return np.cos(angles), np.sin(angles)


def causal(mask: np.ndarray) -> np.ndarray:
    """(B, L) of tokens and padding -> (B, 1, L, L): a query sees the tokens up to itself."""
    length = mask.shape[1]
    return np.tril(np.ones((length, length), bool)) & mask.astype(bool)[:, None, None, :]


def norm(w: Weights, name: str, x: mx.array, eps: float) -> mx.array:
    """RMSNorm with a scale of 1 + weight, in float32."""
    scale = 1.0 + w[f"{name}.weight"].astype(mx.float32)
    return mx.fast.rms_norm(x.astype(mx.float32), scale, eps).astype(x.dtype)


def _turned(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """Rotate the first half of the last axis against its second half, in float32. x: (B, H, L, d)."""
    first, second = mx.split(x.astype(mx.float32), 2, axis=-1)
    turned = mx.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def _attended(q: mx.array, k: mx.array, v: mx.array, scale: float, cap: float | None, seen: mx.array) -> mx.array:
    """softmax(cap tanh(scale q k^T / cap)) v in float32, as MLX's fused attention has no cap.

    q: (B, H, L, d); k, v: (B, groups, L, d), each for H / groups heads of q.
    """
    b, _, length, d = q.shape
    grouped = q.astype(mx.float32).reshape(b, k.shape[1], -1, length, d)
    keys, values = (x.astype(mx.float32)[:, :, None] for x in (k, v))
    scores = scale * (grouped @ keys.swapaxes(-1, -2))
    scores = scores if cap is None else cap * mx.tanh(scores / cap)
    scores = mx.where(seen[:, :, None], scores, mx.finfo(mx.float32).min)
    return (mx.softmax(scores, axis=-1) @ values).reshape(q.shape).astype(q.dtype)
