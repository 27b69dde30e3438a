"""Small random image encoders made by transformers, in Hugging Face layout, and pictures for them."""

import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from mlx_blockskip.engine import files
from support.models import assets

VIT = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "image_size": 32, "patch_size": 8}
CLIP_VISION = {**VIT, "intermediate_size": 40}
CLIP_TEXT = {"vocab_size": 2222, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
PROCESSORS = {
    "vit": {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}},
    "dinov2": {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": 36},
        "crop_size": {"height": 32, "width": 32},
    },
    "clip": {"feature_extractor_type": "CLIPFeatureExtractor", "size": 32, "crop_size": 32},
}


def random_encoder(kind: str, **changes):
    """A ViTModel, Dinov2Model or CLIPModel whose norms, biases and scales are random too."""
    import torch
    from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model, ViTConfig, ViTModel

    torch.manual_seed(0)
    if kind == "vit":
        model = ViTModel(ViTConfig(**{**VIT, "intermediate_size": 40, **changes}))
    elif kind == "dinov2":
        model = Dinov2Model(Dinov2Config(**{**VIT, "mlp_ratio": 2, **changes}))
    else:
        act, projection = changes.get("hidden_act", "quick_gelu"), changes.get("projection_dim", 20)
        text = {**CLIP_TEXT, "num_attention_heads": 4, "hidden_act": act, "eos_token_id": changes.get("eos", 2221)}
        vision = {**CLIP_VISION, "hidden_act": act}
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=projection))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0).add_(torch.randn_like(parameter) * (0.2 if parameter.ndim == 1 else 0.02))
    return model.eval()


def save(model, target: Path, kind: str, processor: dict | None = None, **options) -> Path:
    """The model as a checkpoint: weights, preprocessing and, for CLIP, tiny-clip's tokenizer."""
    model.save_pretrained(target, **options)
    files.write_json(target / "preprocessor_config.json", PROCESSORS[kind] if processor is None else processor)
    if kind == "clip":
        for name in TOKENIZER:
            shutil.copy(assets() / "tiny-clip" / name, target / name)
    return target


def pictures(*sizes: tuple[int, int]) -> list[Image.Image]:
    """Smooth colours with noise on them, one picture a (width, height)."""
    found = []
    for number, (width, height) in enumerate(sizes or ((48, 48), (70, 41), (40, 90), (20, 33))):
        generator = np.random.default_rng(number)
        coarse = Image.fromarray(generator.integers(0, 256, (5, 5, 3)).astype(np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int64)
        noise = generator.integers(-20, 20, smooth.shape)
        found.append(Image.fromarray(np.clip(smooth + noise, 0, 255).astype(np.uint8)))
    return found
