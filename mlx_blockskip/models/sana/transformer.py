"""The SANA transformer: blocks of one kind, as functions. Source: diffusers SanaTransformer2DModel.

Text reaches a block by cross-attention alone, so it lies in the context, and `Tokens.text` is None. All blocks share
one embedding of the time; what differs is each block's own `scale_shift_table`, which is added to it. So a block has no
modulation of its own to be computed ahead: the embedding is part of the context.
"""

import math
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_blockskip.engine.stack import Block, BlockKind, Stack, Trainable, Weights
from mlx_blockskip.models.attention import IMAGE_TO_TEXT, attention
from mlx_blockskip.models.config import Config, NonNegativeInt, OneOf, PositiveFloat, PositiveInt
from mlx_blockskip.models.family import Size, Tokens
from mlx_blockskip.models.layers import (
    TOKEN_ROWS,
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

QK_EPS = 1e-5
CAPTION_EPS = 1e-5
OUTPUT_EPS = 1e-6
TIMESTEPS = 1000.0
MASKED = -10000.0
"""What is added to the scores of padding: not infinity, so it is exact only where some text is there to attend to."""

FLOAT16_MAX = 65504


@dataclass(frozen=True)
class SanaTransformer2DConfig(Config):
    """Source: diffusers SanaTransformer2DModel. sample_size: a side of the latents that it was trained on."""

    in_channels: PositiveInt = 32
    out_channels: PositiveInt | None = 32
    num_attention_heads: PositiveInt = 70
    attention_head_dim: PositiveInt = 32
    num_layers: NonNegativeInt = 20
    num_cross_attention_heads: PositiveInt = 20
    cross_attention_head_dim: PositiveInt = 112
    cross_attention_dim: PositiveInt = 2240
    caption_channels: PositiveInt = 2304
    mlp_ratio: PositiveFloat = 2.5
    attention_bias: bool = False
    sample_size: PositiveInt = 32
    patch_size: PositiveInt = 1
    norm_elementwise_affine: bool = False
    norm_eps: PositiveFloat = 1e-6
    interpolation_scale: PositiveFloat | None = None
    guidance_embeds: bool | None = False
    guidance_embeds_scale: float = 0.1
    qk_norm: Annotated[str | None, OneOf(None, "rms_norm_across_heads")] = None
    timestep_scale: float = 1.0


class Context(NamedTuple):
    """What the blocks and the head take beside the tokens.

    text: (B, L, D), projected and normed; bias: (B, 1, 1, L), 0 for text and MASKED for padding; temb: (B, 6, 1, D),
    what shift, scale and gate of every block are made from; embedded: (B, 1, D), the same for the head, or None where
    the head's modulation is from a record; size: height and width of the latents.
    """

    text: mx.array
    bias: mx.array
    temb: mx.array
    embedded: mx.array | None
    size: Size


def stack(config: SanaTransformer2DConfig) -> Stack:
    """The blocks of a SANA transformer."""
    heads, cross_heads = config.num_attention_heads, config.num_cross_attention_heads
    patch, eps = config.patch_size, config.norm_eps

    def apply(w: Weights, t: Trainable, x: Tokens, c: Context, mod: None, mask: str | None) -> Tokens:
        return block(w, t, x, c, mask, heads, cross_heads, patch, eps)

    kind = BlockKind("sana", apply)
    return Stack(tuple(Block(f"transformer_blocks.{i}.", kind) for i in range(config.num_layers)))


def block(
    w: Weights,
    trainable: Trainable,
    tokens: Tokens,
    c: Context,
    mask: str | None,
    heads: int,
    cross_heads: int,
    patch: int,
    eps: float,
) -> Tokens:
    """Linear attention among image tokens, cross-attention to the text, a gated convolution as feed-forward.

    Where `mask` is IMAGE_TO_TEXT nothing comes from the text.
    """
    x = tokens.image
    modulation = w["scale_shift_table"][None, :, None] + c.temb
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = (modulation[:, i] for i in range(6))

    normed = modulated(layer_norm(x, eps), shift, scale).astype(x.dtype)
    x = gate_add(x, gate, linear_attention(w, "attn1", normed, heads, trainable))
    if mask != IMAGE_TO_TEXT:
        x = x + cross_attention(w, "attn2", x, c.text, c.bias, cross_heads, mask, trainable)
    normed = modulated(layer_norm(x, eps, w if "norm2.weight" in w else None, "norm2"), shift_mlp, scale_mlp)
    batch, _, width = x.shape
    image = normed.reshape(batch, c.size[0] // patch, c.size[1] // patch, width)
    return Tokens(gate_add(x, gate_mlp, glumb_conv(w, "ff", image, trainable).reshape(x.shape)))


def linear_attention(w: Weights, name: str, x: mx.array, heads: int, trainable: Trainable) -> mx.array:
    """(B, L, D) -> (B, L, D): relu(q) (relu(k)^T v) / (relu(q) relu(k)^T 1), the products in float32.

    Source: SanaLinearAttnProcessor2_0.
    """
    summed = _keys_by_values(w, name, x, heads, trainable)

    def attend(rows: mx.array) -> mx.array:
        q = mx.maximum(_normed(w, f"{name}.norm_q", linear(w, f"{name}.to_q", rows, trainable)), 0)
        y = split_heads(q, heads).astype(mx.float32) @ summed
        y = y[..., :-1] / (y[..., -1:] + 1e-15)
        return linear(w, f"{name}.to_out.0", merge_heads(y).astype(x.dtype), trainable)

    y = by_rows(attend, x)
    return mx.clip(y, -FLOAT16_MAX, FLOAT16_MAX) if y.dtype == mx.float16 else y


def _keys_by_values(w: Weights, name: str, x: mx.array, heads: int, trainable: Trainable) -> mx.array:
    """relu(k)^T (v, 1) summed over the tokens, TOKEN_ROWS of them at a time: (B, heads, d, d + 1), float32."""
    parts: list[mx.array] = []
    for start in range(0, x.shape[1], TOKEN_ROWS):
        rows = x[:, start : start + TOKEN_ROWS]
        rows = mx.depends([rows], parts[-1:])[0] if parts else rows
        k = mx.maximum(_normed(w, f"{name}.norm_k", linear(w, f"{name}.to_k", rows, trainable)), 0)
        v = linear(w, f"{name}.to_v", rows, trainable)
        k, v = (split_heads(y, heads).astype(mx.float32) for y in (k, v))
        parts.append(k.swapaxes(-1, -2) @ mx.concatenate([v, mx.ones_like(v[..., :1])], axis=-1))
    return sum(parts[1:], parts[0])


def cross_attention(
    w: Weights,
    name: str,
    x: mx.array,
    text: mx.array,
    bias: mx.array,
    heads: int,
    mask: str | None,
    trainable: Trainable,
) -> mx.array:
    """Image (B, L, D) to text (B, T, D) with a bias (B, 1, 1, T) on the scores. Source: SanaAttnProcessor2_0."""
    k = split_heads(_normed(w, f"{name}.norm_k", linear(w, f"{name}.to_k", text, trainable)), heads)
    v = split_heads(linear(w, f"{name}.to_v", text, trainable), heads)
    scale = 1 / math.sqrt(k.shape[-1])

    def attend(rows: mx.array) -> mx.array:
        q = split_heads(_normed(w, f"{name}.norm_q", linear(w, f"{name}.to_q", rows, trainable)), heads)
        y = attention(q, k, v, scale=scale, bias=bias.astype(q.dtype), mask=mask)
        return linear(w, f"{name}.to_out.0", merge_heads(y), trainable)

    return by_rows(attend, x)


def _normed(w: Weights, name: str, x: mx.array) -> mx.array:
    """RMSNorm across all heads where the model has it."""
    return rms_norm(w, name, x, QK_EPS) if f"{name}.weight" in w else x


def glumb_conv(w: Weights, name: str, x: mx.array, trainable: Trainable) -> mx.array:
    """Widen, convolve each channel 3 x 3, gate, narrow: (B, H, W, D) -> (B, H, W, D), without a norm or a residual.

    In strips of whole rows, about TOKEN_ROWS pixels each, with one row of halo above and below: each exact, and each
    waiting for the one before it. Source: GLUMBConv.
    """
    height, width = x.shape[1:3]
    step = max(1, TOKEN_ROWS // width)
    done: list[mx.array] = []
    for start in range(0, height, step):
        stop = min(start + step, height)
        top, bottom = max(start - 1, 0), min(stop + 1, height)
        part = x[:, top:bottom]
        if done:
            part = mx.depends([part], done[-1:])[0]
        wide = silu(linear(w, f"{name}.conv_inverted", part, trainable))
        wide = mx.pad(wide, [(0, 0), (int(start == 0), int(stop == height)), (1, 1), (0, 0)])
        a, gate = mx.split(depthwise(w, f"{name}.conv_depth", wide), 2, axis=-1)
        done.append(linear(w, f"{name}.conv_point", a * silu(gate), trainable))
    return done[0] if len(done) == 1 else mx.concatenate(done, axis=1)


def depthwise(w: Weights, name: str, x: mx.array) -> mx.array:
    """A 3 x 3 convolution of each channel by itself, without padding: (B, H + 2, W + 2, C) -> (B, H, W, C)."""
    return mx.conv2d(x, w[f"{name}.weight"], groups=x.shape[-1]) + w[f"{name}.bias"]


def embed(w: Weights, config: SanaTransformer2DConfig, latents: mx.array) -> mx.array:
    """Image tokens (B, h/p * w/p, D) of latents (B, h, w, C), with positions where the config has them.

    Reads `patch_embed`. Source: PatchEmbed.
    """
    p = config.patch_size
    b, h, width, c = latents.shape
    patches = latents.reshape(b, h // p, p, width // p, p, c).swapaxes(2, 3).reshape(b, h * width // p**2, p * p * c)
    weight = w["patch_embed.proj.weight"]
    flat = {"proj.weight": weight.reshape(weight.shape[0], -1), "proj.bias": w["patch_embed.proj.bias"]}
    tokens = linear(flat, "proj", patches.astype(weight.dtype))
    if config.interpolation_scale is None:
        return tokens
    base = config.sample_size // p
    table = positions(tokens.shape[-1], (h // p, width // p), base, config.interpolation_scale)
    return (tokens + mx.array(table)).astype(tokens.dtype)


def positions(width: int, size: Size, base: int, scale: float) -> np.ndarray:
    """(rows * columns, width) float32: sines and cosines of the column, then of the row, both as shares of the map.

    Computed in float64 from float32 places. Source: get_2d_sincos_pos_embed.
    """
    rows, columns = (
        np.arange(n, dtype=np.float32) / np.float32(n / base) / np.float32(scale) for n in (size[0], size[1])
    )
    omega = 1 / 10000 ** (np.arange(width // 4, dtype=np.float64) / (width / 4))
    found = [
        np.outer(place.astype(np.float64), omega) for place in (np.tile(columns, size[0]), np.repeat(rows, size[1]))
    ]
    return np.concatenate([f(a) for a in found for f in (np.sin, np.cos)], axis=1).astype(np.float32)


def caption(w: Weights, text: mx.array) -> mx.array:
    """The encoded prompt (B, L, caption channels) as the blocks take it: (B, L, D).

    Reads `caption_projection` and `caption_norm`. Source: PixArtAlphaTextProjection.
    """
    y = linear(w, "caption_projection.linear_2", gelu_tanh(linear(w, "caption_projection.linear_1", text)))
    return rms_norm(w, "caption_norm", y, CAPTION_EPS)


def text_bias(mask: mx.array, dtype: mx.Dtype) -> mx.array:
    """(B, 1, 1, L) from a mask (B, L) that is 1 for text and 0 for padding."""
    return ((1 - mask.astype(dtype)) * MASKED)[:, None, None]


def time_embedding(
    w: Weights, config: SanaTransformer2DConfig, sigma: mx.array, guidance: mx.array | None
) -> tuple[mx.array, mx.array]:
    """temb (B, 6, 1, D) and embedded (B, 1, D) from sigma (B,) and, where the config has it, guidance (B,).

    Reads `time_embed`. Source: AdaLayerNormSingle, SanaCombinedTimestepGuidanceEmbeddings.
    """
    guided = config.guidance_embeds

    def mlp(name: str, x: mx.array) -> mx.array:
        x = sinusoid(x).astype(w[f"{name}.linear_1.weight"].dtype)
        return linear(w, f"{name}.linear_2", silu(linear(w, f"{name}.linear_1", x)))

    embedder = "time_embed.timestep_embedder" if guided else "time_embed.emb.timestep_embedder"
    embedded = mlp(embedder, sigma * time_factor(config))
    if guided:
        assert guidance is not None
        embedded = embedded + mlp("time_embed.guidance_embedder", guidance * config.guidance_embeds_scale)
    temb = linear(w, "time_embed.linear", silu(embedded))
    return temb.reshape(sigma.shape[0], 6, 1, -1), embedded[:, None]


def time_factor(config: SanaTransformer2DConfig) -> float:
    """What sigma is multiplied by: SanaPipeline scales the scheduler's timesteps, SanaSprintPipeline does not."""
    return 1.0 if config.guidance_embeds else TIMESTEPS * config.timestep_scale


def output(w: Weights, config: SanaTransformer2DConfig, image: mx.array, embedded: mx.array, size: Size) -> mx.array:
    """The predicted velocity (B, h, w, C) from image tokens and embedded (B, 1, D).

    Reads `scale_shift_table` and `proj_out`. Source: SanaModulatedNorm and the end of SanaTransformer2DModel.
    """
    shift, scale = (w["scale_shift_table"][None, i, None] + embedded for i in range(2))
    y = linear(w, "proj_out", modulated(layer_norm(image, OUTPUT_EPS), shift, scale))
    p, (h, width) = config.patch_size, size
    return y.reshape(y.shape[0], h // p, width // p, p, p, -1).swapaxes(2, 3).reshape(y.shape[0], h, width, -1)
