"""FLUX.1 (Black Forest Labs): dev, schnell, and models of the same architecture in other sizes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_blockskip.models.family import DiffusionModel, Family
from mlx_blockskip.models.flux1.config import shallow
from mlx_blockskip.models.flux1.transformer import FluxTransformer2DConfig

ATTENTION = {
    "double": tuple(
        f"attn.{name}"
        for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    ),
    "single": ("attn.to_q", "attn.to_k", "attn.to_v"),
}
FEED_FORWARD = {
    "double": ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    "single": ("proj_mlp", "proj_out"),
}


def detect(model_index: Mapping[str, Any]) -> bool:
    """FluxPipeline and its variants that share its transformer."""
    return model_index.get("_class_name") == "FluxPipeline"


def defaults(transformer: FluxTransformer2DConfig) -> dict[str, Any]:
    """What a user of FLUX.1-dev (guidance-distilled) or FLUX.1-schnell should want; patches as in the paper."""
    common = {"resolution": 512, "train_resolution": 256, "width": 1024, "height": 1024, "cfg_scale": 1.0}
    if transformer.guidance_embeds:
        return common | {"max_sequence_length": 512, "steps": 28, "guidance": 3.5, "train_guidance": 1.0}
    return common | {"max_sequence_length": 256, "steps": 4}


def open_directory(path: Path, budget: int | None) -> DiffusionModel:
    """Open an MLX model directory of FLUX.1."""
    from mlx_blockskip.models.flux1.model import Flux1

    return Flux1(path, budget, defaults)


FAMILY = Family(
    name="flux1",
    detect=detect,
    open=open_directory,
    defaults=defaults,
    lora_targets={
        "attention": ATTENTION,
        "all": {kind: ATTENTION[kind] + FEED_FORWARD[kind] for kind in ATTENTION},
    },
    shallow=shallow,
    bundled="tiny-flux",
)
