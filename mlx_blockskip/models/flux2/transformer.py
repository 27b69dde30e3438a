"""The FLUX.2 transformer: double blocks, then single ones, as functions. Source: diffusers Flux2Transformer2DModel.

Unlike FLUX.1's, no layer has a bias, blocks of a kind share one modulation, which is made outside of them, and a single
block's projections into attention and feed-forward are one layer, as are those out of both.
"""

import math
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_blockskip.engine.stack import Block, BlockKind, Stack, Trainable, Weights
from mlx_blockskip.models.attention import apply_rope, attention
from mlx_blockskip.models.config import Config, NonNegativeInt, OneOf, PositiveFloat, PositiveInt
from mlx_blockskip.models.family import Size, Tokens
from mlx_blockskip.models.layers import (
    by_rows,
    gate_add,
    layer_norm,
    linear,
    merge_heads,
    modulated,
    rms_norm,
    silu,
    sinusoid,
    split_heads,
)

TIME_FACTOR = 1000.0
FLOAT16_MAX = 65504


@dataclass(frozen=True)
class Flux2Transformer2DConfig(Config):
    """Source: diffusers Flux2Transformer2DModel, whose defaults are those of FLUX.2 dev."""

    patch_size: Annotated[int, OneOf(1)] = 1
    in_channels: PositiveInt = 128
    out_channels: PositiveInt | None = None
    num_layers: NonNegativeInt = 8
    num_single_layers: NonNegativeInt = 48
    attention_head_dim: PositiveInt = 128
    num_attention_heads: PositiveInt = 48
    joint_attention_dim: PositiveInt = 15360
    timestep_guidance_channels: PositiveInt = 256
    mlp_ratio: PositiveFloat = 3.0
    axes_dims_rope: tuple[PositiveInt, ...] = (32, 32, 32, 32)
    rope_theta: PositiveFloat = 2000
    eps: PositiveFloat = 1e-6
    guidance_embeds: bool = True

    @property
    def width(self) -> int:
        return self.attention_head_dim * self.num_attention_heads

    @property
    def hidden(self) -> int:
        """Of a feed-forward."""
        return int(self.width * self.mlp_ratio)

    def contradiction(self) -> str | None:
        if len(self.axes_dims_rope) != 4 or sum(self.axes_dims_rope) != self.attention_head_dim:
            axes = " + ".join(str(axis) for axis in self.axes_dims_rope)
            return f"axes_dims_rope {axes} is not attention_head_dim {self.attention_head_dim} in four axes"
        return None


class Modulations(NamedTuple):
    """Shift, scale and gate, which all blocks of a kind share: of attention and feed-forward (B, 6, 1, D) in double
    blocks, for image and for text, and (B, 3, 1, D) in single ones.
    """

    image: mx.array
    text: mx.array
    single: mx.array


class Context(NamedTuple):
    """cos, sin: (text + image tokens, head_dim / 2), float32; temb: (B, D), None where modulation is from a record."""

    cos: mx.array
    sin: mx.array
    modulations: Modulations
    temb: mx.array | None
    size: Size


def stack(config: Flux2Transformer2DConfig) -> Stack:
    """The blocks of a FLUX.2 transformer."""

    def double(w: Weights, t: Trainable, x: Tokens, c: Context, mod: None, mask: str | None) -> Tokens:
        return double_block(w, t, x, c, mask, config)

    def single(w: Weights, t: Trainable, x: Tokens, c: Context, mod: None, mask: str | None) -> Tokens:
        return single_block(w, t, x, c, mask, config)

    double_kind, single_kind = BlockKind("double", double), BlockKind("single", single)
    return Stack(
        (
            *(Block(f"transformer_blocks.{i}.", double_kind) for i in range(config.num_layers)),
            *(Block(f"single_transformer_blocks.{i}.", single_kind) for i in range(config.num_single_layers)),
        )
    )


def double_block(
    w: Weights, trainable: Trainable, x: Tokens, c: Context, mask: str | None, config: Flux2Transformer2DConfig
) -> Tokens:
    """Joint attention over text and image tokens, each with its own projections and feed-forward."""
    assert x.text is not None
    heads, eps, text_length = config.num_attention_heads, config.eps, x.text.shape[1]
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = _parts(c.modulations.image)
    t_shift, t_scale, t_gate, t_shift_mlp, t_scale_mlp, t_gate_mlp = _parts(c.modulations.text)
    image = modulated(layer_norm(x.image, eps), shift, scale)
    text = modulated(layer_norm(x.text, eps), t_shift, t_scale)

    def project(name: str, of: mx.array, norm: str | None) -> mx.array:
        y = split_heads(linear(w, f"attn.{name}", of, trainable), heads)
        return y if norm is None else rms_norm(w, f"attn.{norm}", y, eps)

    q = mx.concatenate([project("add_q_proj", text, "norm_added_q"), project("to_q", image, "norm_q")], axis=2)
    k = mx.concatenate([project("add_k_proj", text, "norm_added_k"), project("to_k", image, "norm_k")], axis=2)
    v = mx.concatenate([project("add_v_proj", text, None), project("to_v", image, None)], axis=2)
    attended = _attend(q, k, v, c, text_length, mask)

    image = gate_add(x.image, gate, linear(w, "attn.to_out.0", attended[:, text_length:], trainable))
    text = gate_add(x.text, t_gate, linear(w, "attn.to_add_out", attended[:, :text_length], trainable))
    normed = modulated(layer_norm(image, eps), shift_mlp, scale_mlp)
    image = gate_add(image, gate_mlp, _feed_forward(w, "ff", normed, trainable))
    normed = modulated(layer_norm(text, eps), t_shift_mlp, t_scale_mlp)
    text = gate_add(text, t_gate_mlp, _feed_forward(w, "ff_context", normed, trainable))
    return Tokens(image, _clipped(text))


def single_block(
    w: Weights, trainable: Trainable, x: Tokens, c: Context, mask: str | None, config: Flux2Transformer2DConfig
) -> Tokens:
    """Attention and feed-forward side by side, over text and image tokens in one row."""
    assert x.text is not None
    heads, eps, text_length = config.num_attention_heads, config.eps, x.text.shape[1]
    shift, scale, gate = _parts(c.modulations.single)
    joined = mx.concatenate([x.text, x.image], axis=1)
    normed = modulated(layer_norm(joined, eps), shift, scale)

    into, out = "attn.to_qkv_mlp_proj", "attn.to_out"
    own, factors = outputs(w, trainable, into, 0, 3 * config.width)
    q, k, v = (split_heads(part, heads) for part in mx.split(linear(own, into, normed, factors), 3, axis=-1))
    q, k = rms_norm(w, "attn.norm_q", q, eps), rms_norm(w, "attn.norm_k", k, eps)
    attended = _attend(q, k, v, c, text_length, mask)
    wide, wide_factors = outputs(w, trainable, into, 3 * config.width, 3 * config.width + 2 * config.hidden)

    def rows(normed: mx.array, attended: mx.array) -> mx.array:
        hidden = _swiglu(linear(wide, into, normed, wide_factors))
        return linear(w, out, mx.concatenate([attended, hidden], axis=-1), trainable)

    found = _clipped(gate_add(joined, gate, by_rows(rows, normed, attended)))
    return Tokens(found[:, text_length:], found[:, :text_length])


KINDS = ("weight", "scales", "biases")
"""The tensors of a linear layer without a bias, each with a row for each output."""


def outputs(w: Weights, trainable: Trainable, name: str, start: int, stop: int) -> tuple[Weights, Trainable]:
    """Outputs start..stop-1 of a linear layer, as a layer of its name: so that not all are there for all tokens."""
    own = {f"{name}.{kind}": w[f"{name}.{kind}"][start:stop] for kind in KINDS if f"{name}.{kind}" in w}
    factors = dict(trainable)
    if f"{name}.lora_b" in factors:
        factors[f"{name}.lora_b"] = factors[f"{name}.lora_b"][:, start:stop]
    return own, factors


def _parts(modulation: mx.array) -> list[mx.array]:
    return [modulation[:, i] for i in range(modulation.shape[1])]


def _attend(q: mx.array, k: mx.array, v: mx.array, c: Context, text_length: int, mask: str | None) -> mx.array:
    q, k = apply_rope(q, c.cos, c.sin), apply_rope(k, c.cos, c.sin)
    scale = 1 / math.sqrt(q.shape[-1])
    return merge_heads(attention(q, k, v, scale=scale, text_length=text_length, mask=mask))


def _feed_forward(w: Weights, name: str, x: mx.array, trainable: Trainable) -> mx.array:
    def rows(x: mx.array) -> mx.array:
        return linear(w, f"{name}.linear_out", _swiglu(linear(w, f"{name}.linear_in", x, trainable)), trainable)

    return by_rows(rows, x)


def _swiglu(x: mx.array) -> mx.array:
    """The first half gates the second."""
    gate, value = mx.split(x, 2, axis=-1)
    return silu(gate) * value


def _clipped(x: mx.array) -> mx.array:
    return mx.clip(x, -FLOAT16_MAX, FLOAT16_MAX) if x.dtype == mx.float16 else x


def time_embedding(
    w: Weights, config: Flux2Transformer2DConfig, sigma: mx.array, guidance: mx.array | None, dtype: mx.Dtype
) -> mx.array:
    """temb (B, D) from sigma (B,) and, in a guidance-distilled model, guidance (B,).

    Source: diffusers Flux2TimestepGuidanceEmbeddings.
    """

    def mlp(name: str, x: mx.array) -> mx.array:
        path = f"time_guidance_embed.{name}"
        waves = sinusoid(x * TIME_FACTOR, config.timestep_guidance_channels).astype(dtype)
        return linear(w, f"{path}.linear_2", silu(linear(w, f"{path}.linear_1", waves)))

    temb = mlp("timestep_embedder", sigma)
    return temb if guidance is None else temb + mlp("guidance_embedder", guidance)


def modulations(w: Weights, temb: mx.array) -> Modulations:
    """What all blocks share. Source: diffusers Flux2Modulation."""

    def made(name: str, parts: int) -> mx.array:
        return linear(w, f"{name}.linear", silu(temb)).reshape(temb.shape[0], parts, 1, -1)

    image, text = (made(f"double_stream_modulation_{stream}", 6) for stream in ("img", "txt"))
    return Modulations(image, text, made("single_stream_modulation", 3))


def rope_tables(config: Flux2Transformer2DConfig, text_length: int, size: Size) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin, each (text + image tokens, head_dim / 2) in float32, computed in float64 as the reference does.

    Positions are (time, row, column, word): (0, 0, 0, i) of text token i, (0, row, column, 0) of an image token.
    """
    rows, columns = size
    ids = np.zeros((text_length + rows * columns, 4))
    ids[:text_length, 3] = np.arange(text_length)
    ids[text_length:, 1] = np.repeat(np.arange(rows), columns)
    ids[text_length:, 2] = np.tile(np.arange(columns), rows)
    angles = [
        ids[:, i : i + 1] * (1.0 / config.rope_theta ** (np.arange(0, axis, 2, dtype=np.float64) / axis))
        for i, axis in enumerate(config.axes_dims_rope)
    ]
    table = np.concatenate(angles, axis=1)
    return np.cos(table).astype(np.float32), np.sin(table).astype(np.float32)


def output_modulation(w: Weights, temb: mx.array) -> tuple[mx.array, mx.array]:
    """Scale and shift of the final norm, each (B, 1, D). Source: diffusers AdaLayerNormContinuous (scale first)."""
    scale, shift = mx.split(linear(w, "norm_out.linear", silu(temb)), 2, axis=-1)
    return scale[:, None], shift[:, None]


def output(w: Weights, image: mx.array, modulation: tuple[mx.array, mx.array], eps: float) -> mx.array:
    """The predicted velocity: (B, image tokens, out channels)."""
    scale, shift = modulation
    return linear(w, "proj_out", modulated(layer_norm(image, eps), shift, scale))


def empirical_mu(image_tokens: int, steps: int) -> float:
    """How far noise levels are shifted: on a line in the number of steps, through lines in that of tokens which were
    fitted at 10 and at 200 steps; from 4300 tokens on, the second alone. Source: diffusers compute_empirical_mu.
    """
    many = 0.00016927 * image_tokens + 0.45666666
    if image_tokens > 4300:
        return many
    few = 8.73809524e-05 * image_tokens + 1.89833333
    return many + (few - many) * (200 - steps) / 190
