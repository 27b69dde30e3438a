"""Z-Image (Tongyi-MAI): the base model, and Z-Image-Turbo, which was distilled from it to a few steps."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_blockskip.models.family import DiffusionModel, Family
from mlx_blockskip.models.z_image.config import shallow
from mlx_blockskip.models.z_image.transformer import ZImageTransformer2DConfig

ATTENTION = tuple(f"attention.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0"))
FEED_FORWARD = tuple(f"feed_forward.{name}" for name in ("w1", "w2", "w3"))
KINDS = ("main", "refiner")

TURBO_SHIFT = 3.0
"""How far Turbo's scheduler shifts noise levels; the base model's is 6."""


def detect(model_index: Mapping[str, Any]) -> bool:
    """ZImagePipeline, which draws from text alone; that of Omni has a SigLIP besides."""
    return model_index.get("_class_name") == "ZImagePipeline"


def defaults(transformer: ZImageTransformer2DConfig) -> dict[str, Any]:
    """What a user of the base model should want. ZImagePipeline adds its guidance to 1: its 4 is this 5."""
    return {
        **{"resolution": 512, "train_resolution": 256, "width": 1024, "height": 1024, "max_sequence_length": 512},
        **{"steps": 50, "cfg_scale": 5.0},
    }


def variant(model_index: Mapping[str, Any], scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """Turbo has the configs and the index of its base; only its scheduler's differs."""
    return {"steps": 8, "cfg_scale": 1.0} if scheduler.get("shift") == TURBO_SHIFT else {}


def open_directory(path: Path, budget: int | None) -> DiffusionModel:
    """Open an MLX model directory of Z-Image."""
    from mlx_blockskip.models.z_image.model import ZImage

    return ZImage(path, budget, defaults)


FAMILY = Family(
    name="z_image",
    detect=detect,
    open=open_directory,
    defaults=defaults,
    lora_targets={
        "attention": dict.fromkeys(KINDS, ATTENTION),
        "all": dict.fromkeys(KINDS, ATTENTION + FEED_FORWARD),
    },
    shallow=shallow,
    bundled="chat-tokenizer",
    siblings=True,
    variant=variant,
)
