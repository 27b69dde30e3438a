"""Our LoRA files (mlx-lm's names and layout) as diffusers with PEFT has them. `lora_files` reads theirs.

Ours: `{module}.lora_a` (in, r), `{module}.lora_b` (r, out), one scale in adapter_config.json.
Theirs: `{prefix}{module}.lora_A.weight` (r, in), `.lora_B.weight` (out, r), and alpha, either as `.alpha` tensors or
in the file's metadata; the strength is alpha / r. Where the module is a 1 x 1 convolution there, both factors are
kernels of 1 x 1, with two axes more.
"""

from collections.abc import Mapping

import mlx.core as mx


def to_peft(
    tensors: Mapping[str, mx.array],
    scale: float,
    prefix: str,
    *,
    pointwise: tuple[str, ...] = (),
    alphas: bool = True,
) -> dict[str, mx.array]:
    """Our tensors in their layout. Where scale is not 1, alpha is written once, as `.alpha` beside each module; without
    `alphas`, which some pipelines refuse, the second factor is multiplied by the scale.

    pointwise: how the names of modules end that are 1 x 1 convolutions there.
    """
    found: dict[str, mx.array] = {}
    for name, value in tensors.items():
        module, kind = name.rsplit(".", 1)
        letter = {"lora_a": "A", "lora_b": "B"}[kind]
        if letter == "B" and not alphas:
            value = value * scale
        theirs = value.T[..., None, None] if module.endswith(pointwise) else value.T
        found[f"{prefix}{module}.lora_{letter}.weight"] = mx.contiguous(theirs)
        if letter == "A" and scale != 1.0 and alphas:
            found[f"{prefix}{module}.alpha"] = mx.array(scale * value.shape[1], mx.float32)
    return found
