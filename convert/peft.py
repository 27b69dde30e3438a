"""Names and layouts of LoRA files: ours (mlx-lm's) and diffusers' with PEFT.

Ours: `{module}.lora_a` (in, r), `{module}.lora_b` (r, out), one scale in adapter_config.json.
Theirs: `{prefix}{module}.lora_A.weight` (r, in), `.lora_B.weight` (out, r), and alpha, either as `.alpha` tensors or
in the file's metadata; the strength is alpha / r. Where the module is a 1 x 1 convolution there, both factors are
kernels of 1 x 1, with two axes more.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_blockskip.engine.errors import UserError

Factors = tuple[mx.array, mx.array]
"""Of a layer in our layout: (in, r) and (r, out)."""

METADATA = "lora_adapter_metadata"
FACTOR = r"(.+?)\.(lora_A|lora_B|lora\.down|lora\.up)(?:\.default)?\.weight"
LETTERS = {"lora_A": "A", "lora_B": "B", "lora.down": "A", "lora.up": "B"}  # the latter are diffusers' older names


def to_peft(
    tensors: Mapping[str, mx.array], scale: float, prefix: str, *, pointwise: tuple[str, ...] = ()
) -> dict[str, mx.array]:
    """Our tensors in their layout, with the scale multiplied into the second factor: nothing has to be read beside the
    factors. Dtypes stay.

    pointwise: how the names of modules end that are 1 x 1 convolutions there.
    """
    found: dict[str, mx.array] = {}
    for name, value in tensors.items():
        module, kind = name.rsplit(".", 1)
        letter = {"lora_a": "A", "lora_b": "B"}[kind]
        if letter == "B" and scale != 1.0:
            value = value * scale
        theirs = value.T[..., None, None] if module.endswith(pointwise) else value.T
        found[f"{prefix}{module}.lora_{letter}.weight"] = mx.contiguous(theirs)
    return found


def layers(tensors: Mapping[str, mx.array]) -> dict[str, Factors]:
    """Both factors of every layer in our layout, by the module's path."""
    modules = [name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a")]
    return {module: (tensors[f"{module}.lora_a"], tensors[f"{module}.lora_b"]) for module in modules}


def from_peft(
    tensors: Mapping[str, mx.array], metadata: Mapping[str, str], prefix: str, source: Path
) -> tuple[dict[str, mx.array], list[str]]:
    """Their tensors in our layout with alpha / r multiplied into the second factor, and the names that were left out.

    Raises UserError where the file is in neither layout, or lacks one factor of a pair.
    """
    config = _config(metadata, prefix, source)
    found: dict[str, mx.array] = {}
    others = []
    for name, value in tensors.items():
        match = re.fullmatch(re.escape(prefix) + FACTOR, name)
        if match is None:
            if not name.endswith(".alpha"):
                others.append(name)
            continue
        module, letter = match[1], LETTERS[match[2]]
        if value.ndim == 4 and value.shape[2:] == (1, 1):
            value = value[:, :, 0, 0]
        value = value.astype(mx.float32).T
        if letter == "B":
            value = value * (_alpha(tensors, config, prefix + module, module, value.shape[0]) / value.shape[0])
        found[f"{module}.lora_{letter.lower()}"] = mx.contiguous(value)
    if not found:
        example = next(iter(tensors), "nothing")
        raise UserError(
            f"{source}: not a LoRA of diffusers or of this tool (it holds {example}); export it for diffusers"
        )
    return found, others


def _config(metadata: Mapping[str, str], prefix: str, source: Path) -> dict[str, object]:
    try:
        config = json.loads(metadata.get(METADATA, "{}"))
    except ValueError as error:
        raise UserError(f"{source}: its metadata {METADATA} is not JSON ({error}); export it again") from None
    return {key.removeprefix(prefix): value for key, value in config.items()}


def _alpha(tensors: Mapping[str, mx.array], config: Mapping[str, object], path: str, module: str, rank: int) -> float:
    if f"{path}.alpha" in tensors:
        return float(np.array(tensors[f"{path}.alpha"], np.float32))
    pattern = config.get("alpha_pattern")
    if isinstance(pattern, dict):
        for key, value in pattern.items():
            if module == key or module.endswith("." + key):
                return float(value)
    alpha = config.get("lora_alpha", rank)
    return float(alpha) if isinstance(alpha, (int, float)) else float(rank)
