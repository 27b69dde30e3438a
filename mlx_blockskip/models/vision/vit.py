"""DINO's and DINOv2's vision transformer as a stack. Sources: transformers ViTModel (without pooler), Dinov2Model.

Both go by the names of Dinov2Model's modules. What only some have follows from the weights: biases of q, k, v,
`layer_scale1` and `layer_scale2`, and `mlp.gate_proj` (SwiGLU) in place of `mlp.fc1`.
"""

import math
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlx_blockskip.engine.stack import Block, BlockKind, Stack, Trainable, Weights
from mlx_blockskip.models.attention import attention
from mlx_blockskip.models.config import Config, NonNegativeInt, OneOf, PositiveFloat, PositiveInt
from mlx_blockskip.models.layers import gelu_tanh, layer_norm, linear, merge_heads, quick_gelu, silu, split_heads
from mlx_blockskip.models.text.clip import undivided
from mlx_blockskip.models.vision.patches import Sides, grid_of, patch_tokens, positions

ACTIVATIONS = {"gelu": nn.gelu, "gelu_new": gelu_tanh, "quick_gelu": quick_gelu, "relu": nn.relu, "silu": silu}


@dataclass(frozen=True)
class ViTConfig(Config):
    """Source: transformers ViTConfig."""

    hidden_size: PositiveInt = 768
    num_hidden_layers: NonNegativeInt = 12
    num_attention_heads: PositiveInt = 12
    intermediate_size: PositiveInt = 3072
    hidden_act: Annotated[str, OneOf(*ACTIVATIONS)] = "gelu"
    layer_norm_eps: PositiveFloat = 1e-12
    image_size: Sides = 224
    patch_size: Sides = 16
    num_channels: PositiveInt = 3
    qkv_bias: bool = True

    def contradiction(self) -> str | None:
        return undivided(self)


@dataclass(frozen=True)
class Dinov2Config(Config):
    """Source: transformers Dinov2Config."""

    hidden_size: PositiveInt = 768
    num_hidden_layers: NonNegativeInt = 12
    num_attention_heads: PositiveInt = 12
    mlp_ratio: PositiveFloat = 4
    hidden_act: Annotated[str, OneOf(*ACTIVATIONS)] = "gelu"
    layer_norm_eps: PositiveFloat = 1e-6
    image_size: Sides = 224
    patch_size: Sides = 14
    num_channels: PositiveInt = 3
    qkv_bias: bool = True
    use_swiglu_ffn: bool = False

    def contradiction(self) -> str | None:
        return undivided(self)

    @property
    def intermediate_size(self) -> int:
        return int(self.hidden_size * self.mlp_ratio)


class Hidden(NamedTuple):
    """hidden: (B, 1 + patches, D), the class token first."""

    hidden: mx.array


def stack(config: ViTConfig | Dinov2Config) -> Stack:
    """The layers of ViT or DINOv2."""
    heads, eps = config.num_attention_heads, config.layer_norm_eps
    activation = ACTIVATIONS[config.hidden_act]

    def feed_forward(w: Weights, t: Trainable, x: mx.array) -> mx.array:
        if "mlp.gate_proj.weight" in w:
            gated = silu(linear(w, "mlp.gate_proj", x, t)) * linear(w, "mlp.up_proj", x, t)
            return linear(w, "mlp.down_proj", gated, t)
        return linear(w, "mlp.fc2", activation(linear(w, "mlp.fc1", x, t)), t)

    def layer(w: Weights, t: Trainable, x: Hidden, context: None, mod: None, mask: None) -> Hidden:
        normed = layer_norm(x.hidden, eps, w, "norm1")
        q, k, v = (split_heads(linear(w, f"attention.{n}_proj", normed, t), heads) for n in "qkv")
        attended = merge_heads(attention(q, k, v, scale=1 / math.sqrt(q.shape[-1])))
        hidden = x.hidden + _scaled(w, "layer_scale1", linear(w, "attention.o_proj", attended, t))
        normed = layer_norm(hidden, eps, w, "norm2")
        return Hidden(hidden + _scaled(w, "layer_scale2", feed_forward(w, t, normed)))

    kind = BlockKind("vit", layer)
    return Stack(tuple(Block(f"encoder.layer.{i}.", kind) for i in range(config.num_hidden_layers)))


def _scaled(w: Weights, name: str, x: mx.array) -> mx.array:
    scale = w.get(f"{name}.lambda1")
    return x if scale is None else x * scale


def tokens(w: Weights, config: ViTConfig | Dinov2Config, pixels: mx.array) -> Hidden:
    """What goes into the first layer: pixels (B, H, W, 3), normalised. Of `w` only `embeddings.` is read."""
    patches, grid = patch_tokens(w, "embeddings.patch_embeddings.projection", pixels)
    batch, _, width = patches.shape
    first = mx.broadcast_to(w["embeddings.cls_token"].astype(patches.dtype), (batch, 1, width))
    table = positions(w["embeddings.position_embeddings"][0], grid_of(config), grid)
    return Hidden(mx.concatenate([first, patches], axis=1) + table)


def class_token(w: Weights, config: ViTConfig | Dinov2Config, state: Hidden) -> mx.array:
    """(B, D): the class token after the final norm. Of `w` only `layernorm.` is read."""
    return layer_norm(state.hidden[:, 0], config.layer_norm_eps, w, "layernorm")


def features(w: Weights, config: ViTConfig | Dinov2Config, pixels: mx.array) -> mx.array:
    """(B, D) from pixels (B, H, W, 3), in one graph, with all weights at hand: for training a small one."""
    state = tokens(w, config, pixels)
    for block in stack(config).blocks:
        inside = {name[len(block.prefix) :]: x for name, x in w.items() if name.startswith(block.prefix)}
        state = block.kind.apply(inside, {}, state, None, None, None)
    return class_token(w, config, state)
