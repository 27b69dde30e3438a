"""SANA (NVIDIA): linear attention over few, deep latents; 0.6B, 1.6B and 4.8B, SANA 1.5 and Sprint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_blockskip.models.family import DiffusionModel, Family
from mlx_blockskip.models.sana.config import shallow
from mlx_blockskip.models.sana.transformer import SanaTransformer2DConfig

ATTENTION = {
    "sana": tuple(
        f"{attention}.{name}" for attention in ("attn1", "attn2") for name in ("to_q", "to_k", "to_v", "to_out.0")
    )
}
FEED_FORWARD = {"sana": ("ff.conv_inverted", "ff.conv_point")}
PIXELS = 32
"""Of a latent's side, in the published models."""


def detect(model_index: Mapping[str, Any]) -> bool:
    """SanaPipeline and SanaSprintPipeline."""
    return model_index.get("_class_name") in ("SanaPipeline", "SanaSprintPipeline")


def defaults(transformer: SanaTransformer2DConfig) -> dict[str, Any]:
    """What a user of SANA or of SANA-Sprint (few steps, distilled guidance) should want; patches as in the paper."""
    side = PIXELS * transformer.sample_size
    common = {
        "resolution": min(side, 1024), "train_resolution": min(side, 1024) // 2, "width": side, "height": side,
        "max_sequence_length": 300,
    }  # fmt: skip
    if transformer.guidance_embeds:
        return common | {"steps": 2, "cfg_scale": 1.0, "guidance": 4.5, "train_guidance": 1.0}
    return common | {"steps": 20, "cfg_scale": 4.5}


def open_directory(path: Path, budget: int | None) -> DiffusionModel:
    """Open an MLX model directory of SANA."""
    from mlx_blockskip.models.sana.model import Sana

    return Sana(path, budget, defaults)


FAMILY = Family(
    name="sana",
    detect=detect,
    open=open_directory,
    defaults=defaults,
    lora_targets={"attention": ATTENTION, "all": {"sana": ATTENTION["sana"] + FEED_FORWARD["sana"]}},
    shallow=shallow,
    bundled="tiny-sana",
)
