"""LoRA files for other tools: an adapter's layers under the names, and put together as, the tool has them.

Every format holds the adapter whole: its scale is multiplied into the second factor, so that it is as strong in a tool
that reads no alpha. Where a tool has one layer for several of ours (q, k and v of FLUX.1), their first factors are put
side by side and their second ones are the blocks of a diagonal, whose product is that of ours.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_blockskip.converters.layouts import Rule, pattern_of
from mlx_blockskip.converters.peft import METADATA, to_peft
from mlx_blockskip.engine.errors import UserError
from mlx_blockskip.lora import Factors, paired


@dataclass(frozen=True)
class Naming:
    """prefix: stands before a layer's name. separator: stands between its parts, instead of a full stop. factors: what
    the two are called. alpha: whether there is one beside them, which is their rank.
    """

    prefix: str
    separator: str = "."
    factors: tuple[str, str] = ("lora_down", "lora_up")
    alpha: bool = True


NATIVE = {"comfyui": Naming("diffusion_model."), "kohya": Naming("lora_unet_", "_")}
"""Formats that call layers as the authors of the model do. The factors are `.lora_down` and `.lora_up` in both, as
ComfyUI and sd-scripts save them; ComfyUI would also take `.lora_A`, but diffusers would pass that over in silence."""


def to_diffusers(
    tensors: Mapping[str, mx.array], scale: float, prefix: str, pointwise: tuple[str, ...], dtype: mx.Dtype
) -> tuple[dict[str, mx.array], dict[str, str]]:
    """A file of diffusers and PEFT: its tensors, and the metadata that diffusers makes PEFT's config of.

    tensors: an adapter's, `{module}.lora_a` (in, r) and `.lora_b` (r, out). pointwise: how the names of modules end
    that are 1 x 1 convolutions there. Raises UserError where a factor is too large for `dtype`.
    """
    found = to_peft(rounded(folded(tensors, scale), dtype), 1.0, prefix, pointwise=pointwise)
    by_module = {module: a.shape[1] for module, (a, _) in paired(tensors).items()}
    config = {f"{prefix}{key}": value for key, value in peft_config(by_module).items()}
    return found, {METADATA: json.dumps(config, indent=2, sort_keys=True)}


def peft_config(by_module: Mapping[str, int]) -> dict[str, object]:
    """PEFT's LoraConfig for modules of these ranks, with a strength of 1 in every one."""
    rank = max(by_module.values())
    others = {f"^{re.escape(module)}": other for module, other in by_module.items() if other != rank}
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(by_module),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
    }


def to_native(
    tensors: Mapping[str, mx.array], scale: float, naming: Naming, rules: Sequence[Rule], dtype: mx.Dtype
) -> dict[str, mx.array]:
    """A file in the names of the model's authors, with a strength of 1.

    tensors: an adapter's, `{module}.lora_a` (in, r) and `.lora_b` (r, out). rules: `theirs` becomes `ours`. Raises
    UserError for a layer that no rule names, and where a factor is too large for `dtype`.
    """
    found: dict[str, mx.array] = {}
    for theirs, (a, b) in renamed(paired(rounded(folded(tensors, scale), dtype)), rules).items():
        module = naming.prefix + theirs.replace(".", naming.separator)
        for letter, value in zip(naming.factors, (a, b), strict=True):
            found[f"{module}.{letter}.weight"] = mx.contiguous(value.T)
        if naming.alpha:
            found[f"{module}.alpha"] = mx.array(float(a.shape[1]), mx.float32)
    return found


def renamed(ours: Mapping[str, Factors], rules: Sequence[Rule]) -> dict[str, Factors]:
    """The factors of each of their layers, by its name, in the order of ours. Raises UserError."""
    patterns = [(pattern_of(name), rule, place) for rule in rules for place, name in enumerate(rule.ours)]
    members: dict[str, tuple[Rule, dict[int, Factors]]] = {}
    for module, factors in ours.items():
        for pattern, rule, place in patterns:
            if match := pattern.fullmatch(module):
                members.setdefault(rule.theirs.format(*match.groups()), (rule, {}))[1][place] = factors
                break
        else:
            raise UserError(f"{module}: has no name in this format; export it with --format diffusers")
    return {name: joined(found, rule) for name, (rule, found) in members.items()}


def joined(members: Mapping[int, Factors], rule: Rule) -> Factors:
    """One layer's factors that stand for those of its parts, by their place; a part without any contributes nothing.

    Parts with the same first factor share it, as those do that were trained as one layer. Else the ranks add up.
    """
    place, (_, b) = next(iter(members.items()))
    widths = [b.shape[1] // rule.shares[place] * share for share in rule.shares]
    firsts: list[mx.array] = []
    rows: list[list[mx.array]] = []  # the second factor, a row of blocks for each first factor
    for place, (a, b) in sorted(members.items()):
        number = next((i for i, known in enumerate(firsts) if _same(known, a)), len(firsts))
        if number == len(firsts):
            firsts.append(a)
            rows.append([mx.zeros((a.shape[1], width), b.dtype) for width in widths])
        rows[number][place] = b
    second = mx.concatenate([mx.concatenate(row, axis=1) for row in rows])
    if rule.swapped:
        half = second.shape[1] // 2
        second = mx.concatenate([second[:, half:], second[:, :half]], axis=1)
    return mx.concatenate(firsts, axis=1), second


def ranks(tensors: Mapping[str, mx.array]) -> set[int]:
    """The ranks of the layers in a LoRA file, of any of these formats."""
    return {value.shape[0] for name, value in tensors.items() if name.endswith((".lora_A.weight", ".lora_down.weight"))}


def _same(a: mx.array, b: mx.array) -> bool:
    return a is b or (a.shape == b.shape and bool(mx.array_equal(a, b)))


def folded(tensors: Mapping[str, mx.array], scale: float) -> dict[str, mx.array]:
    """The factors in float32 with the scale inside, as a strength of 1 gives the same product."""
    change: dict[str, Callable[[mx.array], mx.array]] = {"lora_a": lambda x: x, "lora_b": lambda x: x * scale}
    return {name: change[name.rpartition(".")[2]](value.astype(mx.float32)) for name, value in tensors.items()}


def rounded(tensors: Mapping[str, mx.array], dtype: mx.Dtype) -> dict[str, mx.array]:
    """The factors in another dtype. Raises UserError where a finite one becomes infinite."""
    found = {name: value.astype(dtype) for name, value in tensors.items()}
    for name, value in found.items():
        if dtype != mx.float32 and not bool(mx.all(mx.isfinite(value) | ~mx.isfinite(tensors[name]))):
            raise UserError(f"{name}: holds values that are too large for float16; give --dtype bfloat16 or float32")
    return found
