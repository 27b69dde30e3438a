"""Small random Z-Image checkpoints in Hugging Face layout: made by diffusers and transformers, and without them."""

import shutil
from pathlib import Path

import mlx.core as mx

from mlx_blockskip.converters import z_image
from mlx_blockskip.engine import files, philox
from support.flux2 import TEXT as SMALL_TEXT
from support.flux2 import VAE, random_text_encoder, shaken
from support.models import assets

TRANSFORMER = {
    **{"in_channels": 4, "dim": 48, "n_layers": 5, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2},
    **{"cap_feat_dim": 24, "axes_dims": (8, 8, 8), "axes_lens": (128, 32, 32)},
}
TEXT = {**SMALL_TEXT, "num_hidden_layers": 2}
DEFAULTS = {
    **{"resolution": 64, "train_resolution": 32, "width": 32, "height": 32, "max_sequence_length": 64, "steps": 3},
    "rank": 2,
}
SHIFT = {False: 6.0, True: 3.0}
"""Of the base model's scheduler, and of Turbo's."""


def scheduler(turbo: bool) -> dict:
    return {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": False, "shift": SHIFT[turbo]}


def checkpoint(target: Path, turbo: bool = False) -> Path:
    """A checkpoint with defaults of its own size, made of the converter's table without torch and diffusers."""
    configs = {"transformer": TRANSFORMER, "text_encoder": {"model_type": "qwen3", **TEXT}, "vae": VAE}
    parsed = {folder: z_image.CONFIGS[folder].from_dict(config) for folder, config in configs.items()}
    for number, component in enumerate(z_image.components(parsed)):
        folder, tensors = target / component.folder, {}
        for i, row in enumerate(component.rows):
            shape = row.their_shape()
            noise = mx.array(philox.normal(13 + turbo, number, i, shape=shape))
            if len(shape) > 1 and not row.name.endswith("pad_token"):
                tensors[row.name] = noise * ((2.0 if "final_layer" in row.name else 1.0) / row.shape[-1] ** 0.5)
            else:
                tensors[row.name] = noise / 8 + (0 if row.name.endswith(("bias", "pad_token")) else 1)
        folder.mkdir(parents=True)
        files.save_tensors(folder / "model.safetensors", tensors)
        files.write_json(folder / "config.json", configs[component.folder])
    shutil.copytree(assets() / "chat-tokenizer" / "tokenizer", target / "tokenizer")
    files.write_json(target / "scheduler" / "scheduler_config.json", scheduler(turbo))
    index = {"_class_name": "ZImagePipeline", "text_encoder": ["transformers", "Qwen3Model"]}
    index |= {"transformer": ["diffusers", "ZImageTransformer2DModel"], "vae": ["diffusers", "AutoencoderKL"]}
    files.write_json(target / "model_index.json", index)
    files.write_json(target / "defaults.json", DEFAULTS)
    return target


def random_transformer(**changes):
    """A ZImageTransformer2DModel whose norms, biases and tokens that fill up are random too."""
    import torch
    from diffusers import ZImageTransformer2DModel

    torch.manual_seed(0)
    model = shaken(ZImageTransformer2DModel(**{**TRANSFORMER, "n_layers": 2, **changes}))
    with torch.no_grad():
        model.x_pad_token.normal_()
        model.cap_pad_token.normal_()
    return model


def random_autoencoder(**changes):
    """An AutoencoderKL with a scale and a shift."""
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(1)
    given = {**VAE, "scaling_factor": 0.6, "shift_factor": 0.1, "use_quant_conv": False, "use_post_quant_conv": False}
    return shaken(AutoencoderKL(**{**given, **changes}), 0.1)


def random_pipeline(target: Path, turbo: bool = False, **parts):
    """A ZImagePipeline of random weights, saved as a checkpoint; parts replaces some (transformer=, vae= ...)."""
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline
    from transformers import AutoTokenizer

    made = {
        "transformer": parts.get("transformer") or random_transformer(),
        "vae": parts.get("vae") or random_autoencoder(),
        "text_encoder": parts.get("text_encoder") or random_text_encoder(num_hidden_layers=2).model,
        "tokenizer": AutoTokenizer.from_pretrained(assets() / "chat-tokenizer" / "tokenizer"),
        "scheduler": FlowMatchEulerDiscreteScheduler.from_config(scheduler(turbo)),
    }
    pipe = ZImagePipeline(**made)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(target)
    return pipe
