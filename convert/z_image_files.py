"""Z-Image in single files: its authors' own names, which ComfyUI keeps, and diffusers'."""

from collections.abc import Collection, Sequence
from typing import Any

from mlx_blockskip.converters.encoder_files import AUTOENCODER_KL, QWEN3
from mlx_blockskip.converters.layouts import Layout, Network, Rule, Shapes, numbered, rule
from mlx_blockskip.models.z_image.transformer import EMBEDDER, FINAL

STACKS = ("layers", "noise_refiner", "context_refiner")


def tongyi(names: Collection[str]) -> list[Rule]:
    """The transformer of `z_image_turbo_bf16.safetensors`: q, k and v are one layer there."""
    found = [rule("x_embedder", EMBEDDER), rule("final_layer.linear", f"{FINAL}.linear")]
    found.append(rule("final_layer.adaLN_modulation.1", f"{FINAL}.adaLN_modulation.1"))
    for stack in STACKS:
        attention = f"{stack}.{{}}.attention"
        found += [
            rule(f"{attention}.qkv", *(f"{attention}.to_{part}" for part in "qkv")),
            rule(f"{attention}.out", f"{attention}.to_out.0"),
            rule(f"{attention}.q_norm", f"{attention}.norm_q"),
            rule(f"{attention}.k_norm", f"{attention}.norm_k"),
        ]
    return found


def unchanged(attention: Sequence[str]) -> list[Rule]:
    """Layers under the names that they have here: these of each attention, and all but attention."""
    found = [f"{stack}.{{}}.attention.{part}" for stack in STACKS for part in attention]
    found += [f"{stack}.{{}}.feed_forward.w{i}" for stack in STACKS for i in (1, 2, 3)]
    found += [f"{stack}.{{}}.adaLN_modulation.0" for stack in STACKS[:2]]
    found += ["cap_embedder.1", "t_embedder.mlp.0", "t_embedder.mlp.2"]
    return [rule(name, name) for name in (*found, EMBEDDER, f"{FINAL}.linear", f"{FINAL}.adaLN_modulation.1")]


def measured(shapes: Shapes) -> dict[str, Any]:
    """What the shapes of a transformer's tensors tell of its config."""
    try:
        width, patch = shapes[f"{EMBEDDER}.weight"]
        head = next((shape[0] for name, shape in shapes.items() if name.endswith(".attention.norm_q.weight")), 0)
        found = {
            "in_channels": patch // 4,
            "dim": width,
            "n_layers": numbered(shapes, r"layers\.(\d+)\."),
            "n_refiner_layers": numbered(shapes, r"noise_refiner\.(\d+)\."),
            "cap_feat_dim": shapes["cap_embedder.1.weight"][1],
            "qk_norm": head > 0,
        }
    except (KeyError, ValueError, IndexError):
        return {}
    return {**found, "n_heads": width // head} if head else found


FILES = {
    "transformer": Network(
        "Z-Image's transformer",
        (
            Layout("noise_refiner.0.attention.qkv.weight", tongyi, dropped=r"norm_final\.weight"),
            Layout("noise_refiner.0.attention.to_q.weight"),
        ),
        measured,
    ),
    "text_encoder": QWEN3,
    "vae": AUTOENCODER_KL,
}
