"""DINO's and DINOv2's vision transformer as a stack. Sources: transformers ViTModel (without pooler), Dinov2Model.

Both go by the names of Dinov2Model's modules. What only some have follows from the weights: biases of q, k, v,
`layer_scale1` and `layer_scale2`, and `mlp.gate_proj` (SwiGLU) in place of `mlp.fc1`.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.engine.stack import Block, BlockKind, Stack, Trainable, Weights
from mlx_blockskip.models.attention import attention
from mlx_blockskip.models.layers import gelu_tanh, layer_norm, linear, merge_heads, quick_gelu, silu, split_heads
from mlx_blockskip.models.vision.patches import grid_of, patch_tokens, positions

ACTIVATIONS = {"gelu": nn.gelu, "gelu_new": gelu_tanh, "quick_gelu": quick_gelu, "relu": nn.relu, "silu": silu}


class Hidden(NamedTuple):
    """hidden: (B, 1 + patches, D), the class token first."""

    hidden: mx.array


def stack(config: Mapping[str, Any]) -> Stack:
    """The layers of a ViT or DINOv2 config. Raises UserError for an activation that is not implemented."""
    heads, eps = config["num_attention_heads"], config["layer_norm_eps"]
    activation = ACTIVATIONS.get(config["hidden_act"])
    if activation is None:
        raise UserError(f"ViT: hidden_act {config['hidden_act']!r} is not implemented; use {', '.join(ACTIVATIONS)}")

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
    return Stack(tuple(Block(f"encoder.layer.{i}.", kind) for i in range(config["num_hidden_layers"])))


def _scaled(w: Weights, name: str, x: mx.array) -> mx.array:
    scale = w.get(f"{name}.lambda1")
    return x if scale is None else x * scale


def tokens(w: Weights, config: Mapping[str, Any], pixels: mx.array) -> Hidden:
    """What goes into the first layer: pixels (B, H, W, 3), normalised. Of `w` only `embeddings.` is read."""
    patches, grid = patch_tokens(w, "embeddings.patch_embeddings.projection", pixels)
    batch, _, width = patches.shape
    first = mx.broadcast_to(w["embeddings.cls_token"].astype(patches.dtype), (batch, 1, width))
    table = positions(w["embeddings.position_embeddings"][0], grid_of(config), grid)
    return Hidden(mx.concatenate([first, patches], axis=1) + table)


def class_token(w: Weights, config: Mapping[str, Any], state: Hidden) -> mx.array:
    """(B, D): the class token after the final norm. Of `w` only `layernorm.` is read."""
    return layer_norm(state.hidden[:, 0], config["layer_norm_eps"], w, "layernorm")


def features(w: Weights, config: Mapping[str, Any], pixels: mx.array) -> mx.array:
    """(B, D) from pixels (B, H, W, 3), in one graph, with all weights at hand: for training a small one."""
    state = tokens(w, config, pixels)
    for block in stack(config).blocks:
        inside = {name[len(block.prefix) :]: x for name, x in w.items() if name.startswith(block.prefix)}
        state = block.kind.apply(inside, {}, state, None, None, None)
    return class_token(w, config, state)
