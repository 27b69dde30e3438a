"""Small random FLUX.1 checkpoints made by diffusers and transformers, in Hugging Face layout."""

import shutil
from pathlib import Path

from support.models import assets

TRANSFORMER = {
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 128,
    "pooled_projection_dim": 128,
    "guidance_embeds": False,
    "axes_dims_rope": (4, 6, 6),
}


def random_transformer(**changes):
    """A FluxTransformer2DModel whose norms and biases are random too."""
    import torch
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    model = FluxTransformer2DModel(**{**TRANSFORMER, **changes}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def checkpoint(target: Path, **parts) -> Path:
    """tiny-flux with some components replaced: transformer=, vae=, text_encoder=, text_encoder_2= (models)."""
    shutil.copytree(assets() / "tiny-flux", target)
    for name, model in parts.items():
        shutil.rmtree(target / name)
        model.save_pretrained(target / name)
    return target
