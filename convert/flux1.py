"""FLUX.1: what a checkpoint in Hugging Face layout holds, and the names its adapters have in diffusers and PEFT."""

from collections.abc import Mapping
from typing import Any

from mlx_blockskip.converters import flux1_files
from mlx_blockskip.converters.encoders import autoencoder_kl, block_of, clip_text, t5_encoder
from mlx_blockskip.converters.table import Component, Row, linear, norm
from mlx_blockskip.models.flux1.config import CONFIGS
from mlx_blockskip.models.flux1.transformer import FluxTransformer2DConfig

FOLDERS = tuple(CONFIGS)
"""Folders of networks."""

COPIED = ("tokenizer", "tokenizer_2", "scheduler")
"""Folders that are copied as they are."""

BASE = "black-forest-labs/FLUX.1-dev"
"""A repo that has what single files have not."""

FILES = flux1_files.FILES
"""Networks in single files, by folder."""

ADAPTER_PREFIX = "transformer."
"""What diffusers puts before a module's path in a LoRA file; the paths themselves are ours."""

ADAPTER_RULES = tuple(flux1_files.adapters())
"""Layers that LoRA files call otherwise."""

ADAPTER_FORMATS = dict.fromkeys(("comfyui", "kohya"), flux1_files.black_forest_labs(()))
"""Formats of LoRA files that call layers as Black Forest Labs do, with the rules that make their names ours."""


def components(configs: Mapping[str, Any]) -> list[Component]:
    """The components, from their configs (of CONFIGS) by folder."""
    return [
        transformer("transformer", configs["transformer"]),
        clip_text("text_encoder", configs["text_encoder"]),
        t5_encoder("text_encoder_2", configs["text_encoder_2"]),
        autoencoder_kl("vae", configs["vae"]),
    ]


def adapter_metadata(base: str) -> dict[str, str]:
    """What tools that keep LoRA files look for to tell what one is for. base: the base model's name."""
    kind = "schnell" if "schnell" in base.lower() else "dev"
    return {
        "modelspec.architecture": f"flux-1-{kind}/lora",
        "modelspec.implementation": "https://github.com/black-forest-labs/flux",
        "ss_base_model_version": "flux1",
        "ss_network_module": "networks.lora_flux",
    }


def transformer(folder: str, config: FluxTransformer2DConfig) -> Component:
    """diffusers FluxTransformer2DModel."""
    head = config.attention_head_dim
    width = head * config.num_attention_heads
    channels = config.in_channels
    rows = linear("x_embedder", width, channels, role="plain")
    rows += linear("context_embedder", width, config.joint_attention_dim, role="plain")
    embedders = [("timestep_embedder", 256), ("text_embedder", config.pooled_projection_dim)]
    if config.guidance_embeds:
        embedders.append(("guidance_embedder", 256))
    for name, inputs in embedders:
        rows += linear(f"time_text_embed.{name}.linear_1", width, inputs, role="plain")
        rows += linear(f"time_text_embed.{name}.linear_2", width, width, role="plain")
    for i in range(config.num_layers):
        rows += _double(f"transformer_blocks.{i}", width, head)
    for i in range(config.num_single_layers):
        rows += _single(f"single_transformer_blocks.{i}", width, head)
    rows += linear("norm_out.linear", 2 * width, width, role="plain")
    patch = config.patch_size**2
    rows += linear("proj_out", patch * (config.out_channels or channels), width, role="plain")
    return Component(folder, tuple(rows), lambda name: block_of(r"(single_)?transformer_blocks\.\d+\.", name))


def _double(name: str, width: int, head: int) -> list[Row]:
    rows: list[Row] = []
    for stream in ("norm1", "norm1_context"):
        rows += linear(f"{name}.{stream}.linear", 6 * width, width, role="modulation")
    for part in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
        rows += linear(f"{name}.attn.{part}", width, width)
    for part in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
        rows += norm(f"{name}.attn.{part}", head, bias=False)
    for stream in ("ff", "ff_context"):
        rows += linear(f"{name}.{stream}.net.0.proj", 4 * width, width)
        rows += linear(f"{name}.{stream}.net.2", width, 4 * width)
    return rows


def _single(name: str, width: int, head: int) -> list[Row]:
    rows = linear(f"{name}.norm.linear", 3 * width, width, role="modulation")
    for part in ("to_q", "to_k", "to_v"):
        rows += linear(f"{name}.attn.{part}", width, width)
    rows += norm(f"{name}.attn.norm_q", head, bias=False) + norm(f"{name}.attn.norm_k", head, bias=False)
    rows += linear(f"{name}.proj_mlp", 4 * width, width)
    return rows + linear(f"{name}.proj_out", width, 5 * width)
