"""FLUX.1 in single files: Black Forest Labs' own, and those that ComfyUI keeps."""

import re
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from mlx_blockskip.converters.encoder_files import AUTOENCODER_KL, CLIP_TEXT, T5
from mlx_blockskip.converters.layouts import Layout, Network, Rule, Shapes, numbered, rule

STREAMS = {
    "img": ("norm1", "ff", "to_{}", "to_out.0", "norm_"),
    "txt": ("norm1_context", "ff_context", "add_{}_proj", "to_add_out", "norm_added_"),
}
"""Of a double block's streams: our names of modulation, feed-forward, projections and norms."""

EMBEDDERS = {"time_in": "timestep_embedder", "vector_in": "text_embedder", "guidance_in": "guidance_embedder"}


def black_forest_labs(names: Collection[str]) -> list[Rule]:
    """The transformer of `flux1-dev.safetensors`. Scale and shift of the last norm are in the other order there."""
    found = [rule("img_in", "x_embedder"), rule("txt_in", "context_embedder"), rule("final_layer.linear", "proj_out")]
    found.append(rule("final_layer.adaLN_modulation.1", "norm_out.linear", swapped=True))
    for theirs, ours in EMBEDDERS.items():
        found.append(rule(f"{theirs}.in_layer", f"time_text_embed.{ours}.linear_1"))
        found.append(rule(f"{theirs}.out_layer", f"time_text_embed.{ours}.linear_2"))
    for stream, (modulation, feed_forward, projection, out, norm) in STREAMS.items():
        double, block = f"double_blocks.{{}}.{stream}", "transformer_blocks.{}"
        found += [
            rule(f"{double}_mod.lin", f"{block}.{modulation}.linear"),
            rule(f"{double}_attn.qkv", *(f"{block}.attn.{projection.format(part)}" for part in "qkv")),
            rule(f"{double}_attn.norm.query_norm", f"{block}.attn.{norm}q"),
            rule(f"{double}_attn.norm.key_norm", f"{block}.attn.{norm}k"),
            rule(f"{double}_attn.proj", f"{block}.attn.{out}"),
            rule(f"{double}_mlp.0", f"{block}.{feed_forward}.net.0.proj"),
            rule(f"{double}_mlp.2", f"{block}.{feed_forward}.net.2"),
        ]
    single, block = "single_blocks.{}", "single_transformer_blocks.{}"
    inner = (*(f"{block}.attn.to_{part}" for part in "qkv"), f"{block}.proj_mlp")
    return [
        *found,
        rule(f"{single}.modulation.lin", f"{block}.norm.linear"),
        rule(f"{single}.linear1", *inner, shares=(1, 1, 1, 4)),
        rule(f"{single}.linear2", f"{block}.proj_out"),
        rule(f"{single}.norm.query_norm", f"{block}.attn.norm_q"),
        rule(f"{single}.norm.key_norm", f"{block}.attn.norm_k"),
    ]


def adapters() -> list[Rule]:
    """The layers that LoRA files call otherwise than the transformer does: in Black Forest Labs' names, as MLX's
    sequences number them (`layers.0`), by XLabs' attention processors, and mflux's feed-forwards.
    """
    found = black_forest_labs(())
    numbered = r"\.(\d)$"
    found += [
        replace(r, theirs=re.sub(numbered, r".layers.\1", r.theirs)) for r in found if re.search(numbered, r.theirs)
    ]
    double, block = "double_blocks.{}.processor", "transformer_blocks.{}"
    for number, (_, feed_forward, projection, out, _) in enumerate(STREAMS.values(), 1):
        found.append(rule(f"{double}.qkv_lora{number}", *(f"{block}.attn.{projection.format(p)}" for p in "qkv")))
        found.append(rule(f"{double}.proj_lora{number}", f"{block}.attn.{out}"))
        found.append(rule(f"{block}.{feed_forward}.linear1", f"{block}.{feed_forward}.net.0.proj"))
        found.append(rule(f"{block}.{feed_forward}.linear2", f"{block}.{feed_forward}.net.2"))
    single, block = "single_blocks.{}.processor", "single_transformer_blocks.{}"
    found.append(rule(f"{single}.qkv_lora", *(f"{block}.attn.to_{part}" for part in "qkv")))
    return [*found, rule(f"{single}.proj_lora", f"{block}.proj_out")]


def measured(shapes: Shapes) -> dict[str, Any]:
    """What the shapes of a transformer's tensors tell of its config."""
    try:
        width, channels = shapes["x_embedder.weight"]
        head = next(shape[0] for name, shape in shapes.items() if name.endswith(".attn.norm_q.weight"))
        found = {
            "in_channels": channels,
            "num_layers": numbered(shapes, r"transformer_blocks\.(\d+)\."),
            "num_single_layers": numbered(shapes, r"single_transformer_blocks\.(\d+)\."),
            "attention_head_dim": head,
            "num_attention_heads": width // head,
            "joint_attention_dim": shapes["context_embedder.weight"][1],
            "pooled_projection_dim": shapes["time_text_embed.text_embedder.linear_1.weight"][1],
            "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in shapes,
        }
        out = shapes["proj_out.weight"][0]
    except (KeyError, ValueError, IndexError, StopIteration):
        return {}
    return found if out == channels else {**found, "out_channels": out}


FILES = {
    "transformer": Network(
        "FLUX.1's transformer",
        (
            Layout("double_blocks.0.img_mod.lin.weight", black_forest_labs),
            Layout("single_transformer_blocks.0.proj_mlp.weight"),
        ),
        measured,
    ),
    "text_encoder": CLIP_TEXT,
    "text_encoder_2": T5,
    "vae": AUTOENCODER_KL,
}
