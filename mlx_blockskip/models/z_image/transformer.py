"""The Z-Image transformer: blocks of one shape, as functions. Source: diffusers ZImageTransformer2DModel.

Two of them refine the prompt's tokens, two the image's, and the main ones take both in one row. Norms lie before and
behind attention and feed-forward; blocks that see the image are scaled and gated by the noise level, and never shifted.
Both kinds of tokens are filled up to a multiple of 32 with learned ones, which are attended to like all others.
"""

import math
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_blockskip.engine.stack import Block, BlockKind, Stack, Trainable, Weights
from mlx_blockskip.models.attention import SCORE_BYTES, apply_rope, attention
from mlx_blockskip.models.config import Config, NonNegativeInt, OneOf, PositiveFloat, PositiveInt, Unset
from mlx_blockskip.models.family import Size, Tokens
from mlx_blockskip.models.layers import (
    by_rows,
    gate_add,
    layer_norm,
    linear,
    merge_heads,
    rms_norm,
    silu,
    sinusoid,
    split_heads,
)

MULTIPLE = 32
"""Of which there are so many tokens of each kind."""

PATCH = 2
"""Sides of an image token, in latents."""

TIME_WIDTH, TIME_HIDDEN, WAVES = 256, 1024, 256
"""Of the noise level's embedding, and of the layers that make it."""

HEAD_EPS, FINAL_EPS = 1e-5, 1e-6

EMBEDDER, FINAL = "all_x_embedder.2-1", "all_final_layer.2-1"
"""The layers for patches of this size in one frame."""

MODULATION = "adaLN_modulation.0"

QUERY_ROWS = 256
"""Query rows of attention at a time, at most: with 30 heads the scores of a training patch, and on the way back their
gradients beside them, would else be most of what a block takes. A constant, so that chunks follow from shapes alone.
"""


@dataclass(frozen=True)
class ZImageTransformer2DConfig(Config):
    """Source: diffusers ZImageTransformer2DModel."""

    all_patch_size: Annotated[tuple[int, ...], OneOf((PATCH,))] = (2,)
    all_f_patch_size: Annotated[tuple[int, ...], OneOf((1,))] = (1,)
    in_channels: PositiveInt = 16
    dim: PositiveInt = 3840
    n_layers: NonNegativeInt = 30
    n_refiner_layers: NonNegativeInt = 2
    n_heads: PositiveInt = 30
    norm_eps: PositiveFloat = 1e-5
    qk_norm: bool = True
    cap_feat_dim: PositiveInt = 2560
    siglip_feat_dim: Unset = None
    rope_theta: PositiveFloat = 256.0
    t_scale: PositiveFloat = 1000.0
    axes_dims: tuple[PositiveInt, ...] = (32, 48, 48)

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def hidden(self) -> int:
        """Of a feed-forward."""
        return int(self.dim / 3 * 8)

    @property
    def time_width(self) -> int:
        return min(self.dim, TIME_WIDTH)

    def contradiction(self) -> str | None:
        if len(self.axes_dims) != 3 or sum(self.axes_dims) * self.n_heads != self.dim:
            axes = " + ".join(str(axis) for axis in self.axes_dims)
            return f"axes_dims {axes} for n_heads {self.n_heads} is not dim {self.dim} in three axes"
        return None


class Text(NamedTuple):
    """A prompt's tokens on the way through their refiner: (B, L, D)."""

    text: mx.array


class Rotations(NamedTuple):
    """cos, sin: (tokens, head_dim / 2), float32."""

    cos: mx.array
    sin: mx.array


class Context(NamedTuple):
    """cos, sin: (text + image tokens, head_dim / 2), float32; temb: (B, time width), the noise level."""

    cos: mx.array
    sin: mx.array
    temb: mx.array
    size: Size


def stack(config: ZImageTransformer2DConfig) -> Stack:
    """The main blocks, and before them, as prelude, those that refine the image's tokens."""

    def refiner(w: Weights, t: Trainable, x: Tokens, c: Context, mod: None, mask: str | None) -> Tokens:
        assert x.text is not None
        first = x.text.shape[1]
        own = Rotations(c.cos[first:], c.sin[first:])
        return Tokens(block(w, t, x.image, own, modulation(w, t, c.temb), config), x.text)

    def main(w: Weights, t: Trainable, x: Tokens, c: Context, mod: None, mask: str | None) -> Tokens:
        assert x.text is not None
        length, both = x.text.shape[1], Rotations(c.cos, c.sin)
        joined = mx.concatenate([x.text, x.image], axis=1)
        found = block(w, t, joined, both, modulation(w, t, c.temb), config, length, mask)
        return Tokens(found[:, length:], found[:, :length])

    main_kind, refiner_kind = BlockKind("main", main), BlockKind("refiner", refiner)
    return Stack(
        tuple(Block(f"layers.{i}.", main_kind) for i in range(config.n_layers)),
        tuple(Block(f"noise_refiner.{i}.", refiner_kind) for i in range(config.n_refiner_layers)),
    )


def text_stack(config: ZImageTransformer2DConfig) -> Stack:
    """The blocks that refine a prompt's tokens. State: Text; context: Rotations. No noise level reaches them."""

    def context_refiner(w: Weights, t: Trainable, x: Text, c: Rotations, mod: None, mask: None) -> Text:
        return Text(block(w, t, x.text, c, None, config))

    kind = BlockKind("context_refiner", context_refiner)
    return Stack(tuple(Block(f"context_refiner.{i}.", kind) for i in range(config.n_refiner_layers)))


class Modulation(NamedTuple):
    """Scales and gates of attention and feed-forward, (B, 1, D) each."""

    scale: mx.array
    gate: mx.array
    scale_mlp: mx.array
    gate_mlp: mx.array


def modulation(w: Weights, trainable: Trainable, temb: mx.array) -> Modulation:
    """A block's, made where it is used: of 256 numbers, in a layer that is a fiftieth of the block."""
    scale, gate, scale_mlp, gate_mlp = mx.split(linear(w, MODULATION, temb, trainable)[:, None], 4, axis=-1)
    return Modulation(1 + scale, mx.tanh(gate), 1 + scale_mlp, mx.tanh(gate_mlp))


def block(
    w: Weights,
    trainable: Trainable,
    x: mx.array,
    rotations: Rotations,
    mod: Modulation | None,
    config: ZImageTransformer2DConfig,
    text_length: int = 0,
    mask: str | None = None,
) -> mx.array:
    """(B, L, D) -> (B, L, D). text_length: tokens of the prompt, which stand first: for the mask."""

    def before(name: str, x: mx.array, scale: mx.array | None) -> mx.array:
        normed = rms_norm(w, name, x, config.norm_eps)
        return normed if scale is None else normed * scale

    def added(name: str, x: mx.array, gate: mx.array | None, branch: mx.array) -> mx.array:
        normed = rms_norm(w, name, branch, config.norm_eps)
        return x + normed if gate is None else gate_add(x, gate, normed)

    scale, gate, scale_mlp, gate_mlp = (None,) * 4 if mod is None else mod
    attended = _attention(w, trainable, before("attention_norm1", x, scale), rotations, config, text_length, mask)
    x = added("attention_norm2", x, gate, attended)
    fed = by_rows(lambda rows: _feed_forward(w, rows, trainable), before("ffn_norm1", x, scale_mlp))
    return added("ffn_norm2", x, gate_mlp, fed)


def _attention(
    w: Weights,
    trainable: Trainable,
    x: mx.array,
    rotations: Rotations,
    config: ZImageTransformer2DConfig,
    text_length: int,
    mask: str | None,
) -> mx.array:
    def project(part: str) -> mx.array:
        return split_heads(linear(w, f"attention.to_{part}", x, trainable), config.n_heads)

    def turned(part: str) -> mx.array:
        y = project(part)
        y = rms_norm(w, f"attention.norm_{part}", y, HEAD_EPS) if config.qk_norm else y
        return apply_rope(y, *rotations)

    attended = attention(
        turned("q"),
        turned("k"),
        project("v"),
        scale=1 / math.sqrt(config.head_dim),
        text_length=text_length,
        mask=mask,
        query_chunk=query_rows(x.shape[0], config.n_heads, x.shape[1]),
    )
    return linear(w, "attention.to_out.0", merge_heads(attended), trainable)


def query_rows(batch: int, heads: int, keys: int) -> int:
    """As many as attention takes, and no more than QUERY_ROWS."""
    return min(QUERY_ROWS, max(1, SCORE_BYTES // (4 * batch * heads * keys)))


def _feed_forward(w: Weights, x: mx.array, trainable: Trainable) -> mx.array:
    gate, value = (linear(w, f"feed_forward.w{i}", x, trainable) for i in (1, 3))
    return linear(w, "feed_forward.w2", silu(gate) * value, trainable)


def time_embedding(w: Weights, config: ZImageTransformer2DConfig, sigma: mx.array, dtype: mx.Dtype) -> mx.array:
    """temb (B, time width) from sigma (B,): the model's time goes from 0, where all is noise, to 1."""
    waves = sinusoid((1 - sigma.astype(mx.float32)) * config.t_scale, WAVES).astype(dtype)
    return linear(w, "t_embedder.mlp.2", silu(linear(w, "t_embedder.mlp.0", waves)))


def padded_length(tokens: int) -> int:
    """So many tokens as there are with those that fill up to a multiple."""
    return -(-tokens // MULTIPLE) * MULTIPLE


def filled(x: mx.array, token: mx.array) -> mx.array:
    """(B, L, D) with a learned token (1, D) behind it as often as it takes to a multiple."""
    batch, length, width = x.shape
    blank = mx.broadcast_to(token.astype(x.dtype)[None], (batch, padded_length(length) - length, width))
    return mx.concatenate([x, blank], axis=1)


def patchify(latents: mx.array) -> mx.array:
    """(B, h, w, C) -> (B, h w / 4, 4 C): row, column, channel inside a token."""
    batch, h, w, channels = latents.shape
    parts = latents.reshape(batch, h // PATCH, PATCH, w // PATCH, PATCH, channels).transpose(0, 1, 3, 2, 4, 5)
    return parts.reshape(batch, -1, PATCH * PATCH * channels)


def unpatchify(tokens: mx.array, size: Size) -> mx.array:
    """The inverse of `patchify`; size: of the latents. Tokens that fill up are left out."""
    rows, columns = size[0] // PATCH, size[1] // PATCH
    batch, _, width = tokens.shape
    parts = tokens[:, : rows * columns].reshape(batch, rows, columns, PATCH, PATCH, width // PATCH**2)
    return parts.transpose(0, 1, 3, 2, 4, 5).reshape(batch, *size, width // PATCH**2)


def text_rotations(config: ZImageTransformer2DConfig, length: int) -> Rotations:
    """Of `length` text tokens, those that fill up counted: token i is at (1 + i, 0, 0)."""
    ids = np.zeros((length, 3))
    ids[:, 0] = 1 + np.arange(length)
    return _rotations(config, ids)


def rotations(config: ZImageTransformer2DConfig, text_length: int, size: Size) -> Rotations:
    """Of text, then image tokens. An image token is at (text_length + 1, row, column), one that fills up at (0, 0, 0).
    size: of the latents.
    """
    rows, columns = size[0] // PATCH, size[1] // PATCH
    ids = np.zeros((padded_length(rows * columns), 3))
    image = ids[: rows * columns]
    image[:, 0] = text_length + 1
    image[:, 1] = np.repeat(np.arange(rows), columns)
    image[:, 2] = np.tile(np.arange(columns), rows)
    text = text_rotations(config, text_length)
    own = _rotations(config, ids)
    return Rotations(mx.concatenate([text.cos, own.cos]), mx.concatenate([text.sin, own.sin]))


def _rotations(config: ZImageTransformer2DConfig, ids: np.ndarray) -> Rotations:
    """Angles in float64, as the reference has them, and rounded before their cosines are taken."""
    angles = [
        ids[:, i : i + 1] * (1.0 / config.rope_theta ** (np.arange(0, axis, 2, dtype=np.float64) / axis))
        for i, axis in enumerate(config.axes_dims)
    ]
    table = np.concatenate(angles, axis=1).astype(np.float32)
    return Rotations(mx.array(np.cos(table)), mx.array(np.sin(table)))


def output_scale(w: Weights, temb: mx.array) -> mx.array:
    """What the final norm is multiplied by, (B, 1, D)."""
    return 1 + linear(w, f"{FINAL}.adaLN_modulation.1", silu(temb))[:, None]


def output(w: Weights, image: mx.array, scale: mx.array, size: Size) -> mx.array:
    """The velocity (B, h, w, C) from the image's tokens. The network's own points from noise to image: it is turned."""
    return -unpatchify(linear(w, f"{FINAL}.linear", layer_norm(image, FINAL_EPS) * scale), size)
