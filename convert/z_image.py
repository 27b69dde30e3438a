"""Z-Image: what a checkpoint in Hugging Face layout holds, and the names its adapters have in diffusers and PEFT."""

from collections.abc import Mapping
from typing import Any

from mlx_blockskip.converters import z_image_files
from mlx_blockskip.converters.encoders import autoencoder_kl, block_of, qwen3_decoder
from mlx_blockskip.converters.lora_export import Naming
from mlx_blockskip.converters.table import Component, Row, linear, norm
from mlx_blockskip.models.z_image.config import CONFIGS
from mlx_blockskip.models.z_image.transformer import (
    EMBEDDER,
    FINAL,
    MODULATION,
    PATCH,
    TIME_HIDDEN,
    WAVES,
    ZImageTransformer2DConfig,
)

FOLDERS = tuple(CONFIGS)
"""Folders of networks."""

COPIED = ("tokenizer", "scheduler")
"""Folders that are copied as they are."""

BASE = "Tongyi-MAI/Z-Image"
"""A repo that has what single files have not."""

FILES = z_image_files.FILES
"""Networks in single files, by folder."""

ADAPTER_PREFIX = "transformer."
"""What diffusers puts before a module's path in a LoRA file; the paths themselves are ours."""

ADAPTER_RULES = tuple(z_image_files.tongyi(()))
"""Layers that LoRA files call otherwise."""

ADAPTER_FORMATS = {
    "comfyui": tuple(z_image_files.unchanged(("to_q", "to_k", "to_v", "to_out.0"))),
    "kohya": (*ADAPTER_RULES, *z_image_files.unchanged(())),
}
"""Formats of LoRA files, with the rules that make their names ours. ComfyUI takes both namings, and diffusers only its
own after `diffusion_model.`.
"""

ADAPTER_NAMINGS = {"comfyui": Naming("diffusion_model.", factors=("lora_A", "lora_B"), alpha=False)}
"""As ai-toolkit saves them."""


def components(configs: Mapping[str, Any]) -> list[Component]:
    """The components, from their configs (of CONFIGS) by folder."""
    return [
        transformer("transformer", configs["transformer"]),
        qwen3_decoder("text_encoder", configs["text_encoder"]),
        autoencoder_kl("vae", configs["vae"]),
    ]


def transformer(folder: str, config: ZImageTransformer2DConfig) -> Component:
    """diffusers ZImageTransformer2DModel."""
    width, patch = config.dim, PATCH**2 * config.in_channels
    rows = linear(EMBEDDER, width, patch, role="plain")
    rows += linear("t_embedder.mlp.0", TIME_HIDDEN, WAVES, role="plain")
    rows += linear("t_embedder.mlp.2", config.time_width, TIME_HIDDEN, role="plain")
    rows += norm("cap_embedder.0", config.cap_feat_dim, bias=False)
    rows += linear("cap_embedder.1", width, config.cap_feat_dim, role="plain")
    rows += [Row("x_pad_token", (1, width)), Row("cap_pad_token", (1, width))]
    for i in range(config.n_refiner_layers):
        rows += _block(f"noise_refiner.{i}", config)
        rows += _block(f"context_refiner.{i}", config, modulated=False)
    for i in range(config.n_layers):
        rows += _block(f"layers.{i}", config)
    rows += linear(f"{FINAL}.adaLN_modulation.1", width, config.time_width, role="plain")
    rows += linear(f"{FINAL}.linear", patch, width, role="plain")
    return Component(folder, tuple(rows), lambda name: block_of(r"(layers|noise_refiner|context_refiner)\.\d+\.", name))


def _block(name: str, config: ZImageTransformer2DConfig, modulated: bool = True) -> list[Row]:
    width, rows = config.dim, []
    for part in ("to_q", "to_k", "to_v", "to_out.0"):
        rows += linear(f"{name}.attention.{part}", width, width, bias=False)
    for part in ("norm_q", "norm_k") if config.qk_norm else ():
        rows += norm(f"{name}.attention.{part}", config.head_dim, bias=False)
    for part, (out, inputs) in {"w1": (config.hidden, width), "w2": (width, config.hidden)}.items():
        rows += linear(f"{name}.feed_forward.{part}", out, inputs, bias=False)
    rows += linear(f"{name}.feed_forward.w3", config.hidden, width, bias=False)
    for part in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
        rows += norm(f"{name}.{part}", width, bias=False)
    if modulated:
        rows += linear(f"{name}.{MODULATION}", 4 * width, config.time_width, role="modulation")
    return rows
