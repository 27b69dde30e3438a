"""The configs of NVIDIA's checkpoints, so that they can be planned for before they are downloaded."""

from collections.abc import Mapping
from typing import Any

from mlx_blockskip.models.family import Configs

GEMMA_2_2B = {
    "architectures": ["Gemma2Model"], "model_type": "gemma2", "vocab_size": 256000, "hidden_size": 2304,
    "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4,
    "head_dim": 256, "query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
    "sliding_window": 4096, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False, "max_position_embeddings": 8192, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1,
}  # fmt: skip
BLOCKS = ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3
SCALES: list[list[int]] = [[], [], [], [5], [5], [5]]
VAE = {
    "_class_name": "AutoencoderDC", "in_channels": 3, "latent_channels": 32, "attention_head_dim": 32,
    "encoder_block_types": BLOCKS, "decoder_block_types": BLOCKS,
    "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "decoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "encoder_layers_per_block": [2, 2, 2, 3, 3, 3], "decoder_layers_per_block": [3] * 6,
    "encoder_qkv_multiscales": SCALES, "decoder_qkv_multiscales": SCALES, "downsample_block_type": "Conv",
    "upsample_block_type": "interpolate", "decoder_norm_types": "rms_norm", "decoder_act_fns": "silu",
    "scaling_factor": 0.41407,
}  # fmt: skip
DPM = {
    "_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True, "flow_shift": 3.0, "solver_order": 2,
    "prediction_type": "flow_prediction", "algorithm_type": "dpmsolver++", "num_train_timesteps": 1000,
}  # fmt: skip
CONSISTENCY = {"_class_name": "SCMScheduler", "num_train_timesteps": 1000, "prediction_type": "trigflow"}


def _checkpoint(layers: int, heads: int, cross_heads: int, *, normed: bool = False, sprint: bool = False) -> Configs:
    """heads: of 32 in the linear attention. normed: with the q/k norm of SANA 1.5 and Sprint."""
    width = 32 * heads
    transformer: dict[str, Any] = {
        "_class_name": "SanaTransformer2DModel", "in_channels": 32, "out_channels": 32, "num_layers": layers,
        "num_attention_heads": heads, "attention_head_dim": 32, "num_cross_attention_heads": cross_heads,
        "cross_attention_head_dim": width // cross_heads, "cross_attention_dim": width, "caption_channels": 2304,
        "mlp_ratio": 2.5, "attention_bias": False, "sample_size": 32, "patch_size": 1, "norm_eps": 1e-6,
        "norm_elementwise_affine": False, "interpolation_scale": None,
        "qk_norm": "rms_norm_across_heads" if normed else None, "guidance_embeds": sprint,
    }  # fmt: skip
    scheduler = CONSISTENCY if sprint else DPM
    return {"transformer": transformer, "text_encoder": GEMMA_2_2B, "vae": VAE, "scheduler": scheduler}


PRESETS: Mapping[str, Configs] = {
    "sana-0.6b": _checkpoint(28, 36, 16),
    "sana-1.6b": _checkpoint(20, 70, 20),
    "sana1.5-1.6b": _checkpoint(20, 70, 20, normed=True),
    "sana1.5-4.8b": _checkpoint(60, 70, 20, normed=True),
    "sana-sprint-0.6b": _checkpoint(28, 36, 16, normed=True, sprint=True),
    "sana-sprint-1.6b": _checkpoint(20, 70, 20, normed=True, sprint=True),
}


def shallow(configs: Configs) -> Configs:
    """The same model with one block in every stack."""
    return {
        **configs,
        "transformer": {**configs["transformer"], "num_layers": 1},
        "text_encoder": {**configs["text_encoder"], "num_hidden_layers": 1},
    }
