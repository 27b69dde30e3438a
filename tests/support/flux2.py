"""Small random FLUX.2 checkpoints in Hugging Face layout: made by diffusers and transformers, and without them."""

import shutil
from pathlib import Path

import mlx.core as mx

from mlx_blockskip.converters import flux2
from mlx_blockskip.engine import files, philox
from support.models import assets

TRANSFORMER = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 72,
    "timestep_guidance_channels": 32,
    "guidance_embeds": False,
    "axes_dims_rope": (4, 4, 4, 4),
}
TEXT = {
    **{"vocab_size": 264, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 4, "head_dim": 8},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512},
}
VAE = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    "latent_channels": 4,
    "layers_per_block": 1,
}
TAPS = (1, 2, 3)
"""Of a text encoder with four layers, as 9, 18 and 27 are of one with 36."""


DEFAULTS = {
    **{"resolution": 64, "train_resolution": 32, "width": 32, "height": 32, "max_sequence_length": 40, "steps": 3},
    "rank": 2,
}


def checkpoint(target: Path, distilled: bool = False) -> Path:
    """A checkpoint with defaults of its own size, made of the converter's table without torch and diffusers."""
    seed = 12 if distilled else 11
    configs = {"transformer": TRANSFORMER, "text_encoder": {"model_type": "qwen3", **TEXT}, "vae": VAE}
    parsed = {folder: flux2.CONFIGS[folder].from_dict(config) for folder, config in configs.items()}
    for number, component in enumerate(flux2.components(parsed)):
        folder, tensors = target / component.folder, {}
        for i, row in enumerate(component.rows):
            shape = row.their_shape()
            noise = mx.array(philox.normal(seed, number, i, shape=shape))
            if len(shape) > 1:
                strength = 4.0 if "modulation" in row.name or row.name == "proj_out.weight" else 0.7
                tensors[row.name] = noise * (strength / row.shape[-1] ** 0.5)  # adapters are to be seen in pictures
            else:
                tensors[row.name] = noise / 8 + (0 if row.name.endswith("bias") else 1)
        folder.mkdir(parents=True)
        files.save_tensors(folder / "model.safetensors", tensors)
        files.write_json(folder / "config.json", configs[component.folder])
    for name in flux2.COPIED:
        shutil.copytree(assets() / "chat-tokenizer" / name, target / name)
    index = {"_class_name": "Flux2KleinPipeline", "is_distilled": distilled, "text_encoder": ["transformers", ""]}
    index |= {name: ["diffusers", ""] for name in ("transformer", "vae")}
    files.write_json(target / "model_index.json", index)
    files.write_json(target / "defaults.json", DEFAULTS)
    return target


def shaken(model, by: float = 0.2):
    """The model with norms and biases that are random too."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * by)
    return model.eval()


def random_transformer(**changes):
    """A Flux2Transformer2DModel whose norms are random too, and whose blocks matter to what comes out."""
    import torch
    from diffusers import Flux2Transformer2DModel

    torch.manual_seed(0)
    model = shaken(Flux2Transformer2DModel(**{**TRANSFORMER, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modulation" in name:
                parameter.mul_(4)
    return model


def random_autoencoder(**changes):
    """An AutoencoderKLFlux2 whose statistics are random too."""
    import torch
    from diffusers import AutoencoderKLFlux2

    torch.manual_seed(1)
    model = shaken(AutoencoderKLFlux2(**{**VAE, **changes}), 0.1)
    with torch.no_grad():
        model.bn.running_mean.normal_()
        model.bn.running_var.uniform_(0.5, 2.0)
    return model


def random_text_encoder(**changes):
    """A Qwen3ForCausalLM whose norms are random too."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(2)
    return shaken(Qwen3ForCausalLM(Qwen3Config(**{**TEXT, **changes})))


def random_pipeline(target: Path, distilled: bool = False, **parts):
    """A Flux2KleinPipeline of random weights, saved as a checkpoint; parts replaces some (transformer=, vae= ...)."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline
    from transformers import AutoTokenizer

    made = {
        "transformer": parts.get("transformer") or random_transformer(),
        "vae": parts.get("vae") or random_autoencoder(),
        "text_encoder": parts.get("text_encoder") or random_text_encoder(),
        "tokenizer": AutoTokenizer.from_pretrained(assets() / "chat-tokenizer" / "tokenizer"),
        "scheduler": FlowMatchEulerDiscreteScheduler.from_pretrained(assets() / "chat-tokenizer" / "scheduler"),
    }
    pipe = Flux2KleinPipeline(**made, is_distilled=distilled)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(target)
    return pipe
