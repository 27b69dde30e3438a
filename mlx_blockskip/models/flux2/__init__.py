"""FLUX.2 klein (Black Forest Labs): 4B and 9B, the base models and those distilled to a few steps."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_blockskip.models.family import DiffusionModel, Family
from mlx_blockskip.models.flux2.config import shallow
from mlx_blockskip.models.flux2.transformer import Flux2Transformer2DConfig

ATTENTION = {
    "double": tuple(
        f"attn.{name}"
        for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    ),
    "single": ("attn.to_qkv_mlp_proj", "attn.to_out"),
}
"""In single blocks attention and feed-forward are the same layers."""

FEED_FORWARD = {
    "double": ("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out"),
    "single": (),
}


def detect(model_index: Mapping[str, Any]) -> bool:
    """Flux2KleinPipeline; FLUX.2 dev has another text encoder."""
    return model_index.get("_class_name") == "Flux2KleinPipeline"


def defaults(transformer: Flux2Transformer2DConfig) -> dict[str, Any]:
    """What a user of a base model should want, which has classifier-free guidance; patches as FLUX.1's."""
    return {
        **{"resolution": 512, "train_resolution": 256, "width": 1024, "height": 1024, "max_sequence_length": 512},
        **{"steps": 50, "cfg_scale": 4.0},
    }


def variant(model_index: Mapping[str, Any], scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """A distilled model has the configs of its base; only the pipeline's says that it is one."""
    return {"steps": 4, "cfg_scale": 1.0} if model_index.get("is_distilled") else {}


def open_directory(path: Path, budget: int | None) -> DiffusionModel:
    """Open an MLX model directory of FLUX.2."""
    from mlx_blockskip.models.flux2.model import Flux2

    return Flux2(path, budget, defaults)


FAMILY = Family(
    name="flux2",
    detect=detect,
    open=open_directory,
    defaults=defaults,
    lora_targets={
        "attention": ATTENTION,
        "all": {kind: ATTENTION[kind] + FEED_FORWARD[kind] for kind in ATTENTION},
    },
    shallow=shallow,
    bundled="chat-tokenizer",
    siblings=True,
    variant=variant,
)
