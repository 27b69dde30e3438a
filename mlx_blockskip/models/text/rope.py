"""Rotary positions as a language model's config says them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from mlx_blockskip.models.config import Config, OneOf, PositiveFloat


@dataclass(frozen=True)
class RopeParameters(Config):
    """Rotary positions. Source: transformers RopeParameters."""

    rope_theta: PositiveFloat = 10000.0
    rope_type: Annotated[str, OneOf("default")] = "default"


def gathered(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """A config's content with `rope_parameters`: before transformers 5 `rope_theta` and `rope_scaling` lay beside the
    others.
    """
    rope = given.get("rope_parameters") or given.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        return given
    old = {"rope_theta": given["rope_theta"]} if "rope_theta" in given else {}
    named = {"rope_type": rope["type"]} if "type" in rope else {}
    return {**given, "rope_parameters": {**old, **named, **rope}}
