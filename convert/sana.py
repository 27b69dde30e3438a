"""SANA: what a checkpoint in Hugging Face layout holds, and the names its adapters have in diffusers and PEFT."""

from collections.abc import Mapping
from typing import Any

from mlx_blockskip.converters import sana_files
from mlx_blockskip.converters.encoders import autoencoder_dc, block_of, gemma2_encoder
from mlx_blockskip.converters.table import Component, Row, conv, linear, norm
from mlx_blockskip.models.sana.config import CONFIGS
from mlx_blockskip.models.sana.transformer import SanaTransformer2DConfig

FOLDERS = tuple(CONFIGS)
"""Folders of networks."""

COPIED = ("tokenizer", "scheduler")
"""Folders that are copied as they are."""

BASE = "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers"
"""A repo that has what single files have not."""

FILES = sana_files.FILES
"""Networks in single files, by folder."""

ADAPTER_PREFIX = "transformer."
"""What diffusers puts before a module's path in a LoRA file; the paths themselves are ours."""

ADAPTER_POINTWISE = ("ff.conv_inverted", "ff.conv_point")
"""Modules that are linear here and 1 x 1 convolutions there: PEFT stores both factors with two axes more."""

ADAPTER_RULES = (*sana_files.nvidia(()), *sana_files.nvidia(("cfg_embedder.",)))
"""Layers that LoRA files call otherwise: in the names of NVIDIA's own code, and of SANA-Sprint's embedders."""


def components(configs: Mapping[str, Any]) -> list[Component]:
    """The components, from their configs (of CONFIGS) by folder."""
    return [
        transformer("transformer", configs["transformer"]),
        gemma2_encoder("text_encoder", configs["text_encoder"]),
        autoencoder_dc("vae", configs["vae"]),
    ]


def transformer(folder: str, config: SanaTransformer2DConfig) -> Component:
    """diffusers SanaTransformer2DModel."""
    width = config.attention_head_dim * config.num_attention_heads
    channels, patch = config.in_channels, config.patch_size
    if patch == 1:
        rows = linear("patch_embed.proj", width, channels, role="plain", fix="pointwise")
    else:
        rows = conv("patch_embed.proj", width, channels, patch)
    guided = config.guidance_embeds
    embedders = ("timestep_embedder", "guidance_embedder") if guided else ("emb.timestep_embedder",)
    for name in embedders:
        rows += linear(f"time_embed.{name}.linear_1", width, 256, role="plain")
        rows += linear(f"time_embed.{name}.linear_2", width, width, role="plain")
    rows += linear("time_embed.linear", 6 * width, width, role="plain")
    rows += linear("caption_projection.linear_1", width, config.caption_channels, role="plain")
    rows += linear("caption_projection.linear_2", width, width, role="plain")
    rows += norm("caption_norm", width, bias=False)
    for i in range(config.num_layers):
        rows += _block(f"transformer_blocks.{i}", width, config)
    rows.append(Row("scale_shift_table", (2, width)))
    rows += linear("proj_out", patch**2 * (config.out_channels or channels), width, role="plain")
    return Component(folder, tuple(rows), lambda name: block_of(r"transformer_blocks\.\d+\.", name))


def _block(name: str, width: int, config: SanaTransformer2DConfig) -> list[Row]:
    cross = config.num_cross_attention_heads * config.cross_attention_head_dim
    text, hidden = config.cross_attention_dim, int(config.mlp_ratio * width)
    rows = [Row(f"{name}.scale_shift_table", (6, width))]
    for part in ("to_q", "to_k", "to_v"):
        rows += linear(f"{name}.attn1.{part}", width, width, bias=config.attention_bias)
    rows += linear(f"{name}.attn1.to_out.0", width, width)
    rows += linear(f"{name}.attn2.to_q", cross, width)
    rows += linear(f"{name}.attn2.to_k", cross, text) + linear(f"{name}.attn2.to_v", cross, text)
    rows += linear(f"{name}.attn2.to_out.0", width, cross)
    if config.qk_norm is not None:
        for attention, inner in (("attn1", width), ("attn2", cross)):
            rows += norm(f"{name}.{attention}.norm_q", inner, bias=False)
            rows += norm(f"{name}.{attention}.norm_k", inner, bias=False)
    if config.norm_elementwise_affine:
        rows += norm(f"{name}.norm2", width)
    rows += linear(f"{name}.ff.conv_inverted", 2 * hidden, width, fix="pointwise")
    rows += conv(f"{name}.ff.conv_depth", 2 * hidden, 1, 3)
    return rows + linear(f"{name}.ff.conv_point", width, hidden, bias=False, fix="pointwise")
