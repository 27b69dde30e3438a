"""SANA in single files, in the names of NVIDIA's own code."""

from collections.abc import Collection
from typing import Any

from mlx_blockskip.converters.encoder_files import AUTOENCODER_DC, GEMMA2
from mlx_blockskip.converters.layouts import Layout, Network, Rule, Shapes, numbered, rule


def nvidia(names: Collection[str]) -> list[Rule]:
    """The transformer of SANA's own checkpoints; only SANA-Sprint's embeds a guidance, and calls the embedders so."""
    sprint = any(name.startswith("cfg_embedder.") for name in names)
    time = "time_embed.timestep_embedder" if sprint else "time_embed.emb.timestep_embedder"
    theirs, ours = "blocks.{}", "transformer_blocks.{}"
    found = [
        rule("x_embedder.proj", "patch_embed.proj"),
        rule("t_block.1", "time_embed.linear"),
        rule("attention_y_norm", "caption_norm"),
        rule("final_layer.linear", "proj_out"),
        rule("final_layer.scale_shift_table", "scale_shift_table"),
        rule(f"{theirs}.scale_shift_table", f"{ours}.scale_shift_table"),
        rule(f"{theirs}.attn.qkv", *(f"{ours}.attn1.to_{part}" for part in "qkv")),
        rule(f"{theirs}.cross_attn.q_linear", f"{ours}.attn2.to_q"),
        rule(f"{theirs}.cross_attn.kv_linear", f"{ours}.attn2.to_k", f"{ours}.attn2.to_v"),
        rule(f"{theirs}.mlp.inverted_conv.conv", f"{ours}.ff.conv_inverted"),
        rule(f"{theirs}.mlp.depth_conv.conv", f"{ours}.ff.conv_depth"),
        rule(f"{theirs}.mlp.point_conv.conv", f"{ours}.ff.conv_point"),
    ]
    for number, layer in ((0, 1), (2, 2)):
        found.append(rule(f"t_embedder.mlp.{number}", f"{time}.linear_{layer}"))
        found.append(rule(f"cfg_embedder.mlp.{number}", f"time_embed.guidance_embedder.linear_{layer}"))
        found.append(rule(f"y_embedder.y_proj.fc{layer}", f"caption_projection.linear_{layer}"))
    for attention, mine in (("attn", "attn1"), ("cross_attn", "attn2")):
        found.append(rule(f"{theirs}.{attention}.proj", f"{ours}.{mine}.to_out.0"))
        found += [rule(f"{theirs}.{attention}.{part}_norm", f"{ours}.{mine}.norm_{part}") for part in "qk"]
    return found


def measured(shapes: Shapes) -> dict[str, Any]:
    """What the shapes of a transformer's tensors tell of its config; into how many heads a width is cut they do not."""
    try:
        embedder, text = shapes["patch_embed.proj.weight"], shapes["transformer_blocks.0.attn2.to_k.weight"][1]
        return {
            "in_channels": embedder[1],
            "patch_size": embedder[2] if len(embedder) == 4 else 1,
            "num_layers": numbered(shapes, r"transformer_blocks\.(\d+)\."),
            "cross_attention_dim": text,
            "caption_channels": shapes["caption_projection.linear_1.weight"][1],
            "mlp_ratio": shapes["transformer_blocks.0.ff.conv_inverted.weight"][0] / 2 / embedder[0],
            "guidance_embeds": "time_embed.guidance_embedder.linear_1.weight" in shapes,
            "qk_norm": "rms_norm_across_heads" if "transformer_blocks.0.attn1.norm_q.weight" in shapes else None,
        }
    except (KeyError, IndexError):
        return {}


FILES = {
    "transformer": Network(
        "SANA's transformer",
        (
            Layout(
                "blocks.0.cross_attn.q_linear.weight",
                nvidia,
                dropped=r"(y_embedder\.y_embedding|pos_embed|logvar_linear\..*)",
            ),
            Layout("transformer_blocks.0.ff.conv_inverted.weight"),
        ),
        measured,
    ),
    "text_encoder": GEMMA2,
    "vae": AUTOENCODER_DC,
}
