"""FLUX.2: what a checkpoint in Hugging Face layout holds, and the names its adapters have in diffusers and PEFT."""

from collections.abc import Mapping
from typing import Any

from mlx_blockskip.converters import flux2_files
from mlx_blockskip.converters.encoders import autoencoder_kl_flux2, block_of, qwen3_decoder
from mlx_blockskip.converters.lora_export import Naming
from mlx_blockskip.converters.table import Component, Row, linear, norm
from mlx_blockskip.models.flux2.config import CONFIGS
from mlx_blockskip.models.flux2.transformer import Flux2Transformer2DConfig

FOLDERS = tuple(CONFIGS)
"""Folders of networks."""

COPIED = ("tokenizer", "scheduler")
"""Folders that are copied as they are."""

BASE = "black-forest-labs/FLUX.2-klein-base-4B"
"""A repo that has what single files have not."""

FILES = flux2_files.FILES
"""Networks in single files, by folder."""

ADAPTER_PREFIX = "transformer."
"""What diffusers puts before a module's path in a LoRA file; the paths themselves are ours."""

ADAPTER_RULES = tuple(flux2_files.black_forest_labs(()))
"""Layers that LoRA files call otherwise."""

ADAPTER_FORMATS = dict.fromkeys(("comfyui", "kohya"), ADAPTER_RULES)
"""Formats of LoRA files that call layers as Black Forest Labs do, with the rules that make their names ours."""

ADAPTER_NAMINGS = {"comfyui": Naming("diffusion_model.", factors=("lora_A", "lora_B"), alpha=False)}
"""As ai-toolkit saves them. In a file with `.lora_down` diffusers takes every name for one of kohya's, and passes over
those that are not.
"""


def components(configs: Mapping[str, Any]) -> list[Component]:
    """The components, from their configs (of CONFIGS) by folder."""
    return [
        transformer("transformer", configs["transformer"]),
        qwen3_decoder("text_encoder", configs["text_encoder"]),
        autoencoder_kl_flux2("vae", configs["vae"]),
    ]


def transformer(folder: str, config: Flux2Transformer2DConfig) -> Component:
    """diffusers Flux2Transformer2DModel. What modulates the blocks is outside of them, and no block's to quantize."""
    width, channels = config.width, config.in_channels
    rows = _plain("x_embedder", width, channels) + _plain("context_embedder", width, config.joint_attention_dim)
    for name in ("timestep_embedder", *(("guidance_embedder",) if config.guidance_embeds else ())):
        rows += _plain(f"time_guidance_embed.{name}.linear_1", width, config.timestep_guidance_channels)
        rows += _plain(f"time_guidance_embed.{name}.linear_2", width, width)
    for name, parts in (
        ("double_stream_modulation_img", 6),
        ("double_stream_modulation_txt", 6),
        ("single_stream_modulation", 3),
    ):
        rows += linear(f"{name}.linear", parts * width, width, bias=False, role="modulation")
    for i in range(config.num_layers):
        rows += _double(f"transformer_blocks.{i}", config)
    for i in range(config.num_single_layers):
        rows += _single(f"single_transformer_blocks.{i}", config)
    rows += _plain("norm_out.linear", 2 * width, width)
    rows += _plain("proj_out", config.patch_size**2 * (config.out_channels or channels), width)
    return Component(folder, tuple(rows), lambda name: block_of(r"(single_)?transformer_blocks\.\d+\.", name))


def _plain(name: str, out: int, inputs: int) -> list[Row]:
    return linear(name, out, inputs, bias=False, role="plain")


def _double(name: str, config: Flux2Transformer2DConfig) -> list[Row]:
    width, hidden, rows = config.width, config.hidden, []
    for part in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
        rows += linear(f"{name}.attn.{part}", width, width, bias=False)
    for part in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
        rows += norm(f"{name}.attn.{part}", config.attention_head_dim, bias=False)
    for stream in ("ff", "ff_context"):
        rows += linear(f"{name}.{stream}.linear_in", 2 * hidden, width, bias=False)
        rows += linear(f"{name}.{stream}.linear_out", width, hidden, bias=False)
    return rows


def _single(name: str, config: Flux2Transformer2DConfig) -> list[Row]:
    width, hidden, head = config.width, config.hidden, config.attention_head_dim
    rows = linear(f"{name}.attn.to_qkv_mlp_proj", 3 * width + 2 * hidden, width, bias=False)
    rows += norm(f"{name}.attn.norm_q", head, bias=False) + norm(f"{name}.attn.norm_k", head, bias=False)
    return rows + linear(f"{name}.attn.to_out", width, width + hidden, bias=False)
