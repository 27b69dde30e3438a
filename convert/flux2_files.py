"""FLUX.2 in single files: Black Forest Labs' own, and those that ComfyUI keeps."""

from collections.abc import Collection
from typing import Any

from mlx_blockskip.converters.encoder_files import AUTOENCODER_KL_FLUX2, QWEN3
from mlx_blockskip.converters.layouts import Layout, Network, Rule, Shapes, numbered, rule

STREAMS = {
    "img": ("ff", "to_{}", "to_out.0", "norm_"),
    "txt": ("ff_context", "add_{}_proj", "to_add_out", "norm_added_"),
}
"""Of a double block's streams: our names of feed-forward, projections and norms."""

EMBEDDERS = {"time_in": "timestep_embedder", "guidance_in": "guidance_embedder"}

MODULATIONS = ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")


def black_forest_labs(names: Collection[str]) -> list[Rule]:
    """The transformer of `flux-2-klein-4b.safetensors`. Scale and shift of the last norm are swapped there."""
    found = [rule("img_in", "x_embedder"), rule("txt_in", "context_embedder"), rule("final_layer.linear", "proj_out")]
    found.append(rule("final_layer.adaLN_modulation.1", "norm_out.linear", swapped=True))
    found += [rule(f"{name}.lin", f"{name}.linear") for name in MODULATIONS]
    for theirs, ours in EMBEDDERS.items():
        found.append(rule(f"{theirs}.in_layer", f"time_guidance_embed.{ours}.linear_1"))
        found.append(rule(f"{theirs}.out_layer", f"time_guidance_embed.{ours}.linear_2"))
    for stream, (feed_forward, projection, out, norm) in STREAMS.items():
        double, block = f"double_blocks.{{}}.{stream}", "transformer_blocks.{}"
        found += [
            rule(f"{double}_attn.qkv", *(f"{block}.attn.{projection.format(part)}" for part in "qkv")),
            rule(f"{double}_attn.norm.query_norm", f"{block}.attn.{norm}q"),
            rule(f"{double}_attn.norm.key_norm", f"{block}.attn.{norm}k"),
            rule(f"{double}_attn.proj", f"{block}.attn.{out}"),
            rule(f"{double}_mlp.0", f"{block}.{feed_forward}.linear_in"),
            rule(f"{double}_mlp.2", f"{block}.{feed_forward}.linear_out"),
        ]
    single, block = "single_blocks.{}", "single_transformer_blocks.{}"
    return [
        *found,
        rule(f"{single}.linear1", f"{block}.attn.to_qkv_mlp_proj"),
        rule(f"{single}.linear2", f"{block}.attn.to_out"),
        rule(f"{single}.norm.query_norm", f"{block}.attn.norm_q"),
        rule(f"{single}.norm.key_norm", f"{block}.attn.norm_k"),
    ]


def measured(shapes: Shapes) -> dict[str, Any]:
    """What the shapes of a transformer's tensors tell of its config."""
    try:
        width, channels = shapes["x_embedder.weight"]
        head = next(shape[0] for name, shape in shapes.items() if name.endswith(".attn.norm_q.weight"))
        hidden = next(shape[1] for name, shape in shapes.items() if name.endswith(".attn.to_out.weight")) - width
        found = {
            "in_channels": channels,
            "num_layers": numbered(shapes, r"transformer_blocks\.(\d+)\."),
            "num_single_layers": numbered(shapes, r"single_transformer_blocks\.(\d+)\."),
            "attention_head_dim": head,
            "num_attention_heads": width // head,
            "joint_attention_dim": shapes["context_embedder.weight"][1],
            "timestep_guidance_channels": shapes["time_guidance_embed.timestep_embedder.linear_1.weight"][1],
            "mlp_ratio": hidden / width,
            "guidance_embeds": "time_guidance_embed.guidance_embedder.linear_1.weight" in shapes,
        }
        out = shapes["proj_out.weight"][0]
    except (KeyError, ValueError, IndexError, StopIteration):
        return {}
    return found if out == channels else {**found, "out_channels": out}


FILES = {
    "transformer": Network(
        "FLUX.2's transformer",
        (
            Layout("single_stream_modulation.lin.weight", black_forest_labs),
            Layout("single_stream_modulation.linear.weight"),
        ),
        measured,
    ),
    "text_encoder": QWEN3,
    "vae": AUTOENCODER_KL_FLUX2,
}
