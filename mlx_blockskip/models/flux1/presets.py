"""The configs of Black Forest Labs' checkpoints, so that they can be planned for before they are downloaded."""

from collections.abc import Mapping
from typing import Any

from mlx_blockskip.models.family import Configs


def _transformer(guidance: bool) -> dict[str, Any]:
    return {
        "_class_name": "FluxTransformer2DModel", "patch_size": 1, "in_channels": 64, "num_layers": 19,
        "num_single_layers": 38, "attention_head_dim": 128, "num_attention_heads": 24, "joint_attention_dim": 4096,
        "pooled_projection_dim": 768, "guidance_embeds": guidance, "axes_dims_rope": [16, 56, 56],
    }  # fmt: skip


CLIP_L = {
    "architectures": ["CLIPTextModel"], "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072,
    "num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 77, "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5, "eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 1, "projection_dim": 768,
}  # fmt: skip
T5_XXL = {
    "architectures": ["T5EncoderModel"], "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240,
    "num_layers": 24, "num_heads": 64, "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6, "feed_forward_proj": "gated-gelu", "is_gated_act": True, "dense_act_fn": "gelu_new",
    "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
VAE = {
    "_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "act_fn": "silu", "latent_channels": 16,
    "norm_num_groups": 32, "sample_size": 1024, "scaling_factor": 0.3611, "shift_factor": 0.1159,
    "use_quant_conv": False, "use_post_quant_conv": False, "mid_block_add_attention": True,
}  # fmt: skip


def _checkpoint(guidance: bool, dynamic: bool) -> Configs:
    scheduler = {
        "_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": dynamic, "base_image_seq_len": 256,
        "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15, "shift": 3.0 if dynamic else 1.0,
        "num_train_timesteps": 1000,
    }  # fmt: skip
    components = {"text_encoder": CLIP_L, "text_encoder_2": T5_XXL, "vae": VAE}
    return {"transformer": _transformer(guidance), **components, "scheduler": scheduler}


PRESETS: Mapping[str, Configs] = {
    "flux1-dev": _checkpoint(guidance=True, dynamic=True),
    "flux1-schnell": _checkpoint(guidance=False, dynamic=False),
}


def shallow(configs: Configs) -> Configs:
    """The same model with the fewest blocks that still hold one of each kind."""
    return {
        **configs,
        "transformer": {**configs["transformer"], "num_layers": 1, "num_single_layers": 1},
        "text_encoder": {**configs["text_encoder"], "num_hidden_layers": 1},
        "text_encoder_2": {**configs["text_encoder_2"], "num_layers": 1},
    }
