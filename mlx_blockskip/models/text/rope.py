"""What the configs of decoder language models have in common: rotary positions, and queries that share keys."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from mlx_blockskip.models.config import Config, OneOf, PositiveFloat, PositiveInt


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


@dataclass(frozen=True)
class DecoderConfig(Config):
    """A config that has both kinds of heads, `rope_parameters`, and may have been written before there were these."""

    num_attention_heads: PositiveInt = 1
    num_key_value_heads: PositiveInt = 1

    def contradiction(self) -> str | None:
        if self.num_attention_heads % self.num_key_value_heads:
            return f"num_key_value_heads {self.num_key_value_heads} does not divide {self.num_attention_heads} heads"
        return None

    @classmethod
    def modernised(cls, given: Mapping[str, Any]) -> Mapping[str, Any]:
        return gathered(given)
