"""The FLUX.1 transformer: 19 double and 38 single blocks, as functions. Source: diffusers FluxTransformer2DModel."""

import math
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_blockskip.engine.stack import Block, BlockKind, Stack, Trainable, Weights
from mlx_blockskip.models.attention import apply_rope, attention
from mlx_blockskip.models.config import Config, NonNegativeInt, OneOf, PositiveInt
from mlx_blockskip.models.family import Size, Tokens
from mlx_blockskip.models.layers import (
    by_rows,
    gate_add,
    gelu_tanh,
    layer_norm,
    linear,
    merge_heads,
    modulated,
    rms_norm,
    silu,
    sinusoid,
    split_heads,
)

EPS = 1e-6
TIME_FACTOR = 1000.0


@dataclass(frozen=True)
class FluxTransformer2DConfig(Config):
    """Source: diffusers FluxTransformer2DModel. Its files of 2024 leave out `axes_dims_rope` and `out_channels`."""

    patch_size: Annotated[int, OneOf(1)] = 1
    in_channels: PositiveInt = 64
    out_channels: PositiveInt | None = None
    num_layers: NonNegativeInt = 19
    num_single_layers: NonNegativeInt = 38
    attention_head_dim: PositiveInt = 128
    num_attention_heads: PositiveInt = 24
    joint_attention_dim: PositiveInt = 4096
    pooled_projection_dim: PositiveInt = 768
    guidance_embeds: bool = False
    axes_dims_rope: tuple[PositiveInt, ...] = (16, 56, 56)

    def contradiction(self) -> str | None:
        if sum(self.axes_dims_rope) != self.attention_head_dim:
            axes = " + ".join(str(axis) for axis in self.axes_dims_rope)
            return f"axes_dims_rope {axes} is not attention_head_dim {self.attention_head_dim}"
        return None


class Context(NamedTuple):
    """cos, sin: (text + image tokens, head_dim / 2), float32; temb: (B, D), None where modulation is from a record."""

    cos: mx.array
    sin: mx.array
    temb: mx.array | None
    size: Size


def stack(config: FluxTransformer2DConfig) -> Stack:
    """The blocks of a FLUX.1 transformer."""
    head_dim = config.attention_head_dim

    def double(w: Weights, t: Trainable, x: Tokens, c: Context, mod: Any, mask: str | None) -> Tokens:
        return double_block(w, t, x, c, mod, mask, head_dim)

    def single(w: Weights, t: Trainable, x: Tokens, c: Context, mod: Any, mask: str | None) -> Tokens:
        return single_block(w, t, x, c, mod, mask, head_dim)

    double_kind = BlockKind("double", double, double_modulation, ("norm1.linear", "norm1_context.linear"))
    single_kind = BlockKind("single", single, single_modulation, ("norm.linear",))
    return Stack(
        (
            *(Block(f"transformer_blocks.{i}.", double_kind) for i in range(config.num_layers)),
            *(Block(f"single_transformer_blocks.{i}.", single_kind) for i in range(config.num_single_layers)),
        )
    )


def double_modulation(w: Weights, c: Context) -> tuple[mx.array, mx.array]:
    """Shift, scale, gate of attention and of the feed-forward: (B, 6, 1, D) for image and for text."""
    return _modulation(w, "norm1.linear", c, 6), _modulation(w, "norm1_context.linear", c, 6)


def single_modulation(w: Weights, c: Context) -> tuple[mx.array]:
    """Shift, scale, gate: (B, 3, 1, D)."""
    return (_modulation(w, "norm.linear", c, 3),)


def _modulation(w: Weights, name: str, c: Context, parts: int) -> mx.array:
    assert c.temb is not None
    return linear(w, name, silu(c.temb)).reshape(c.temb.shape[0], parts, 1, -1)


def double_block(
    w: Weights,
    trainable: Trainable,
    x: Tokens,
    c: Context,
    mod: tuple[mx.array, mx.array],
    mask: str | None,
    head_dim: int,
) -> Tokens:
    """Joint attention over text and image tokens, each with its own projections and feed-forward."""
    assert x.text is not None
    heads = x.image.shape[-1] // head_dim
    text_length = x.text.shape[1]
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = (mod[0][:, i] for i in range(6))
    t_shift, t_scale, t_gate, t_shift_mlp, t_scale_mlp, t_gate_mlp = (mod[1][:, i] for i in range(6))

    image = _normed(x.image, shift, scale)
    text = _normed(x.text, t_shift, t_scale)

    def project(name: str, of: mx.array, norm: str | None) -> mx.array:
        y = split_heads(linear(w, f"attn.{name}", of, trainable), heads)
        return y if norm is None else rms_norm(w, f"attn.{norm}", y, EPS)

    q = mx.concatenate([project("add_q_proj", text, "norm_added_q"), project("to_q", image, "norm_q")], axis=2)
    k = mx.concatenate([project("add_k_proj", text, "norm_added_k"), project("to_k", image, "norm_k")], axis=2)
    v = mx.concatenate([project("add_v_proj", text, None), project("to_v", image, None)], axis=2)
    attended = _attend(q, k, v, c, text_length, mask)

    image = gate_add(x.image, gate, linear(w, "attn.to_out.0", attended[:, text_length:], trainable))
    text = gate_add(x.text, t_gate, linear(w, "attn.to_add_out", attended[:, :text_length], trainable))

    image = gate_add(image, gate_mlp, _feed_forward(w, "ff", _normed(image, shift_mlp, scale_mlp), trainable))
    text = gate_add(
        text, t_gate_mlp, _feed_forward(w, "ff_context", _normed(text, t_shift_mlp, t_scale_mlp), trainable)
    )
    if text.dtype == mx.float16:
        text = mx.clip(text, -65504, 65504)
    return Tokens(image, text)


def single_block(
    w: Weights, trainable: Trainable, x: Tokens, c: Context, mod: tuple[mx.array], mask: str | None, head_dim: int
) -> Tokens:
    """Attention and feed-forward side by side, over text and image tokens in one row."""
    assert x.text is not None
    heads = x.image.shape[-1] // head_dim
    text_length = x.text.shape[1]
    shift, scale, gate = (mod[0][:, i] for i in range(3))
    joined = mx.concatenate([x.text, x.image], axis=1)
    normed = _normed(joined, shift, scale)

    q = rms_norm(w, "attn.norm_q", split_heads(linear(w, "attn.to_q", normed, trainable), heads), EPS)
    k = rms_norm(w, "attn.norm_k", split_heads(linear(w, "attn.to_k", normed, trainable), heads), EPS)
    v = split_heads(linear(w, "attn.to_v", normed, trainable), heads)
    attended = _attend(q, k, v, c, text_length, mask)

    def project(normed: mx.array, attended: mx.array) -> mx.array:
        mlp = gelu_tanh(linear(w, "proj_mlp", normed, trainable))
        return linear(w, "proj_out", mx.concatenate([attended, mlp], axis=-1), trainable)

    out = gate_add(joined, gate, by_rows(project, normed, attended))
    if out.dtype == mx.float16:
        out = mx.clip(out, -65504, 65504)
    return Tokens(out[:, text_length:], out[:, :text_length])


def _attend(q: mx.array, k: mx.array, v: mx.array, c: Context, text_length: int, mask: str | None) -> mx.array:
    q, k = apply_rope(q, c.cos, c.sin), apply_rope(k, c.cos, c.sin)
    scale = 1 / math.sqrt(q.shape[-1])
    return merge_heads(attention(q, k, v, scale=scale, text_length=text_length, mask=mask))


def _normed(x: mx.array, shift: mx.array, scale: mx.array) -> mx.array:
    return modulated(layer_norm(x, EPS), shift, scale)


def _feed_forward(w: Weights, name: str, x: mx.array, trainable: Trainable) -> mx.array:
    def rows(x: mx.array) -> mx.array:
        return linear(w, f"{name}.net.2", gelu_tanh(linear(w, f"{name}.net.0.proj", x, trainable)), trainable)

    return by_rows(rows, x)


def time_text_embedding(w: Weights, sigma: mx.array, pooled: mx.array, guidance: mx.array | None) -> mx.array:
    """temb (B, D) from sigma (B,), the pooled prompt (B, P) and, in a guidance-distilled model, guidance (B,).

    Source: diffusers CombinedTimestep(Guidance)TextProjEmbeddings.
    """

    def mlp(name: str, x: mx.array) -> mx.array:
        path = f"time_text_embed.{name}"
        return linear(w, f"{path}.linear_2", silu(linear(w, f"{path}.linear_1", x)))

    temb = mlp("timestep_embedder", sinusoid(sigma * TIME_FACTOR).astype(pooled.dtype))
    if guidance is not None:
        temb = temb + mlp("guidance_embedder", sinusoid(guidance * TIME_FACTOR).astype(pooled.dtype))
    return temb + mlp("text_embedder", pooled)


def rope_tables(axes: tuple[int, ...], text_length: int, size: Size) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin, each (text + image tokens, sum(axes) / 2) in float32, computed in float64 as the reference does.

    size: latents' height and width; image tokens are 2 x 2 patches of them. Text ids are zero, image ids (0, row, col).
    """
    rows, columns = size[0] // 2, size[1] // 2
    ids = np.zeros((text_length + rows * columns, len(axes)))
    ids[text_length:, -2] = np.repeat(np.arange(rows), columns)
    ids[text_length:, -1] = np.tile(np.arange(columns), rows)
    angles = [
        ids[:, i : i + 1] * (1.0 / 10000 ** (np.arange(0, axis, 2, dtype=np.float64) / axis))
        for i, axis in enumerate(axes)
    ]
    table = np.concatenate(angles, axis=1)
    return np.cos(table).astype(np.float32), np.sin(table).astype(np.float32)


def output_modulation(w: Weights, temb: mx.array) -> tuple[mx.array, mx.array]:
    """Scale and shift of the final norm, each (B, 1, D). Source: diffusers AdaLayerNormContinuous (scale first)."""
    scale, shift = mx.split(linear(w, "norm_out.linear", silu(temb)), 2, axis=-1)
    return scale[:, None], shift[:, None]


def output(w: Weights, image: mx.array, modulation: tuple[mx.array, mx.array]) -> mx.array:
    """The predicted velocity, packed: (B, image tokens, out channels)."""
    scale, shift = modulation
    return linear(w, "proj_out", _normed(image, shift, scale))


def pack(latents: mx.array) -> mx.array:
    """(B, h, w, C) -> (B, h/2 * w/2, C * 4), channels outermost as in FluxPipeline._pack_latents."""
    b, h, w, c = latents.shape
    return latents.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 5, 2, 4).reshape(b, h * w // 4, c * 4)


def unpack(packed: mx.array, size: Size) -> mx.array:
    """The inverse of `pack`: (B, h/2 * w/2, C * 4) -> (B, h, w, C)."""
    b, _, width = packed.shape
    h, w = size
    return packed.reshape(b, h // 2, w // 2, width // 4, 2, 2).transpose(0, 1, 4, 2, 5, 3).reshape(b, h, w, width // 4)
