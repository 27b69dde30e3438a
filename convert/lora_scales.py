"""The strength of a LoRA's layers as its file says it: alpha / r, in PEFT's config or beside the factors.

kohya's metadata (`ss_network_alpha`) is for people: its own loader goes by the tensors alone, as this does.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_blockskip.converters.peft import METADATA
from mlx_blockskip.engine.errors import UserError

COMPONENT = "transformer."


@dataclass(frozen=True)
class Strengths:
    """What PEFT's config says: one alpha for all (None: r), others by regular expression, and whether the strength is
    alpha / sqrt(r). rank, ranks: the same of r, which factors say themselves where there are any.
    """

    alpha: float | None = None
    patterns: Mapping[str, float] = field(default_factory=dict)
    by_root: bool = False
    rank: float | None = None
    ranks: Mapping[str, float] = field(default_factory=dict)

    def of(self, layer: str, rank: float | None = None) -> float:
        """By which B A is multiplied for the layer of this path. rank: of its factors; None where it has none."""
        alpha = _matched(self.patterns, layer, self.alpha)
        rank = _matched(self.ranks, layer, self.rank) if rank is None else rank
        if alpha is None or not rank:
            return 1.0
        return alpha / (math.sqrt(rank) if self.by_root else rank)


def _matched(patterns: Mapping[str, float], layer: str, otherwise: float | None) -> float | None:
    """The value of the first pattern that a layer's path ends with, as PEFT matches them."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", layer)), otherwise)


def from_metadata(metadata: Mapping[str, str], source: Path) -> Strengths:
    """Of a file of diffusers, which keeps PEFT's config under the component's name. Raises UserError."""
    try:
        config = json.loads(metadata.get(METADATA, "{}"))
    except ValueError as error:
        raise UserError(f"{source}: its metadata {METADATA} is not JSON ({error}); export it again") from None
    if not isinstance(config, dict):
        raise UserError(f"{source}: its metadata {METADATA} holds no config; export it again")
    own = {k.removeprefix(COMPONENT): v for k, v in config.items() if k.startswith(COMPONENT)}
    return from_config(own or config, source)


def from_config(config: Mapping[str, Any], source: Path) -> Strengths:
    """Of PEFT's `adapter_config.json`. Raises UserError for what is not a number or not a regular expression."""
    try:
        alpha, rank = config.get("lora_alpha", config.get("alpha")), config.get("r")
        patterns, ranks = (
            {key: float(value) for key, value in (config.get(name) or {}).items()}
            for name in ("alpha_pattern", "rank_pattern")
        )
        for key in (*patterns, *ranks):
            re.compile(key)
        return Strengths(
            None if alpha is None else float(alpha),
            patterns,
            bool(config.get("use_rslora")),
            None if rank is None else float(rank),
            ranks,
        )
    except (TypeError, ValueError, AttributeError, re.error) as error:
        raise UserError(f"{source}: its ranks or alphas cannot be read ({error}); export it again") from None


def stored(name: str, value: mx.array, source: Path) -> float:
    """A number that a file stores as a tensor, of any dtype and shape. Raises UserError."""
    if value.size != 1:
        raise UserError(f"{source}: {name} has shape {list(value.shape)} and should be one number; export it again")
    found = float(np.array(value.astype(mx.float32)).reshape(()))
    if not math.isfinite(found):
        raise UserError(f"{source}: {name} is {found}; export it again")
    return found
