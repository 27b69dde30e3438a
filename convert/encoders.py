"""Rows of the networks that families share: text encoders, AutoencoderKL and DC-AE."""

import math
import re
from dataclasses import replace

from mlx_blockskip.converters.table import Component, Row, conv, linear, norm
from mlx_blockskip.models.text.clip import CLIPTextConfig, Layers
from mlx_blockskip.models.text.gemma2 import Gemma2Config
from mlx_blockskip.models.text.lm import PREFIX, Qwen3Config
from mlx_blockskip.models.text.t5 import T5Config
from mlx_blockskip.models.vae import dc_ae
from mlx_blockskip.models.vae.dc_ae import AutoencoderDCConfig
from mlx_blockskip.models.vae.kl import AutoencoderKLConfig
from mlx_blockskip.models.vae.kl_flux2 import STATISTICS, AutoencoderKLFlux2Config

NEVER_FLOAT16 = {"float16": "bfloat16"}
"""T5, Gemma-2 and the VAEs overflow in float16, and the states of a language model may."""


def block_of(pattern: str, name: str) -> str | None:
    """The part of `name` that `pattern` matches, as a block's prefix."""
    match = re.match(pattern, name)
    return match.group(0) if match else None


def clip_layers(config: Layers) -> list[Row]:
    """The layers of either of CLIP's towers."""
    width, inner = config.hidden_size, config.intermediate_size
    rows: list[Row] = []
    for i in range(config.num_hidden_layers):
        layer = f"encoder.layers.{i}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            rows += linear(f"{layer}.self_attn.{part}", width, width)
        rows += norm(f"{layer}.layer_norm1", width) + norm(f"{layer}.layer_norm2", width)
        rows += linear(f"{layer}.mlp.fc1", inner, width) + linear(f"{layer}.mlp.fc2", width, inner)
    return rows


def clip_text(folder: str, config: CLIPTextConfig) -> Component:
    """transformers CLIPTextModel; checkpoints before transformers 5 put `text_model.` before every name."""
    width = config.hidden_size
    rows = [
        Row("embeddings.token_embedding.weight", (config.vocab_size, width)),
        Row("embeddings.position_embedding.weight", (config.max_position_embeddings, width)),
        *norm("final_layer_norm", width),
        *clip_layers(config),
    ]
    return Component(
        folder,
        tuple(replace(row, aliases=(f"text_model.{row.name}",)) for row in rows),
        block=lambda name: block_of(r"encoder\.layers\.\d+\.", name),
        ignored=lambda name: name.endswith("position_ids") or name in ("text_projection.weight", "logit_scale"),
    )


def t5_encoder(folder: str, config: T5Config) -> Component:
    """transformers T5EncoderModel; the embedding may be stored under either of its two names, or both."""
    width, inner, heads = config.d_model, config.d_ff, config.num_heads
    attention = heads * config.d_kv
    gated = config.gated
    rows = [
        Row("shared.weight", (config.vocab_size, width), aliases=("encoder.embed_tokens.weight",)),
        *norm("encoder.final_layer_norm", width, bias=False),
        Row(
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            (config.relative_attention_num_buckets, heads),
        ),
    ]
    for i in range(config.num_layers):
        layer = f"encoder.block.{i}.layer"
        for part in "qkv":
            rows += linear(f"{layer}.0.SelfAttention.{part}", attention, width, bias=False)
        rows += linear(f"{layer}.0.SelfAttention.o", width, attention, bias=False)
        for part in ("wi_0", "wi_1") if gated else ("wi",):
            rows += linear(f"{layer}.1.DenseReluDense.{part}", inner, width, bias=False)
        rows += linear(f"{layer}.1.DenseReluDense.wo", width, inner, bias=False)
        rows += norm(f"{layer}.0.layer_norm", width, bias=False) + norm(f"{layer}.1.layer_norm", width, bias=False)
    return Component(
        folder,
        tuple(rows),
        block=lambda name: None if "relative" in name else block_of(r"encoder\.block\.\d+\.", name),
        ignored=lambda name: name == "encoder.embed_tokens.weight",
        dtypes=NEVER_FLOAT16,
    )


def _self_attention(layer: str, config: Gemma2Config | Qwen3Config) -> list[Row]:
    """The projections of a decoder's layer, with fewer heads for keys and values."""
    width, bias = config.hidden_size, config.attention_bias
    queries, keys = (config.head_dim * heads for heads in (config.num_attention_heads, config.num_key_value_heads))
    rows: list[Row] = []
    for part, out in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
        rows += linear(f"{layer}.self_attn.{part}", out, width, bias=bias)
    return rows + linear(f"{layer}.self_attn.o_proj", width, queries, bias=bias)


def _gated_mlp(layer: str, config: Gemma2Config | Qwen3Config) -> list[Row]:
    width, inner = config.hidden_size, config.intermediate_size
    rows: list[Row] = []
    for part in ("gate_proj", "up_proj"):
        rows += linear(f"{layer}.mlp.{part}", inner, width, bias=False)
    return rows + linear(f"{layer}.mlp.down_proj", width, inner, bias=False)


def gemma2_encoder(folder: str, config: Gemma2Config) -> Component:
    """transformers Gemma2Model; a Gemma2ForCausalLM puts `model.` before every name, and may have a head."""
    width = config.hidden_size
    rows = [Row("embed_tokens.weight", (config.vocab_size, width)), *norm("norm", width, bias=False)]
    for i in range(config.num_hidden_layers):
        layer = f"layers.{i}"
        rows += _self_attention(layer, config)
        rows += _gated_mlp(layer, config)
        for part in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            rows += norm(f"{layer}.{part}_layernorm", width, bias=False)
    return Component(
        folder,
        tuple(replace(row, aliases=(f"model.{row.name}",)) for row in rows),
        block=lambda name: block_of(r"layers\.\d+\.", name),
        ignored=lambda name: name == "lm_head.weight",
        dtypes=NEVER_FLOAT16,
    )


def qwen3_decoder(folder: str, config: Qwen3Config) -> Component:
    """transformers Qwen3ForCausalLM without its head; a Qwen3Model has the same names without `model.` before them."""
    width, head = config.hidden_size, config.head_dim
    rows = [Row("embed_tokens.weight", (config.vocab_size, width)), *norm("norm", width, bias=False)]
    for i in range(config.num_hidden_layers):
        layer = f"layers.{i}"
        rows += _self_attention(layer, config)
        rows += norm(f"{layer}.self_attn.q_norm", head, bias=False) + norm(
            f"{layer}.self_attn.k_norm", head, bias=False
        )
        rows += _gated_mlp(layer, config)
        for part in ("input", "post_attention"):
            rows += norm(f"{layer}.{part}_layernorm", width, bias=False)
    return Component(
        folder,
        tuple(replace(row, name=f"{PREFIX}{row.name}", aliases=(row.name,)) for row in rows),
        block=lambda name: block_of(r"model\.layers\.\d+\.", name),
        ignored=lambda name: name == "lm_head.weight",
        dtypes=NEVER_FLOAT16,
    )


def autoencoder_kl(folder: str, config: AutoencoderKLConfig) -> Component:
    """diffusers AutoencoderKL; older checkpoints name the attention's layers query, key, value, proj_attn."""
    rows = _kl_rows(config, config.block_out_channels)
    return Component(folder, tuple(rows), block=lambda name: None, dtypes=NEVER_FLOAT16)


def autoencoder_kl_flux2(folder: str, config: AutoencoderKLFlux2Config) -> Component:
    """diffusers AutoencoderKLFlux2: with the statistics of its patches, and perhaps a narrower decoder."""
    rows = _kl_rows(config, config.decoder_widths)
    rows += [Row(name, (math.prod(config.patch_size) * config.latent_channels,)) for name in STATISTICS]
    return Component(
        folder,
        tuple(rows),
        block=lambda name: None,
        ignored=lambda name: name == "bn.num_batches_tracked",
        dtypes=NEVER_FLOAT16,
    )


def _kl_rows(config: AutoencoderKLConfig | AutoencoderKLFlux2Config, decoder: tuple[int, ...]) -> list[Row]:
    """decoder: its widths, where those of the encoder are `block_out_channels`."""
    widths, per_level, latent = config.block_out_channels, config.layers_per_block, config.latent_channels
    attends, top, last = config.mid_block_add_attention, widths[-1], decoder[-1]
    rows = conv("encoder.conv_in", widths[0], config.in_channels, 3)
    before = widths[0]
    for i, width in enumerate(widths):
        for j in range(per_level):
            rows += _resnet(f"encoder.down_blocks.{i}.resnets.{j}", before if j == 0 else width, width)
        if i < len(widths) - 1:
            rows += conv(f"encoder.down_blocks.{i}.downsamplers.0.conv", width, width, 3)
        before = width
    rows += _middle("encoder.mid_block", top, attends) + norm("encoder.conv_norm_out", top)
    rows += conv("encoder.conv_out", 2 * latent, top, 3)
    rows += conv("decoder.conv_in", last, latent, 3) + _middle("decoder.mid_block", last, attends)
    before = last
    for i, width in enumerate(reversed(decoder)):
        for j in range(per_level + 1):
            rows += _resnet(f"decoder.up_blocks.{i}.resnets.{j}", before if j == 0 else width, width)
        if i < len(decoder) - 1:
            rows += conv(f"decoder.up_blocks.{i}.upsamplers.0.conv", width, width, 3)
        before = width
    rows += norm("decoder.conv_norm_out", decoder[0]) + conv("decoder.conv_out", config.out_channels, decoder[0], 3)
    if config.use_quant_conv:
        rows += linear("quant_conv", 2 * latent, 2 * latent, role="plain", fix="pointwise")
    if config.use_post_quant_conv:
        rows += linear("post_quant_conv", latent, latent, role="plain", fix="pointwise")
    return rows


def _resnet(name: str, before: int, width: int) -> list[Row]:
    rows = norm(f"{name}.norm1", before) + conv(f"{name}.conv1", width, before, 3)
    rows += norm(f"{name}.norm2", width) + conv(f"{name}.conv2", width, width, 3)
    return rows if before == width else rows + conv(f"{name}.conv_shortcut", width, before, 1)


def _middle(name: str, width: int, attends: bool) -> list[Row]:
    rows = _resnet(f"{name}.resnets.0", width, width) + _resnet(f"{name}.resnets.1", width, width)
    if attends:
        attention = f"{name}.attentions.0"
        rows += norm(f"{attention}.group_norm", width)
        old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        for new, legacy in old.items():
            aliases = (f"{attention}.{legacy}",)
            rows += linear(f"{attention}.{new}", width, width, role="plain", fix="was_pointwise", aliases=aliases)
    return rows


def autoencoder_dc(folder: str, config: AutoencoderDCConfig) -> Component:
    """diffusers AutoencoderDC; its halves are a shard each, because a phase needs one of them."""
    channels, latent, head = config.in_channels, config.latent_channels, config.attention_head_dim
    down, up = dc_ae.levels(config, "encoder"), dc_ae.levels(config, "decoder")
    unshuffle = 4 if config.downsample_block_type == "pixel_unshuffle" else 1
    shuffle = 4 if config.upsample_block_type == "pixel_shuffle" else 1
    if down[0].layers:
        rows = conv("encoder.conv_in", down[0].width, channels, 3)
    else:
        rows = conv("encoder.conv_in.conv", down[1].width // unshuffle, channels, 3)
    for i, level in enumerate(down):
        for j in range(level.layers):
            rows += _dc_block(f"encoder.down_blocks.{i}.{j}", level, head)
        if i < len(down) - 1 and level.layers:
            name = f"encoder.down_blocks.{i}.{level.layers}.conv"
            rows += conv(name, down[i + 1].width // unshuffle, level.width, 3)
    rows += conv("encoder.conv_out", latent, down[-1].width, 3)
    rows += conv("decoder.conv_in", up[-1].width, latent, 3)
    for i, level in enumerate(up):
        first = 1 if i < len(up) - 1 and level.layers else 0
        if first:
            rows += conv(f"decoder.up_blocks.{i}.0.conv", level.width * shuffle, up[i + 1].width, 3)
        for j in range(level.layers):
            rows += _dc_block(f"decoder.up_blocks.{i}.{first + j}", level, head)
    width = up[0].width if up[0].layers else up[1].width
    rows += norm("decoder.norm_out", width)
    if up[0].layers:
        rows += conv("decoder.conv_out", channels, width, 3)
    else:
        rows += conv("decoder.conv_out.conv", channels * shuffle, width, 3)
    return Component(folder, tuple(rows), lambda name: block_of(r"(en|de)coder\.", name), dtypes=NEVER_FLOAT16)


def _dc_block(name: str, level: dc_ae.Level, head: int) -> list[Row]:
    width = level.width
    if level.block == "ResBlock":
        rows = conv(f"{name}.conv1", width, width, 3) + conv(f"{name}.conv2", width, width, 3, bias=False)
        return rows + norm(f"{name}.norm", width)
    inner, attn, gated = width // head * head, f"{name}.attn", f"{name}.conv_out"
    rows = []
    for part in "qkv":
        rows += linear(f"{attn}.to_{part}", inner, width, bias=False, role="plain", fix="was_pointwise")
    for i, kernel in enumerate(level.kernels):
        scale = f"{attn}.to_qkv_multiscale.{i}"
        rows += conv(f"{scale}.proj_in", 3 * inner, 1, kernel, bias=False)
        rows += linear(f"{scale}.proj_out", 3 * inner, head, bias=False, role="plain", fix="pointwise")
    out = inner * (1 + len(level.kernels))
    rows += linear(f"{attn}.to_out", width, out, bias=False, role="plain", fix="was_pointwise")
    rows += norm(f"{attn}.norm_out", width)
    rows += linear(f"{gated}.conv_inverted", 8 * width, width, role="plain", fix="pointwise")
    rows += conv(f"{gated}.conv_depth", 8 * width, 1, 3)
    rows += linear(f"{gated}.conv_point", width, 4 * width, bias=False, role="plain", fix="pointwise")
    return rows + norm(f"{gated}.norm", width)
