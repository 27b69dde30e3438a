"""CLIP's vision tower; its layers are those of the text tower, without a mask. Source: transformers CLIPVisionModel."""

from dataclasses import dataclass

import mlx.core as mx

from mlx_blockskip.engine.stack import Weights
from mlx_blockskip.models.config import Config, NonNegativeInt, PositiveFloat, PositiveInt
from mlx_blockskip.models.layers import layer_norm
from mlx_blockskip.models.text.clip import Activation, Hidden, stack, undivided
from mlx_blockskip.models.vision.patches import Sides, grid_of, patch_tokens, positions

__all__ = ["Hidden", "class_token", "stack", "tokens"]


@dataclass(frozen=True)
class CLIPVisionConfig(Config):
    """Source: transformers CLIPVisionConfig."""

    hidden_size: PositiveInt = 768
    intermediate_size: PositiveInt = 3072
    num_hidden_layers: NonNegativeInt = 12
    num_attention_heads: PositiveInt = 12
    num_channels: PositiveInt = 3
    image_size: Sides = 224
    patch_size: Sides = 32
    hidden_act: Activation = "quick_gelu"
    layer_norm_eps: PositiveFloat = 1e-5

    def contradiction(self) -> str | None:
        return undivided(self)


@dataclass(frozen=True)
class CLIPConfig(Config):
    """What lies beside the configs of both towers. Source: transformers CLIPConfig."""

    projection_dim: PositiveInt = 512


def tokens(w: Weights, config: CLIPVisionConfig, pixels: mx.array) -> Hidden:
    """What goes into the first layer: pixels (B, H, W, 3), normalised. Of `w`: `embeddings.` and `pre_layrnorm.`."""
    patches, grid = patch_tokens(w, "embeddings.patch_embedding", pixels)
    batch, _, width = patches.shape
    first = mx.broadcast_to(w["embeddings.class_embedding"].astype(patches.dtype), (batch, 1, width))
    table = positions(w["embeddings.position_embedding.weight"], grid_of(config), grid)
    hidden = mx.concatenate([first, patches], axis=1) + table
    return Hidden(layer_norm(hidden, config.layer_norm_eps, w, "pre_layrnorm"))


def class_token(w: Weights, config: CLIPVisionConfig, state: Hidden) -> mx.array:
    """(B, D): the class token after the final norm, not projected. Of `w` only `post_layernorm.` is read."""
    return layer_norm(state.hidden[:, 0], config.layer_norm_eps, w, "post_layernorm")
