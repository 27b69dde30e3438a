"""CLIP's vision tower; its layers are those of the text tower, without a mask. Source: transformers CLIPVisionModel."""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from mlx_blockskip.engine.stack import Weights
from mlx_blockskip.models.layers import layer_norm
from mlx_blockskip.models.text.clip import Hidden, stack
from mlx_blockskip.models.vision.patches import grid_of, patch_tokens, positions

__all__ = ["Hidden", "class_token", "stack", "tokens"]


def tokens(w: Weights, config: Mapping[str, Any], pixels: mx.array) -> Hidden:
    """What goes into the first layer: pixels (B, H, W, 3), normalised. Of `w`: `embeddings.` and `pre_layrnorm.`."""
    patches, grid = patch_tokens(w, "embeddings.patch_embedding", pixels)
    batch, _, width = patches.shape
    first = mx.broadcast_to(w["embeddings.class_embedding"].astype(patches.dtype), (batch, 1, width))
    table = positions(w["embeddings.position_embedding.weight"], grid_of(config), grid)
    hidden = mx.concatenate([first, patches], axis=1) + table
    return Hidden(layer_norm(hidden, config["layer_norm_eps"], w, "pre_layrnorm"))


def class_token(w: Weights, config: Mapping[str, Any], state: Hidden) -> mx.array:
    """(B, D): the class token after the final norm, not projected. Of `w` only `post_layernorm.` is read."""
    return layer_norm(state.hidden[:, 0], config["layer_norm_eps"], w, "post_layernorm")
